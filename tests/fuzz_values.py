"""Odd values, and one of them in place of a value somewhere inside JSON."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 10**30, -(10**30), "", "a", "\ud800", "\x00", "é" * 50, "9" * 40,
    "a" * 5000, [], [[]], [None], [0], [1, "a"], ["a"], {}, {"a": 1}, {"type": "text"}, {"": []}, [[[[]]]], "東京\n\n",
    "null", "(", "[", "start: x", {"type": "x"}, {"$ref": "#"}, [True], ["a" * 300], [10**12], {"1": "x"}, "<|endoftext|>",
]  # fmt: skip


def damage(value: Any, rng: random.Random) -> None:
    """Change one value somewhere inside a body."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.6:
            value = value[key]
            continue
        odd = copy.deepcopy(rng.choice(ODD))
        kind = rng.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.25:
            value[key] = [value[key]] * rng.randint(2, 40)
        else:
            value[key] = odd
        return
