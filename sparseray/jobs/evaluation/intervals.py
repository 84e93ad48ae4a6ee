"""Confidence intervals: Wilson's for shares, a bootstrap over documents for means of many tokens."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964
"""Two-sided 95 % of a normal distribution."""
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure with its 95 % interval.

    Args:
        value: of all samples.
        low, high: ends of the interval.
        samples: how many there were.
        interval: "wilson" or "bootstrap".
    """

    value: float
    low: float
    high: float
    samples: int
    interval: str


def share(hits: int, samples: int) -> Measured:
    """A share with Wilson's interval, which is right near 0 and 1 and for few samples too.

    Args:
        hits: samples that count.
        samples: all of them, at least 1.

    Source:
        Wilson, J. Amer. Statist. Assoc. 22 (1927), 209-212.
    """
    p, n = hits / samples, samples
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Measured(
        value=p, low=max(0.0, middle - half), high=min(1.0, middle + half), samples=n, interval="wilson"
    )


def ratio(sums: Sequence[float], sizes: Sequence[float], seed: int) -> Measured:
    """Sum over size, with a bootstrap interval: whole documents are drawn again, as their tokens hang together.

    Args:
        sums: of each document.
        sizes: of each document, above 0.
        seed: of the draws.
    """
    draw, count = random.Random(seed), len(sums)
    found = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(range(count), k=count)
        found.append(math.fsum(sums[i] for i in chosen) / math.fsum(sizes[i] for i in chosen))
    found.sort()
    cut = round(0.025 * (RESAMPLES - 1))
    return Measured(
        value=math.fsum(sums) / math.fsum(sizes),
        low=found[cut],
        high=found[RESAMPLES - 1 - cut],
        samples=count,
        interval="bootstrap",
    )
