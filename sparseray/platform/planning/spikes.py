"""Loss spikes: whether a step's loss or gradient norm stands out from those of the steps before it.

A pure function of numbers that every step's record has, so the same decision is made again after any restart and
however many slots computed them. "Robust": the median and the median absolute deviation, which a spike in the window
does not move.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

LEAST = 16
"""Steps that must have been seen before anything finite stands out."""
NORMAL = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""
FLOOR = 0.01
"""A deviation counts as no less than this part of the median: a flat stretch makes no spike of a ripple."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Loss (nats per token) and gradient norm of one step."""

    loss: float
    norm: float


def find_spike(now: Reading, recent: Sequence[Reading], deviations: float) -> str:
    """Say what of a step stands out upwards; empty if nothing does.

    Args:
        now: of the step.
        recent: of the steps before it that were applied.
        deviations: robust deviations above the median from which a value stands out.
    """
    for what, value, before in (
        ("loss", now.loss, [reading.loss for reading in recent]),
        ("gradient norm", now.norm, [reading.norm for reading in recent]),
    ):
        if not math.isfinite(value):
            return f"the {what} is {value}"
        if len(before) < LEAST:
            continue
        middle = median(before)
        deviation = max(NORMAL * median(abs(x - middle) for x in before), FLOOR * abs(middle))
        if value > middle + deviations * deviation:
            far = (value - middle) / deviation if deviation else math.inf
            return f"the {what} is {value:.4g}, {far:.3g} deviations above {middle:.4g}"
    return ""
