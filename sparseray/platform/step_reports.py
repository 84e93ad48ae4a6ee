"""What slots report of one training step, until it can be committed."""

import math
from dataclasses import dataclass, field

import numpy as np

from sparseray.actors.wire.envelope import Message
from sparseray.actors.wire.messages import PartDone, Prepared


@dataclass
class StepReports:
    """What has come in for one step.

    Args:
        parts: part to its report.
        norms: squared gradient norm of every logical tensor.
        digests: gradient digest by (tensor, slot).
        prepared: (slot, role) that are ready to commit.
    """

    parts: dict[int, PartDone] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    digests: dict[str, dict[int, int]] = field(default_factory=dict)
    prepared: set[tuple[int, str]] = field(default_factory=set)

    def take(self, message: Message[PartDone | Prepared]) -> None:
        """Add one message."""
        body = message.body
        if isinstance(body, PartDone):
            self.parts[message.part] = body
        else:
            self.prepared.add((message.source, body.role))
            self.norms |= body.norms
            for name, value in body.digests.items():
                self.digests.setdefault(name, {})[message.source] = value

    @property
    def counts_LE(self) -> np.ndarray:
        """Tokens per moe layer and expert over all parts, int64."""
        return np.asarray(sum(part.counts_LE.numpy() for part in self.parts.values()))

    @property
    def losses(self) -> dict[str, float]:
        """Mean over the parts, in part order, of each further loss that the objective names."""
        found: dict[str, list[float]] = {}
        for part in sorted(self.parts):
            for name, value in self.parts[part].metrics.items():
                found.setdefault(name, []).append(value)
        return {name: math.fsum(values) / len(values) for name, values in sorted(found.items())}

    def check_replicas(self) -> None:
        """Stop when replicas hold different gradients: that is a defect, and applying them would hide it."""
        for name, by_slot in self.digests.items():
            if len(set(by_slot.values())) > 1:
                raise RuntimeError(f"replicas disagree on the gradient of {name}: {by_slot}")
