"""What a slot needs to know of its job; platform/fleet/job.py builds it from the run's configuration."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sparseray.actors.serving.enduring import EnduringExchange
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.rounds_engine import InRounds
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.training.objective import BatchSource
from sparseray.actors.wire.messages import SavedTensor
from sparseray.model.transformer import Transformer


class Job(Protocol):
    """How to build states and engines, and where tokens and checkpoints are.

    Attributes:
        saves_beside: checkpoints fall due while training goes on.
    """

    deadline_s: float
    is_serving: bool
    saves_beside: bool
    is_in_rounds: bool
    part_shape: tuple[int, int]

    def holdings(self) -> Holdings: ...
    def engine(self, model: Transformer, exchange: EnduringExchange | InRounds) -> Engine | None:
        """Make the engine; None for a job that does not serve.

        Args:
            model: dense weights.
            exchange: that outlives plans.
        """
        ...

    def train_batches(self) -> BatchSource: ...
    def validation_batches(self) -> BatchSource: ...
    def read(self, directory: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors of a checkpoint.

        Args:
            directory: its folder.
            names: logical names.
        """
        ...

    def write(self, directory: str, name: str, tensors: dict[str, Tensor]) -> dict[str, SavedTensor]:
        """Write one file of a checkpoint and say where each tensor is.

        Args:
            directory: its folder.
            name: of the file, without its suffix.
            tensors: by logical name.
        """
        ...

    def offer(self, step: int, tensors: dict[str, Tensor]) -> str:
        """Keep weights where servers can read them, instead of those before; returns where.

        Args:
            step: that they are of.
            tensors: by logical name.
        """
        ...

    def withdraw(self) -> None: ...
    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record a metric of the slot.

        Args:
            name: in the registry.
            value: in the metric's unit.
            labels: of the metric.
        """
        ...
