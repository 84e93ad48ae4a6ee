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


def needle_of(key: str, number: int) -> Needle:
    """Return the needle of a key. The space belongs to the answer: tokenizers put it with what follows it.

    Args:
        key: what the number is, such as "secret number".
        number: of six digits.
    """
    return Needle(
        sentence=f"\nThe {key} is {number}. Remember it.\n", question=f"\nThe {key} is", answer=f" {number}"
    )


def draw_number(draw: random.Random) -> int:
    """Return a number of six digits."""
    return draw.randrange(100_000, 1_000_000)


def draw_needle(draw: random.Random) -> Needle:
    """Return a needle with a number of its own."""
    return needle_of("secret number", draw_number(draw))
