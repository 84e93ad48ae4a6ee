"""Everything of the model's state that one slot holds, and how it changes with the plan.

State is cut into pieces: ("dense", 0, 0), ("expert", moe layer, expert), ("bucket", dse layer, bucket).
A piece that the plan takes away stays readable until `trim`, so a change of plan that fails on the
way has lost nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.kept_rows import KeptRows
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.state.pieces import DENSE, Piece, keys_of


class Holdings:
    """The pieces of one slot.

    Args:
        new_dense: builds dense weights from the seed.
        experts, memory: empty shards; memory is None for a model without tables.
    """

    def __init__(
        self, new_dense: Callable[[], DenseState], experts: ExpertShard, memory: MemoryShard | None
    ) -> None:
        self._new_dense = new_dense
        self._spare: DenseState | None = None
        self._is_drawn = False
        """Whether the spare ones have the seed's values still."""
        self.dense: DenseState | None = None
        self.experts, self.memory = experts, memory
        self._owns_dense = False

    @property
    def held(self) -> set[Piece]:
        """Pieces that can be read here, assigned or not."""
        found: set[Piece] = {("expert", *key) for key in self.experts.held}
        if self.memory is not None:
            found |= {("bucket", *key) for key in self.memory.held}
        return found | ({DENSE} if self.dense is not None else set())

    def spare(self) -> DenseState:
        """Dense weights whose values count only once they are loaded; building them takes a while."""
        if self._spare is None:
            self._spare, self._is_drawn = self._new_dense(), True
        return self._spare

    def clear(self) -> None:
        """Forget everything."""
        self.dense, self._owns_dense = None, False
        self.experts.assign([], [])
        self.experts.trim()
        if self.memory is not None:
            self.memory.assign([], [])
            self.memory.trim()

    def initialize(self, pieces: Sequence[Piece], step: int = 0) -> None:
        """Make pieces from the seed.

        Args:
            pieces: which.
            step: that they shall count as of.
        """
        if DENSE in pieces:
            # Not beside another: they may be as large as the device.
            self.dense = None
            if not self._is_drawn:
                self._spare = None
            self.dense, self._spare = self.spare(), None
        self.experts.initialize(keys_of(pieces, "expert"), step)
        if self.memory is not None:
            self.memory.initialize(keys_of(pieces, "bucket"), step)

    def names(self, pieces: Sequence[Piece], *, with_optimizer: bool = True) -> list[str]:
        """Logical names of all tensors of `pieces`.

        Args:
            pieces: held or not.
            with_optimizer: name their optimizer state too; what serves needs none.
        """
        found = []
        if DENSE in pieces:
            found += (self.dense or self.spare()).tensor_names(with_optimizer=with_optimizer)
        found += self.experts.tensor_names(keys_of(pieces, "expert"), with_optimizer=with_optimizer)
        if self.memory is not None:
            found += self.memory.tensor_names(keys_of(pieces, "bucket"), with_optimizer=with_optimizer)
        return found

    def tensors(
        self, pieces: Sequence[Piece], *, with_optimizer: bool = True, in_runs: bool = False
    ) -> dict[str, torch.Tensor]:
        """Tensors of pieces, by logical name, as views.

        Args:
            pieces: held here.
            with_optimizer: their optimizer state too.
            in_runs: experts as `ExpertShard.runs` gives them.
        """
        found: dict[str, torch.Tensor] = {}
        if DENSE in pieces:
            assert self.dense is not None
            found |= self.dense.tensors(with_optimizer=with_optimizer)
        of_experts = self.experts.runs if in_runs else self.experts.tensors
        found |= of_experts(keys_of(pieces, "expert"), with_optimizer=with_optimizer)
        if self.memory is not None:
            found |= self.memory.tensors(keys_of(pieces, "bucket"), with_optimizer=with_optimizer)
        return found

    def begin_copy(self) -> KeptRows | None:
        """As `MemoryShard.begin_copy`; None without memory."""
        return None if self.memory is None else self.memory.begin_copy()

    def load(
        self,
        pieces: Sequence[Piece],
        tensors: dict[str, torch.Tensor],
        step: int,
        *,
        with_optimizer: bool = True,
    ) -> None:
        """Take over pieces.

        Args:
            pieces: which.
            tensors: at least those that `names` names.
            step: optimizer step that they are from.
            with_optimizer: take over their optimizer state too; without it they can be read, not updated.
        """
        with self.arriving(pieces, step, with_optimizer=with_optimizer) as own:
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    @contextmanager
    def arriving(
        self,
        pieces: Sequence[Piece],
        step: int,
        *,
        with_optimizer: bool = True,
        runs_of: Iterable[Sequence[Piece]] | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Tensors of pieces to fill within a block, by logical name; none of them is held before its end, or if it fails.

        Args:
            pieces, step, with_optimizer: as in `load`.
            runs_of: the same pieces by where they come from, to be filled as each gives them `in_runs`.
        """
        experts, memory = self.experts, self.memory
        of_sources = None if runs_of is None else [keys_of(own, "expert") for own in runs_of]
        keys = keys_of(pieces, "expert")
        found = experts.begin_load(keys, step, with_optimizer=with_optimizer, runs_of=of_sources)
        if memory is not None:
            found |= memory.begin_load(keys_of(pieces, "bucket"), step, with_optimizer=with_optimizer)
        dense = (self.dense or self.spare()) if DENSE in pieces else None
        if dense is not None:
            self.dense, self._spare, self._is_drawn = None, dense, False
            found = dense.begin_load(step, with_optimizer=with_optimizer) | found
        try:
            yield found
        except BaseException:
            experts.drop_load()
            if memory is not None:
                memory.drop_load()
            raise
        experts.end_load()
        if memory is not None:
            memory.end_load()
        if dense is not None:
            dense.end_load()
            self.dense, self._spare = dense, None

    def assign(self, plan: Plan, slot: int) -> None:
        """Take the roles that the plan gives, on pieces that are held; gradients of a step are dropped.

        Args:
            plan: of the generation that begins.
            slot: own id.
        """
        self._owns_dense = slot in plan.dense
        if self.dense is not None:
            self.dense.discard()
        owned = plan.experts_of(slot)
        primary = [k for k in owned if plan.experts[k[0]][k[1]][0] == slot]
        self.experts.assign(owned, primary, plan.computes(slot))
        if self.memory is not None:
            owned = plan.buckets_of(slot)
            primary = [k for k in owned if plan.buckets[k[0]][k[1]][0] == slot]
            self.memory.assign(owned, primary, generation=plan.generation)

    def trim(self) -> None:
        """Forget what is held and not assigned."""
        if not self._owns_dense and self.dense is not None:
            self.dense, self._spare, self._is_drawn = None, self.dense, False
        self.experts.trim()
        if self.memory is not None:
            self.memory.trim()

    @property
    def is_reduced(self) -> bool:
        """Whether everything assigned here has its reduced gradient."""
        dense = self.dense is None or not self._owns_dense or self.dense.is_reduced
        memory = self.memory is None or self.memory.is_reduced
        return dense and self.experts.is_reduced and memory

    def apply(self, *, lr: float, memory_lr: float, scale: float, counts_LE: torch.Tensor) -> int:
        """Update everything assigned here once, and return how many table rows were updated.

        Args:
            lr, memory_lr: learning rates of dense weights and experts, and of table rows.
            scale: factor on the gradients (clipping).
            counts_LE: int64, tokens per MoE layer and expert over the whole global batch.
        """
        self.trim()
        # First what keeps a device busy longest, while the host launches the rest.
        self.experts.apply(lr=lr, scale=scale)
        if self.dense is not None:
            self.dense.apply(lr=lr, scale=scale, counts_LE=counts_LE)
        return 0 if self.memory is None else self.memory.apply(lr=memory_lr, scale=scale)

    def pass_over(self) -> None:
        """Count a step whose gradients are dropped; no weight changes."""
        self.trim()
        self.experts.pass_over()
        if self.dense is not None:
            self.dense.pass_over()
        if self.memory is not None:
            self.memory.pass_over()
