"""The experts of one layer that a slot holds, side by side: two tensors of weights and two of each moment.

Row r of `gate_up_E2IH` and of `down_EHI` is one expert; its logical tensors (gate, up, down) are views of that row,
so checkpoints and moves see names and a grouped kernel sees a slab. Weights are fp32 masters; a kernel
reads `compute`, a copy in another dtype where one is asked for.

Shapes: E experts held, I inner width, H hidden width.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparseray.actors.state.adamw import EXP_AVG, EXP_AVG_SQ

Matrices = tuple[Tensor, Tensor]
MOMENTS = (EXP_AVG, EXP_AVG_SQ)


class ExpertSlab:
    """Rows of experts that come and go, in the experts' order; a slab is never longer than what it holds.

    Args:
        inner, hidden: widths of an expert.
        device: where the tensors live.
        compute_dtype: dtype of the copy that kernels read; None reads the master itself.
        moments: dtype of both moments.
    """

    def __init__(
        self,
        inner: int,
        hidden: int,
        *,
        device: torch.device | str,
        compute_dtype: torch.dtype | None,
        moments: torch.dtype = torch.float32,
    ) -> None:
        self.inner, self.hidden, self.device = inner, hidden, torch.device(device)
        self.compute_dtype, self._moments_dtype = compute_dtype, moments
        self.rows: dict[int, int] = {}
        self._fields: dict[str, Matrices] = {"": self._pair(torch.empty, torch.float32)}
        self._compute: Matrices | None = None

    def _pair(self, make: object, dtype: torch.dtype) -> Matrices:
        assert callable(make)
        shapes = (len(self.rows), 2 * self.inner, self.hidden), (len(self.rows), self.hidden, self.inner)
        gate_up, down = (make(shape, dtype=dtype, device=self.device) for shape in shapes)
        return gate_up, down

    @property
    def weights(self) -> Matrices:
        """The fp32 masters, (gate_up_E2IH, down_EHI)."""
        return self._fields[""]

    @property
    def compute(self) -> Matrices:
        """What kernels read, (gate_up_E2IH, down_EHI); refreshed when the masters have changed."""
        if self.compute_dtype is None:
            return self.weights
        if self._compute is None:
            gate_up, down = (master.to(self.compute_dtype) for master in self.weights)
            self._compute = gate_up, down
        return self._compute

    def refresh(self) -> None:
        """Take the masters over into the copy that kernels read."""
        if self._compute is not None:
            for copy, master in zip(self._compute, self.weights):
                copy.copy_(master)

    def take(self, experts: Iterable[int]) -> None:
        """Make room for experts; those that are new have undefined weights and moments of zero."""
        new = [expert for expert in experts if expert not in self.rows]
        if new:
            self._resize([*self.rows, *new])

    def keep(self, experts: Iterable[int]) -> None:
        """Forget all other experts, and give their memory back."""
        kept = set(experts)
        if not set(self.rows) <= kept:
            self._resize([expert for expert in self.rows if expert in kept])

    def _resize(self, experts: Sequence[int]) -> None:
        """Copy each field once into tensors for exactly `experts`."""
        old = self.rows
        self.rows = {expert: row for row, expert in enumerate(sorted(experts))}
        common = [expert for expert in self.rows if expert in old]
        if not common:
            # Of moments nothing is left; they come back when somebody asks for them.
            self._fields = {"": self._fields[""]}
        to, source = ([rows[expert] for expert in common] for rows in (self.rows, old))
        for name, before in self._fields.items():
            after = self._pair(torch.zeros if name else torch.empty, before[0].dtype)
            for new, tensor in zip(after, before):
                new[to] = tensor[source]
            self._fields[name] = after
        self._compute = None

    def matrices(self, pair: Matrices, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate [I, H], up [I, H] and down [H, I] of one expert, as views.

        Args:
            pair: a pair of this slab's tensors, such as `weights` or `compute`.
            expert: one that is held.
        """
        row = self.rows[expert]
        return pair[0][row, : self.inner], pair[0][row, self.inner :], pair[1][row]

    def moments(self) -> tuple[Matrices, Matrices]:
        """First and second moments; zeros before the first step."""
        for name in MOMENTS:
            if name not in self._fields:
                self._fields[name] = self._pair(torch.zeros, self._moments_dtype)
        return self._fields[EXP_AVG], self._fields[EXP_AVG_SQ]

    def fields(self, *, with_optimizer: bool) -> dict[str, Matrices]:
        """Pairs by the suffix of their logical names: weights, and the moments if they are asked for."""
        return {"": self.weights} | (dict(zip(MOMENTS, self.moments())) if with_optimizer else {})

    def run(self, first: int, count: int, *, with_optimizer: bool) -> dict[str, Tensor]:
        """Tensors of experts that follow each other, of all fields, as views.

        Args:
            first: the first of them; all are held.
            count: how many.
            with_optimizer: their moments too.
        """
        row = self.rows[first]
        return {
            f"{matrix}{suffix}": tensor[row : row + count]
            for suffix, pair in self.fields(with_optimizer=with_optimizer).items()
            for matrix, tensor in enumerate(pair)
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors here."""
        pairs = [*self._fields.values(), *([self._compute] if self._compute is not None else [])]
        return sum(tensor.untyped_storage().nbytes() for pair in pairs for tensor in pair)
