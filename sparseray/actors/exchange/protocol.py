"""Where experts and rows are, and how gradients meet: what a worker or an engine sees of all other slots.

One exchange for each generation of a slot. `exchange/local.py` has everything in this slot; `exchange/by_message.py`
asks the slots of a plan. Which one it is changes no bit.

Shapes: T tokens, K experts per token, H hidden, N table rows per token, D row width, P dense parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparseray.actors.state.staged_memory import Addresses
from sparseray.errors import SupersededError


class Observe(Protocol):
    """Records a metric of this slot."""

    def __call__(self, name: str, value: float, **labels: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FetchedRows:
    """Table rows of some tokens, by 0-based model layer, as they lay before the forward pass: `Rows` of the model.

    Args:
        addresses: int64 [T, N].
        values: fp32 [T * N, D].
    """

    addresses: dict[int, Tensor]
    values: dict[int, Tensor]

    def __call__(self, layer: int) -> Tensor:
        """The rows [T, N, D] of a layer."""
        rows_TN, values = self.addresses[layer], self.values[layer]
        return values.view(*rows_TN.shape, values.shape[-1])

    def split(self, tokens: Sequence[int]) -> "list[FetchedRows]":
        """Return the rows of consecutive runs of tokens, each with values of its own to differentiate by."""
        addresses = {layer: torch.split(rows, list(tokens)) for layer, rows in self.addresses.items()}
        values = {
            layer: torch.split(self.values[layer], [len(run) * run.shape[1] for run in runs])
            for layer, runs in addresses.items()
        }
        return [
            FetchedRows(
                addresses={layer: runs[i] for layer, runs in addresses.items()},
                values={layer: runs[i] for layer, runs in values.items()},
            )
            for i in range(len(tokens))
        ]

    def differentiable(self) -> "FetchedRows":
        """Ask for the gradient of the values; they must not be part of a graph yet."""
        for value in self.values.values():
            value.requires_grad_()
        return self

    def gradients(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Addresses [N] and gradients [N, D] of each layer, once they are there."""
        found = []
        for layer, value in self.values.items():
            assert value.grad is not None, f"no gradient reached the rows of layer {layer}"
            found.append((self.addresses[layer].reshape(-1), value.grad))
        return tuple(found)


def fetch_together(
    prefetch: Callable[[Addresses], FetchedRows], parts: Sequence[Addresses]
) -> list[FetchedRows]:
    """Read the rows of several parts by one call.

    Args:
        prefetch: of an exchange.
        parts: addresses of each, of the same layers.
    """
    together = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
    return prefetch(together).split([len(next(iter(part.values()))) for part in parts])


@dataclass(frozen=True, kw_only=True)
class PartGradients:
    """Gradients of one part of a step.

    Args:
        dense: fp32 [P] alone, or, where they stay on a device, one gradient for each parameter.
        rows: addresses int64 [N] and gradients [N, D] of each memory layer, in order, with repeats.
    """

    dense: list[Tensor]
    rows: tuple[tuple[Tensor, Tensor], ...]


Run = Callable[[], list[Tensor]]
"""Passes of a part: what they give, in memory that a recording may keep."""
Recording = tuple[Callable[[], object], list[Tensor]]
"""What replays a run, and the tensors that a replay fills."""


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """What one fetch of table rows cost.

    Args:
        addressed: rows, repeats included.
        rows_by_tier: distinct rows from the own slot (local), from tables of others on this host (shared) and by
            message (remote).
        seconds: that it took.
    """

    addressed: int
    rows_by_tier: dict[str, int]
    seconds: float


class Exchange(Protocol):
    """One generation's way to experts, rows and sums. Every call may raise SupersededError once it is aborted.

    `abreast` parts may be in it at once, each in a thread of its own that calls `begin` first.
    """

    abreast: int

    def expect(self, parts: Sequence[tuple[int, int]], *, trains: bool) -> None:
        """Say what all slots together will run, for exchanges that they make in step.

        Args:
            parts: (part, slot) each, in order.
            trains: forward and backward; otherwise forward alone.
        """

    def accompany(self, step: int) -> None:
        """Take part in what others run, once all parts of this slot have run.

        Args:
            step: that is open.
        """

    def begin(self, step: int, part: int) -> None:
        """Say what the next calls belong to; part -1 for none.

        Args:
            step: whose commit comes next.
            part: of the global batch.
        """

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k, in k order, of weight * expert(x), [T, H]; differentiable in x and the weights.

        Args:
            layer: 0-based model layer.
            x_TH: inputs.
            topk_ids_TK: int64, chosen experts.
            topk_weights_TK: fp32, their weights.
        """
        ...

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """Read rows of all memory layers: 0-based model layer to int64 [T, N]."""
        ...

    def fetch(self, step: int, addresses: Callable[[int], Sequence[Addresses]]) -> list[FetchedRows]:
        """Read the rows of all parts of a training step that run here.

        Args:
            step: that begins.
            addresses: of those parts in any step; an exchange may ask for the next one's too, in another thread.
        """
        ...

    def reduce(self, step: int, part: int, gradients: PartGradients) -> None:
        """Send a part's gradients on their way to their sums; ends in `Prepared` of those who hold the sums, or in `conclude`.

        Args:
            step: that is open.
            part: that the gradients are of.
            gradients: dense ones and those of table rows.
        """

    def conclude(self, step: int) -> None:
        """Wait for what only the device has yet, once all parts are reduced and their losses told.

        Args:
            step: that is open.
        """

    def await_device(self) -> None:
        """Wait for what was launched, as somebody may have to be answered before it ends."""

    def take_fetches(self) -> list[Fetch]:
        """Return what was fetched since the last call."""
        ...

    def abort(self) -> None:
        """End the step at its next operation; called by the control thread."""


class Abortable:
    """What ends a step in every exchange: a flag that the control thread sets and every operation reads.

    Where slots answer each other at any time, nothing is expected of one, and none accompanies another.
    """

    abreast = 1

    def __init__(self) -> None:
        self._is_aborted = False

    def abort(self) -> None:
        """End the step at its next operation."""
        self._is_aborted = True

    def expect(self, parts: Sequence[tuple[int, int]], *, trains: bool) -> None:
        """Nothing.

        Args:
            parts, trains: as in `Exchange`.
        """

    def accompany(self, step: int) -> None:
        """Nothing.

        Args:
            step: that is open.
        """

    def conclude(self, step: int) -> None:
        """Nothing.

        Args:
            step: that is open.
        """

    def await_device(self) -> None:
        """What is asked for by message is there when it is returned."""

    def check(self) -> None:
        """Raise SupersededError once it was aborted."""
        if self._is_aborted:
            raise SupersededError

    def prefetch(self, rows: Addresses) -> FetchedRows:
        """Read rows of all memory layers."""
        raise NotImplementedError

    def fetch(self, step: int, addresses: Callable[[int], Sequence[Addresses]]) -> list[FetchedRows]:
        """Read the rows of all parts of a step, once it has begun.

        Args:
            step: that begins.
            addresses: of those parts.
        """
        return fetch_together(self.prefetch, addresses(step))
