"""Texts of benchmarks/needle.py: what is asked has been told before, and never under the key of `evaluate`."""

import itertools
import random
import re
from collections import Counter

import pytest

from benchmarks.needle_text import KEYS, Kind, document

NEEDLE = re.compile(r"\nThe ([a-z]+ [a-z]+) is (\d{6})(\. Remember it\.\n|\n)")


@pytest.mark.parametrize("questions", [1, 3])
def test_every_question_is_answered_by_the_one_needle_of_its_key_before_it(questions: int) -> None:
    draw = random.Random(5)
    kind = Kind(size=120_000, documents=1, gap=300, nearest=50, farthest=6000, questions=questions, even=0.5)
    # Not the standard library's, which differ from one Python to another.
    lines = itertools.cycle(f"value_{index} = {'x' * (index % 60)}\n" for index in range(500))
    text = document(kind, lines, draw)
    told: dict[str, tuple[str, int]] = {}
    asked = Counter[str]()
    distances = []
    for found in NEEDLE.finditer(text):
        key, number, end = found.groups()
        if end.startswith("."):
            assert key not in told
            told[key] = number, found.start()
        else:
            assert told[key][0] == number
            distances.append(found.start() - told[key][1])
            asked[key] += 1
    assert len(told) > 50 and len(asked) > 0.9 * len(told) and max(asked.values()) == questions
    # A question waits for the end of a line, or of another question.
    assert min(distances) >= 50 and max(distances) < 6000 + 600
    # Of those on a logarithmic scale half lie within the geometric mean, of the others 8 %.
    assert 0.2 < sum(one < 548 for one in distances) / len(distances) < 0.4
    assert "secret number" not in KEYS and "The secret number" not in text
