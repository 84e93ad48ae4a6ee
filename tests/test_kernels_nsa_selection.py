"""The choice of blocks against its plain reference, at odd widths, with ties and zeros; and the queries of each block."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from nsa_sizes import DEVICE, HAS_GPU
from torch import Tensor

from sparseray.kernels.nsa import inverse
from sparseray.kernels.nsa.geometry import KEYS, packed
from sparseray.kernels.nsa.inverse import invert_selection
from sparseray.kernels.nsa.reference import top_n_reference
from sparseray.kernels.nsa.top_n import top_n

SIZES = [(4, 1, 2), (16, 1, 2), (5, 0, 0), (3, 1, 2), (40, 1, 2), (7, 3, 1), (1, 0, 0)]
"""Blocks that are selected, and of those the first and the local ones."""


def scores_of(kind: str, rows: int, heads: int, width: int, generator: torch.Generator) -> Tensor:
    """fp32 [2, rows, heads, width], not negative."""
    found = torch.rand(2, rows, heads, width, generator=generator)
    if kind == "ties":
        found = (found * 3).floor()
    elif kind == "zeros":
        found = torch.zeros_like(found)
    elif kind == "wide":
        found = torch.exp(found * 80 - 60) * (found > 0.3)
    elif kind == "sharp":
        found = 1.0 + found * 2.0**-20
    return found.to(DEVICE)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", ["even", "ties", "zeros", "wide", "sharp"])
@pytest.mark.parametrize(("n", "num_initial", "num_local"), SIZES)
def test_the_chosen_blocks_are_those_of_the_reference(
    n: int, num_initial: int, num_local: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(n)
    heads, block = 2, 4
    for width in (13, 513, 2048) if HAS_GPU else (1, 13, 513):
        tokens, rows = width * block, min(width * block, 4 if width > 13 else 20)
        first = tokens - rows
        scores = scores_of(kind, rows, heads, width, generator)
        index = torch.full((tokens, heads, n), -7, dtype=torch.int32, device=DEVICE)
        positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
        sizes = {"select_block": block, "num_initial": num_initial, "num_local": num_local}
        top_n(scores, index, positions, first, **sizes, overlap=True)
        folded = scores[0].clone()
        folded[..., 1:] += scores[1, ..., :-1]
        expected = top_n_reference(folded[None], **sizes, num_selected=n, q_start=first)[0]
        assert torch.equal(index[first:], expected)
        assert (index[:first] == -7).all()
        if kind != "even":
            continue
        top_n(scores, index, positions, first, **sizes, overlap=False)
        expected = top_n_reference(scores[0][None], **sizes, num_selected=n, q_start=first)[0]
        assert torch.equal(index[first:], expected)


@pytest.mark.parametrize(("chunk", "part", "short"), [(40, 1000, 1 << 15), (16, 3, 0), (7, 1, 1 << 15)])
def test_the_inverse_table_names_the_queries_of_every_block_in_their_order(
    chunk: int, part: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inverse, "MOST_SHORT", short)
    block, heads, n, ends = 4, 2, 3, [0, 9, 9, 40]
    geometry = packed(torch.tensor(ends, device=DEVICE), ends[-1], 0, 8, 4)
    generator = torch.Generator().manual_seed(chunk)
    lengths, num_blocks = [b - a for a, b in pairwise(ends)], 11
    index = torch.stack(
        [torch.randint(-1, -(-length // block), (heads, n), generator=generator) for length in lengths for _ in range(length)]
    )  # fmt: skip
    # Some blocks have no query, and one has all.
    index = torch.where(index == 1, 0, index).int()
    found = invert_selection(index.to(DEVICE), geometry, select_block=block, chunk=chunk, part=part)
    first = [0] * 9 + [3] * 31
    num_rows = heads * geometry.num_tiles(KEYS, block)
    for i in range(-(-ends[-1] // chunk)):
        lines = [line for line in found.parts[i].tolist() if line[0] >= 0]
        assert all(line[0] == -1 for line in found.parts[i].tolist()[len(lines) :])
        for row in range(num_rows):
            head, place = divmod(row, num_rows // heads)
            wanted = [
                (q * heads + head) * n + s
                for q in range(i * chunk, min((i + 1) * chunk, ends[-1]))
                for s in range(n)
                if index[q, head, s] >= 0 and first[q] + index[q, head, s] == place
            ]
            of_row = [line for line in lines if line[0] == row]
            assert [line[1] for line in of_row] == list(range(-(-len(wanted) // part)))
            assert all(line[2] == len(of_row) for line in of_row)
            entries = [e for line in of_row for e in found.entries[line[4] : line[5]].tolist()]
            assert entries == wanted and all(line[5] - line[4] <= part for line in of_row)
    queries = found.entries // (heads * n)
    assert torch.equal(found.queries, queries) and num_blocks * heads <= num_rows
