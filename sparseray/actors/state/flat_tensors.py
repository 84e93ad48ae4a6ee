"""Tensors that lie behind one another in flat slabs, so that one launch updates many small ones.

An update of a few thousand values takes a GPU as long as one of a million. So tensors that are updated alike lie
together, and their gradients, which come one by one, are brought together by one copy; large ones stay where they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 128
"""Elements; what descriptors and vector loads of any dtype ask for."""
LARGE = 1 << 22
"""Elements from which on a tensor is a run of its own: a copy of its gradient would cost more than a launch."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tensors that one launch updates.

    Args:
        members: indices of the tensors, in the order in which they lie.
        start, end: elements of the slab that they take, with what lies between them.
    """

    members: tuple[int, ...]
    start: int
    end: int

    def of(self, slab: Tensor) -> Tensor:
        """Their part of a slab."""
        return slab[self.start : self.end]


class FlatTensors:
    """Where tensors lie in a slab, each on a boundary of ALIGNMENT elements.

    Args:
        shapes: of the tensors.
        kinds: of each; those of one kind are updated alike.
    """

    def __init__(self, shapes: Sequence[torch.Size], kinds: Sequence[Hashable]) -> None:
        self.shapes = list(shapes)
        groups: dict[Hashable, list[int]] = {}
        for index, (shape, kind) in enumerate(zip(shapes, kinds)):
            groups.setdefault(index if shape.numel() >= LARGE else ("small", kind), []).append(index)
        self.starts, self.runs, end = [0] * len(self.shapes), [], 0
        for members in groups.values():
            start = end
            for index in members:
                self.starts[index] = end
                end += -(-self.shapes[index].numel() // ALIGNMENT) * ALIGNMENT
            self.runs.append(Run(members=tuple(members), start=start, end=end))
        self.num_elements = end

    def slab(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros for all of them.

        Args:
            dtype, device: of the slab.
        """
        return torch.zeros(self.num_elements, dtype=dtype, device=device)

    def views(self, slab: Tensor) -> list[Tensor]:
        """Every tensor, as a view of a slab."""
        return [slab[s : s + shape.numel()].view(shape) for s, shape in zip(self.starts, self.shapes)]

    @torch.no_grad()
    def gather(self, run: Run, gradients: Sequence[Tensor]) -> Tensor:
        """The gradients of a run's tensors as they lie in a slab; of a single one it is the gradient itself.

        Args:
            run: one of `runs`.
            gradients: of all tensors, contiguous, in the dtype of those of the run.
        """
        chosen = [gradients[index] for index in run.members]
        if len(chosen) == 1:
            return chosen[0]
        flat = chosen[0].new_zeros(run.end - run.start)
        parts = [
            flat[self.starts[index] - run.start :][: self.shapes[index].numel()].view(self.shapes[index])
            for index in run.members
        ]
        torch._foreach_copy_(parts, chosen)
        return flat
