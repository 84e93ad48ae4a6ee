"""Texts to learn retrieval from: needles of many keys in source code, each asked for once or more further on.

A sentence tells a number under a key ("The lucky code is 482913. Remember it."), and later text begins the sentence
again: only what was told says how it goes on. The form is that of `sparseray evaluate`, whose own key never occurs.
Documents are longer than a training sequence, so wherever a window begins, pairs of all distances lie in it.
"""

import heapq
import math
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparseray.jobs.evaluation.needle import Needle, draw_number, needle_of

QUALITIES = (
    "secret", "lucky", "first", "final", "hidden", "public", "local", "global", "current", "default",
    "internal", "special", "simple", "small", "large", "red", "green", "blue", "black", "white",
)  # fmt: skip
THINGS = (
    "number", "code", "key", "value", "index", "size", "time", "port", "line", "offset",
    "count", "address", "version", "level", "length", "class", "name", "file", "type", "test",
)  # fmt: skip
KEYS = tuple(f"{a} {b}" for a in QUALITIES for b in THINGS if (a, b) != ("secret", "number"))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a source of training text looks; all lengths in characters.

    Args:
        size: of a document.
        documents: how many.
        gap: mean text between two needles.
        nearest, farthest: between a needle and a question, drawn evenly on a logarithmic scale.
        questions: about one needle, at most. Each answers the next one too: with several, what is near is enough.
        even: share of the distances that are drawn evenly instead: windows cut most of the long ones off. A model that does
            not copy yet learns it from short ones.
    """

    size: int
    documents: int
    gap: int
    nearest: int
    farthest: int
    questions: int
    even: float


def code_lines(draw: random.Random) -> Iterator[str]:
    """Yield lines of the standard library for ever: passages of files in random order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text("utf-8", "ignore").splitlines(keepends=True) for path in files]
    texts = [lines for lines in texts if len(lines) > 40]
    while True:
        lines = draw.choice(texts)
        begin = draw.randrange(len(lines) - 30)
        yield from (line for line in lines[begin : begin + 30] if line.strip() and len(line) < 120)


def document(kind: Kind, lines: Iterator[str], draw: random.Random) -> str:
    """Return code with needles and questions.

    Args:
        kind: of document.
        lines: of code.
        draw: of keys, numbers and places.
    """
    keys = iter(draw.sample(KEYS, len(KEYS)))
    parts: list[str] = []
    length, next_needle, turn = 0, 0.0, 0
    due: list[tuple[float, int, Needle]] = []
    while length < kind.size:
        if due and due[0][0] <= length:
            needle = heapq.heappop(due)[2]
            text = f"{needle.question}{needle.answer}\n"
        elif length >= next_needle and (key := next(keys, None)) is not None:
            needle = needle_of(key, draw_number(draw))
            text = needle.sentence
            for _ in range(draw.randint(1, kind.questions)):
                heapq.heappush(due, (length + _distance(kind, draw), turn := turn + 1, needle))
            next_needle = length + draw.expovariate(1 / kind.gap)
        else:
            text = next(lines)
        parts.append(text)
        length += len(text)
    return "".join(parts)


def _distance(kind: Kind, draw: random.Random) -> float:
    """Characters between a needle and a question."""
    if draw.random() < kind.even:
        return draw.uniform(kind.nearest, kind.farthest)
    return kind.nearest * math.exp(draw.random() * math.log(kind.farthest / kind.nearest))


def write_texts(folder: Path, kind: Kind, seed: int) -> Path:
    """Write a source's documents; always the same on one Python.

    Args:
        folder: to make.
        kind: of documents.
        seed: of all of them.
    """
    draw = random.Random(seed)
    lines = code_lines(draw)
    folder.mkdir(parents=True)
    for index in range(kind.documents):
        (folder / f"{index:05d}.txt").write_text(document(kind, lines, draw), encoding="utf-8")
    return folder
