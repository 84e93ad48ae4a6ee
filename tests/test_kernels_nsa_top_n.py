"""The choice of blocks against its plain reference: odd widths, ties, rows of zeros, few and many free places."""

from __future__ import annotations

import pytest
import torch
from nsa_sizes import DEVICE, HAS_GPU
from torch import Tensor

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


@pytest.mark.parametrize("kind", ["even", "ties", "zeros", "wide", "sharp"])
@pytest.mark.parametrize(("n", "num_initial", "num_local"), SIZES)
def test_the_chosen_blocks_are_those_of_the_reference(
    n: int, num_initial: int, num_local: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(n)
    heads, block = 2, 4
    for width in (1, 13, 200, 513, 2048) if HAS_GPU else (1, 13, 70, 513):
        tokens, rows = width * block, min(width * block, 10 if width > 70 else 30)
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
        top_n(scores, index, positions, first, **sizes, overlap=False)
        expected = top_n_reference(scores[0][None], **sizes, num_selected=n, q_start=first)[0]
        assert torch.equal(index[first:], expected)
