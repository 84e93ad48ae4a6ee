"""Needles in haystacks: a sentence with a number, hidden in other text, and the number asked for at the end."""

import random
from dataclasses import dataclass

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies, as a part of the text before the question."""


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A sentence to hide, what asks for it, and the answer."""

    sentence: str
    question: str
    answer: str


def draw_needle(draw: random.Random) -> Needle:
    """Return a needle with a number of six digits."""
    number = str(draw.randrange(100_000, 1_000_000))
    return Needle(
        sentence=f"\nThe secret number is {number}. Remember it.\n",
        question="\nThe secret number is ",
        answer=number,
    )
