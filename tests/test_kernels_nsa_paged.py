"""NSA kernels over paged caches against their plain reference: decoding, prefill, compression while decoding."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from nsa_sizes import DEVICE, HAS_GPU, PAPER, TINY, relative, small_tiles
from torch import Tensor

from sparseray.kernels.nsa import tuning
from sparseray.kernels.nsa.compress_step import compress_step
from sparseray.kernels.nsa.decode import DecodeWorkspace, nsa_decode
from sparseray.kernels.nsa.prefill import nsa_prefill, prefill_geometry
from sparseray.kernels.nsa.reference import compress_reference, nsa_attention_reference
from sparseray.kernels.settings import NSASizes, num_compressed

assert small_tiles  # A fixture of every test here.


def paged(rows: list[Tensor], page: int, fill: float = 7.0) -> tuple[Tensor, Tensor]:
    """A cache with shuffled pages and its block table."""
    counts = [-(-max(1, x.shape[0]) // page) for x in rows]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int().tolist()
    cache = torch.full((sum(counts), page, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    for b, x in enumerate(rows):
        for i in range(counts[b]):
            table[b, i] = order.pop()
            piece = x[i * page : (i + 1) * page]
            cache[table[b, i], : piece.shape[0]] = piece
    return cache, table


def decode_error(
    lens: list[int], query_len: int, heads: tuple[int, int], dims: tuple[int, int], sizes: NSASizes,
    page: int,
    dtype: torch.dtype,
    key_scale: float = 1.0,
) -> float:  # fmt: skip
    """Error of the second of two steps that share a workspace; both give the same bits."""
    (HQ, H), (D, Dv) = heads, dims
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(lens), query_len, HQ, D, generator=generator).to(dtype)
    gates = torch.rand(len(lens), query_len, HQ, 3, generator=generator).to(dtype)
    counts = [num_compressed(s, sizes.block, sizes.stride) for s in lens]
    kinds = [(counts, D), (counts, Dv), (lens, D), (lens, Dv), (lens, D), (lens, Dv)]
    # Rounded before the reference sees them too: rounding alone would make it select other blocks.
    rows = [[torch.randn(n, H, d, generator=generator).to(dtype) for n in ns] for ns, d in kinds]
    rows[0] = [x * key_scale for x in rows[0]]
    wanted = torch.cat(
        [
            nsa_attention_reference(
                q[b : b + 1].double(), *[x[b][None].double() for x in rows], gates[b : b + 1].double(),
                sizes, q_start=s - query_len,
            )
            for b, s in enumerate(lens)
        ]
    )  # fmt: skip
    caches = [(c.to(DEVICE), t.to(DEVICE)) for c, t in (paged(x, page) for x in rows)]
    pairs = [(caches[i][0], caches[i + 1][0]) for i in (0, 2, 4)]
    workspace = DecodeWorkspace.create(len(lens), query_len, HQ, H, Dv, max(lens), sizes, device=DEVICE)
    outs = []
    for _ in range(2):
        out = torch.full((len(lens), query_len, HQ, Dv), float("nan"), device=DEVICE, dtype=dtype)
        nsa_decode(
            q.to(DEVICE), gates.to(DEVICE), *pairs, caches[0][1], caches[2][1], caches[4][1],
            torch.tensor(lens, dtype=torch.int32, device=DEVICE), workspace, out, sizes,
        )  # fmt: skip
        outs.append(out.cpu())
    assert torch.equal(*outs)
    return relative(outs[1], wanted)


@pytest.mark.parametrize("page", [16, 64, 12])
def test_decode_over_shuffled_pages_matches_the_reference(page: int) -> None:
    assert decode_error([170, 70, 9, 3], 1, (4, 2), (16, 16), TINY, page, torch.float32) < 1e-5


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("page", "sizes"), [(16, TINY), (64, TINY), (12, TINY), (24, replace(TINY, select_block=12))]
)
def test_decode_of_heads_with_a_key_each(page: int, sizes: NSASizes) -> None:
    assert decode_error([170, 70, 9, 3], 1, (3, 3), (24, 12), sizes, page, torch.float32) < 1e-5


@pytest.mark.parametrize("page", [8, 64])
def test_decode_of_several_tokens_selects_for_each_of_them(page: int) -> None:
    sizes = replace(TINY, select_block=8, num_selected=3, window=20)
    assert decode_error([150, 33], 3, (3, 1), (24, 12), sizes, page, torch.float32) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(("piece", "num_selected"), [(4, 6), (8, 5)])
@pytest.mark.parametrize("key_scale", [1.0, 0.0])
def test_decode_over_several_pieces_of_scores(
    monkeypatch: pytest.MonkeyPatch, piece: int, num_selected: int, key_scale: float
) -> None:
    """Keys of 0 give all blocks of full tiles the same score: ties go to the lower block."""
    sizes = replace(TINY, num_selected=num_selected)
    for name, heads, query_len in (("decode", (4, 2), 2), ("decode_single", (2, 2), 1)):
        monkeypatch.setitem(tuning.LAUNCH[name], "piece", piece)
        monkeypatch.setitem(tuning.LAUNCH[name], "best", 10**6)
        error = decode_error([230, 70, 9], query_len, heads, (16, 16), sizes, 16, torch.float32, key_scale)
        assert error < 1e-5


def test_decode_where_too_many_blocks_are_kept_to_compare_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.LAUNCH["decode"], "piece", 8)
    monkeypatch.setitem(tuning.LAUNCH["decode"], "best", 10**6)
    sizes = replace(TINY, select_block=8, num_selected=20)
    assert decode_error([2500], 1, (2, 1), (16, 16), sizes, 64, torch.float32) < 1e-5


@pytest.mark.long
def test_decode_of_the_last_tokens_of_128k(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, launch in {"decode": {"piece": 512, "keys": 64}}.items():
        monkeypatch.setitem(tuning.LAUNCH, name, tuning.LAUNCH[name] | launch)
    assert decode_error([1 << 17, (1 << 17) - 5], 2, (2, 1), (16, 16), PAPER, 64, torch.float32) < 1e-5


def test_decode_where_a_block_is_no_power_of_two_of_strides() -> None:
    sizes = replace(TINY, select_block=12, num_selected=4)
    assert decode_error([150, 33], 2, (4, 2), (16, 16), sizes, 24, torch.float32) < 1e-5


@pytest.mark.parametrize("num_selected", [3, 8])
def test_prefill_of_chunks_of_different_lengths_over_pages_matches_the_reference(num_selected: int) -> None:
    """Eight blocks hold every sequence, so the selected branch is dense; three do not."""
    sizes = replace(TINY, num_selected=num_selected)
    lens, chunks, page, (HQ, H), (D, Dv) = [61, 7, 40, 5], [23, 7, 1, 0], 8, (4, 2), (24, 12)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(chunks), HQ, D, generator=generator)
    gates = torch.rand(sum(chunks), HQ, 3, generator=generator)
    counts = [num_compressed(s, 8, 4) for s in lens]
    kinds = [(counts, D), (counts, Dv), (lens, D), (lens, Dv), (lens, D), (lens, Dv)]
    rows = [[torch.randn(n, H, d, generator=generator) for n in ns] for ns, d in kinds]
    cu = [0, *itertools.accumulate(chunks)]
    wanted = torch.cat(
        [
            nsa_attention_reference(
                q[None, cu[b] : cu[b + 1]].double(), *[x[b][None].double() for x in rows],
                gates[None, cu[b] : cu[b + 1]].double(), sizes, q_start=lens[b] - chunks[b],
            )[0]
            for b in range(3)
        ]
    )  # fmt: skip
    caches = [paged(x, page, fill=float("nan")) for x in rows]
    tables = [caches[i][1].clone() for i in (0, 2, 4)]
    for b in range(len(lens)):
        tables[2][b, : max(0, lens[b] - chunks[b] - sizes.window + 1) // page] = -(10**6)
    pages = [(caches[i][0].to(DEVICE), caches[i + 1][0].to(DEVICE)) for i in (0, 2, 4)]
    cmp_table, slc_table, win_table = (t.to(DEVICE) for t in tables)
    moved = (cmp_table, slc_table, win_table)
    lengths = (torch.tensor(cu, device=DEVICE), torch.tensor(lens, device=DEVICE))
    made = prefill_geometry(*lengths, moved, tokens=sum(chunks), page=page, sizes=sizes)
    for geometry in (None, made, made):  # Two layers of a step share it.
        found = nsa_prefill(
            q.to(DEVICE), gates.to(DEVICE), *pages, *moved, *lengths, sizes, geometry=geometry
        )
        assert relative(found.cpu(), wanted) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("query_len", [1, 8])
def test_decode_in_half_precision(query_len: int) -> None:
    error = decode_error([1000, 70, 33], query_len, (64, 4), (128, 128), PAPER, 64, torch.bfloat16)
    assert error < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("page", [64, 256])
def test_decode_of_heads_with_a_key_each_in_half_precision(page: int) -> None:
    assert decode_error([4100, 1000, 70, 33], 1, (16, 16), (64, 64), PAPER, page, torch.bfloat16) < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("tiles", [16, 32])
def test_decode_where_a_part_has_as_many_pages_as_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], tiles: int
) -> None:
    """Tiles are fetched ahead; what was looked up for those beyond the last lay beyond the table in shared memory."""
    for name in ("decode", "decode_single"):
        monkeypatch.setitem(tuning.LAUNCH[name], "splits", 1)
    tokens = tiles * tuning.LAUNCH["decode"]["keys"] * PAPER.stride
    assert decode_error([tokens], 1, heads, (64, 64), PAPER, 16, torch.bfloat16) < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_decode_of_the_largest_batch() -> None:
    lens = [33 + 37 * b % 1900 for b in range(256)]
    assert decode_error(lens, 2, (64, 4), (128, 128), PAPER, 64, torch.bfloat16) < 5e-3


def compressed_step_by_step(
    dtype: torch.dtype, sizes: tuple[int, int], tokens: int, new: tuple[int, int]
) -> float:
    """Largest relative error of tokens compressed some at a time, against all at once.

    Of two sequences each gets as many new tokens as `new` says until it has them all; what no later block has in it is NaN
    before they are compressed.
    """
    block, stride = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, 2, 12), (20, block * 12), (20,), (10, 20), (10,)]
    x, w1, bias, w2, b2 = (torch.randn(*s, generator=generator) * 0.3 for s in shapes)
    count = num_compressed(tokens, block, stride)
    cache, table = paged(list(x), 4)
    compressed, compressed_table = paged([torch.zeros(count, 2, 10)] * 2, 4)
    moved = [t.to(DEVICE, dtype) for t in (cache, compressed, w1, bias, w2, b2)]
    lens, of_rows = [0, 0], moved[0].flatten(0, 1)
    while min(lens) < tokens:
        before, lens = lens, [min(tokens, n + more) for n, more in zip(lens, new)]
        for b, length in enumerate(before):
            for i in range(max(0, length - block + 1)):
                of_rows[int(table[b, i // 4]) * 4 + i % 4] = torch.nan
        bounds = torch.tensor([0, *(n - old for n, old in zip(lens, before))]).cumsum(0).int()
        compress_step(
            moved[0], table.to(DEVICE), moved[1], compressed_table.to(DEVICE),
            torch.tensor(lens, dtype=torch.int32, device=DEVICE), bounds.to(DEVICE), *moved[2:], block=block, stride=stride,
            query_len=max(new),
        )  # fmt: skip
    wanted = compress_reference(*(t.double() for t in (x, w1, bias, w2, b2)), None, block, stride)
    pages = [moved[1].cpu()[compressed_table[b]].flatten(0, 1)[:count] for b in range(2)]
    return relative(torch.stack(pages), wanted)


@pytest.mark.parametrize(("tokens", "new"), [(14, (1, 1)), (18, (3, 3)), (19, (7, 2)), (18, (18, 5))])
def test_compression_some_tokens_at_a_time_equals_compression_at_once(
    tokens: int, new: tuple[int, int]
) -> None:
    """In company of a sequence with more new tokens, what came before its own is not read again: it may be gone."""
    assert compressed_step_by_step(torch.float32, (4, 2), tokens, new) < 1e-5


def test_decode_of_several_tokens_of_a_large_group_takes_several_programs() -> None:
    sizes = replace(TINY, select_block=8, num_selected=3)
    assert decode_error([28], 3, (24, 1), (16, 16), sizes, 16, torch.float32) < 1e-5
