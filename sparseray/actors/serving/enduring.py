"""The model's seams in serving: a call that a change of plan cuts off is made again, at the plan that came.

So an engine that stays where it is keeps its caches: the layer that waited for an expert or for rows goes on
with those who hold them now, and no request notices. A call in serving changes no state, hence may be repeated.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparseray.errors import SupersededError


class EnduringSeam:
    """`Experts` or `Memory` of an engine.

    Args:
        current: the seam of the plan in force.
        go_on: enters a newer plan; raises what it was given where this slot is no engine any more.
    """

    def __init__(
        self, current: Callable[[], Callable[..., Tensor]], go_on: Callable[[SupersededError], None]
    ) -> None:
        self._current, self._go_on = current, go_on

    def __call__(self, *arguments: Any) -> Tensor:
        """Ask whoever answers now."""
        while True:
            try:
                return self._current()(*arguments)
            except SupersededError as newer:
                self._go_on(newer)
