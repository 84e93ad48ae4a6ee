"""Sums of slabs' gradients over the parts of a step, on the device where they lie.

A part's gradients come as autograd leaves them, in the weights' dtype; with one part they are the sum. Otherwise the
sum is fp32, along the aligned tree of tree.py ("bitwise": the bits do not depend on how parts are spread over
workers), or one part after another into one slab ("fast": a slab instead of one for each level of the tree).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sparseray.actors.state.tree import TreeSum

Determinism = Literal["bitwise", "fast"]
Gradients = list[Tensor]


def _add(left: Gradients, right: Gradients) -> Gradients:
    """The sum in fp32, in memory of `left` where that is fp32 already."""
    wide = [x if x.dtype == torch.float32 else x.float() for x in left]
    for into, value in zip(wide, right):
        into.add_(value)
    return wide


def _kept(lent: Gradients) -> Gradients:
    """A copy in fp32, as the sum with what comes next will be."""
    return [x.to(torch.float32, copy=True) for x in lent]


class GradientSum:
    """Adds up one slot's gradients of all parts.

    Args:
        num_parts: of a step; where some run elsewhere, `complete` tells their sum.
        determinism: the order of the sum.
    """

    def __init__(self, num_parts: int, determinism: Determinism) -> None:
        self._num_parts, self.determinism = num_parts, determinism
        self.clear()

    def clear(self) -> None:
        """Forget the sum."""
        self._tree: TreeSum[Gradients] = TreeSum(self._num_parts, _add)
        self._running: Gradients | None = None
        self._whole: Gradients | None = None
        self._left = self._num_parts

    def add(self, part: int, gradients: Sequence[Tensor], parts: int = 1, *, lent: bool = False) -> None:
        """Add a part's gradients, which are given away.

        Args:
            part: logical part of the step; each once.
            gradients: always of the same shapes, in the same order.
            parts: that they are the sum of, that one first; in the order of "fast" alone.
            lent: the next part writes its own where they lie; of a step with one part there is none.
        """
        self._left -= parts
        keep = _kept if lent and self._num_parts > 1 else None
        if self.determinism == "bitwise":
            self._tree.add(0, part, list(gradients), keep)
        elif self._running is None:
            self._running = list(gradients) if keep is None else keep(list(gradients))
        else:
            self._running = _add(self._running, list(gradients))

    @property
    def num_slabs(self) -> int:
        """Sums in fp32 that there are at once, where parts come in order."""
        if self._num_parts == 1:
            return 0
        return 1 if self.determinism == "fast" else (self._num_parts - 1).bit_length()

    def nodes(self) -> list[tuple[int, int, Gradients]]:
        """What there is of the sum so far: (level, index, sum) of the tree, or the one sum of all parts here."""
        if self.determinism == "bitwise":
            return self._tree.nodes()
        return [] if self._running is None else [(0, 0, self._running)]

    def complete(self, total: Gradients) -> None:
        """Take over the sum over all parts.

        Args:
            total: what `total` gives from now on.
        """
        self._whole = total

    @property
    def total(self) -> Gradients | None:
        """The sum over all parts; None while some are missing."""
        if self._whole is not None or self._left:
            return self._whole
        return self._tree.root if self.determinism == "bitwise" else self._running
