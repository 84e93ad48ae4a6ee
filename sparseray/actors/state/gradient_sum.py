"""Sums of whole slabs' gradients over the parts of a step, on the device where they lie.

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


class GradientSum:
    """Adds up one slot's gradients of all parts.

    Args:
        num_parts: of a step; all of them run here.
        determinism: the order of the sum.
    """

    def __init__(self, num_parts: int, determinism: Determinism) -> None:
        self._num_parts, self._determinism = num_parts, determinism
        self.clear()

    def clear(self) -> None:
        """Forget the sum."""
        self._tree: TreeSum[Gradients] = TreeSum(self._num_parts, _add)
        self._running: Gradients | None = None
        self._left = self._num_parts

    def add(self, part: int, gradients: Sequence[Tensor]) -> None:
        """Add a part's gradients, which are given away.

        Args:
            part: logical part of the step; each once.
            gradients: always of the same shapes, in the same order.
        """
        self._left -= 1
        if self._determinism == "bitwise":
            self._tree.add(0, part, list(gradients))
        elif self._running is None:
            self._running = list(gradients)
        else:
            self._running = _add(self._running, list(gradients))

    @property
    def total(self) -> Gradients | None:
        """The sum over all parts; None while some are missing."""
        if self._left:
            return None
        return self._tree.root if self._determinism == "bitwise" else self._running
