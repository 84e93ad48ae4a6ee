"""Compiled operations of a CPU against the plain ones at odd sizes; a row's bits never depend on its company."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseray.kernels.compiled_ops import COMPILED
from sparseray.kernels.moe import cpu as moe
from sparseray.kernels.ops import REFERENCE, Compression, Fusion, History, KeyValues, Pages, Recent
from sparseray.kernels.settings import NSASizes

TINY = NSASizes(block=16, stride=8, select_block=16, num_selected=4, window=32)
ODD = NSASizes(block=8, stride=4, select_block=12, num_selected=3, window=7, num_local=1)
FREE = NSASizes(block=4, stride=4, select_block=8, num_selected=2, window=1, num_initial=0, num_local=1)
# Loops are compiled for each pair of head sizes; the second pair is that of a model in test_model_cache.py.
SHAPES = [(TINY, 32, (8, 2), (16, 16)), (ODD, 24, (4, 2), (16, 12)), (FREE, 8, (3, 3), (10, 13))]
LENS, NEW = [150, 1, 33, 70, 8], [40, 1, 33, 1, 3]


@pytest.fixture(autouse=True)
def no_gradient() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@dataclass
class Case:
    """Sequences with shuffled pages; NaN wherever nothing may be read."""

    lens: list[int]
    new: list[int]
    page: int
    heads: tuple[int, int]
    dims: tuple[int, int]

    def __post_init__(self) -> None:
        per = -(-max(self.lens) // self.page)
        self.table, self.recent = (
            torch.randperm(len(self.lens) * per).int().view(len(self.lens), per) for _ in range(2)
        )

    def cache(self, width: int, shrink: int = 1, reach: int | None = None) -> Tensor:
        """With NaN after the end; with a reach on recent pages, and before what the first new row reads of them."""
        size, table = self.page // shrink, self.table if reach is None else self.recent
        cache = torch.randn(table.numel(), size, self.heads[1], width)
        for b, (length, new) in enumerate(zip(self.lens, self.new)):
            first = 0 if reach is None else max(0, length - new - reach)
            for i in range(table.shape[1]):
                cache[int(table[b, i]), max(0, length // shrink - i * size) :] = torch.nan
                cache[int(table[b, i]), : max(0, first - i * size)] = torch.nan
        return cache

    def pool(self, shrink: int = 1, reach: int | None = None) -> KeyValues:
        return self.cache(self.dims[0], shrink, reach), self.cache(self.dims[1], shrink, reach)

    def pages(self, chosen: list[tuple[int, int, int]]) -> Pages:
        """The (sequence, first, last) positions of some chunks."""
        sizes = [last - first for _, first, last in chosen]
        ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        contexts = [last for _, _, last in chosen]
        return Pages(
            page=self.page,
            table_BW=self.table[[b for b, _, _ in chosen]],
            context_lens_B=torch.tensor(contexts, dtype=torch.int32),
            places_R=torch.zeros(ends[-1], dtype=torch.int64),
            recent=Recent(
                recent_P=torch.zeros(0, dtype=torch.int32),
                table_BW=self.recent[[b for b, _, _ in chosen]],
                places_R=torch.zeros(ends[-1], dtype=torch.int64),
            ),
            chunks=tuple((a, b, c) for (a, b), c in zip(pairwise(ends), contexts)),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        )

    @property
    def whole(self) -> list[tuple[int, int, int]]:
        return [(b, length - new, length) for b, (length, new) in enumerate(zip(self.lens, self.new))]

    def ways(self) -> list[list[tuple[int, int, int]]]:
        """Other calls with the same rows: sequences in other orders, chunks cut elsewhere, single tokens."""
        halves = [(b, first, first + (last - first) // 2) for b, first, last in self.whole]
        rests = [(b, mid, last) for (b, _, mid), (_, _, last) in zip(halves, self.whole)]
        ones = [(b, p, p + 1) for b, first, last in self.whole for p in range(first, last)]
        return [
            self.whole[::-1],
            [c for c in halves + rests if c[1] < c[2]],
            ones[::3] + ones[1::3] + ones[2::3],
        ]

    def rows(self, chosen: list[tuple[int, int, int]]) -> list[int]:
        """Rows of `whole` in the order of some chunks."""
        begin = {b: sum(self.new[:b]) - first for b, first, _ in self.whole}
        return [begin[b] + p for b, first, last in chosen for p in range(first, last)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("sizes", "page", "heads", "dims"), SHAPES)
def test_attention_over_pages_is_the_plain_one_and_no_row_depends_on_its_company(
    sizes: NSASizes, page: int, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    case = Case(LENS, NEW, page, heads, dims)
    q, gates = torch.randn(sum(NEW), heads[0], dims[0]), torch.rand(sum(NEW), heads[0], 3)
    pools = case.pool(sizes.stride), case.pool(), case.pool(1, sizes.window - 1)
    full = case.pool()
    for name in ("full", "sparse"):

        def run(ops: object, chosen: list[tuple[int, int, int]], name: str = name) -> Tensor:
            rows, pages = case.rows(chosen), case.pages(chosen)
            if name == "full":
                return ops.paged_attend(q[rows], full, pages)  # type: ignore[attr-defined, no-any-return]
            return ops.paged_nsa_attention(q[rows], gates[rows], *pools, sizes, pages)  # type: ignore[attr-defined, no-any-return]

        found = run(COMPILED, case.whole)
        torch.testing.assert_close(found, run(REFERENCE, case.whole), rtol=1e-5, atol=1e-5)
        for way in case.ways():
            assert torch.equal(run(COMPILED, way), found[case.rows(way)])


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(("sizes", "page", "heads", "dims"), SHAPES)
def test_compression_over_pages_is_the_plain_one_however_a_prompt_is_cut(
    sizes: NSASizes, page: int, heads: tuple[int, int], dims: tuple[int, int], turns: bool
) -> None:
    case, width = Case(LENS, LENS, page, heads, dims), dims[0]
    inner, raw = 2 * width, case.cache(width, 1, sizes.block - 1)
    phi = Compression(
        w1=torch.randn(inner, sizes.block * width) / 8,
        b1=torch.randn(inner),
        w2=torch.randn(width, inner) / 4,
        b2=torch.randn(width),
        pos=torch.randn(sizes.block, width),
    )
    angles = (torch.randn(150, width // 2), torch.randn(150, width // 2)) if turns else None

    def run(ops: object, calls: list[list[tuple[int, int, int]]]) -> Tensor:
        out = torch.full((raw.shape[0], page // sizes.stride, heads[1], width), 7.0)
        for call in calls:
            ops.paged_compress(raw, out, phi, sizes, case.pages(call), angles)  # type: ignore[attr-defined]
        return out

    found = run(COMPILED, [case.whole])
    torch.testing.assert_close(found, run(REFERENCE, [case.whole]), rtol=1e-4, atol=1e-5)
    for way in case.ways():
        assert torch.equal(run(COMPILED, [[chunk] for chunk in sorted(way)]), found)


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_products_norms_and_activations_are_the_plain_ones_and_each_row_is_computed_alone(rows: int) -> None:
    x, weight, bias = torch.randn(rows, 45), torch.randn(31, 45), torch.randn(31)
    cos, sin = torch.randn(rows, 4), torch.randn(rows, 4)
    fused, gate_up = torch.randn(rows, 5 * 8 + 7), torch.randn(rows, 26) * 4
    operations = {
        "linear": lambda o, i: o.linear(x[i], weight, bias, invariant=True),
        "logits": lambda o, i: o.logits(x[i], weight),
        "rms_norm": lambda o, i: o.rms_norm(x[i], weight[0], 1e-6),
        "add_rms_norm": lambda o, i: torch.cat(o.add_rms_norm(x[i], x[i] * 2, weight[0], 1e-6)),
        "rotary": lambda o, i: torch.cat(
            [y.flatten(1) for y in o.rotary_split(fused[i], (3, 1), 8, 2, (5, 2), cos[i], sin[i])], 1
        ),
        "swiglu": lambda o, i: o.swiglu(gate_up[i]),
        "sigmoid": lambda o, i: o.sigmoid(gate_up[i]),
    }
    every = list(range(rows))
    for name, operation in operations.items():
        found = operation(COMPILED, every)
        torch.testing.assert_close(found, operation(REFERENCE, every), rtol=1e-5, atol=1e-5, msg=name)
        for row in every if name != "add_rms_norm" else []:
            assert torch.equal(operation(COMPILED, [row])[0], found[row]), name


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("v3", {}),
        ("v3", {"num_groups": 4, "topk_groups": 2, "scaling": 2.5}),
        ("v3", {"num_groups": 4, "topk_groups": 2, "group_scores": 0, "normalize": False}),
        ("v2", {"num_groups": 3, "topk_groups": 2, "scaling": 1.5}),
        ("v2", {"normalize": True}),
        ("gshard", {"top_k": 2}),
        ("switch", {"top_k": 1}),
    ],
)
def test_routing_is_the_plain_one(router: str, options: dict[str, object]) -> None:
    logits, bias = torch.randn(9, 12), torch.randn(12) / 4
    logits[3], logits[4, 5:] = 0.0, 2.0
    bias[6:] = 0.125
    settings = {"top_k": 4, "num_groups": 1, "topk_groups": 1, "group_scores": 2, "normalize": None}
    settings |= {"scaling": 1.0, "bias_E": bias if router == "v3" else None, "router": router, **options}
    found, wanted = COMPILED.route(logits, **settings), REFERENCE.route(logits, **settings)  # type: ignore[arg-type]
    assert torch.equal(found[0], wanted[0])
    for ours, theirs in zip(found[1:], wanted[1:]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    alone = COMPILED.route(logits[5:6], **settings)  # type: ignore[arg-type]
    assert all(torch.equal(one[0], many[5]) for one, many in zip(alone, found))


def test_experts_are_the_plain_ones_and_a_row_does_not_depend_on_the_others() -> None:
    x, gate_up, down = torch.randn(7, 30), torch.randn(5, 22, 30) / 4, torch.randn(5, 30, 11) / 4
    rows, asked = torch.tensor([0, 6, 2, 1, 0, 3, 4, 5, 2]), [(3, 2), (0, 1), (4, 6)]
    found = COMPILED.expert_rows(x, rows, asked, gate_up, down)
    wanted = REFERENCE.expert_rows(x, rows, asked, gate_up, down)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for row, place in enumerate([3, 3, 0, 4, 4, 4, 4, 4, 4]):
        alone = COMPILED.expert_rows(x[rows[row], None], torch.tensor([0]), [(place, 1)], gate_up, down)
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("has_starts", [True, False])
def test_memory_fusion_is_the_plain_one_however_a_prompt_is_cut(has_starts: bool) -> None:
    case, H, taps, dilation = Case(LENS, LENS, 8, (1, 1), (2, 2)), 21, 3, 2
    total = sum(LENS)
    h, key_value = torch.randn(total, H), torch.randn(total, 2 * H)
    key_value[5, :H] = 0.0
    fusion = Fusion(
        query_norm_C=torch.randn(H),
        key_norm_C=torch.randn(H),
        value_norm_C=torch.randn(H),
        conv_CK=torch.randn(H, taps),
        dilation=dilation,
        gate_eps=1e-5,
        conv_eps=1e-6,
    )
    starts = (torch.rand(total) < 0.1) if has_starts else None

    def run(ops: object, calls: list[list[tuple[int, int, int]]]) -> tuple[Tensor, Tensor]:
        out, memory = torch.empty(total, H), torch.zeros(7, (taps - 1) * dilation, H)
        for call in calls:
            rows, slots = case.rows(call), tuple(b + 1 for b, _, _ in call)
            history = History(memory, torch.tensor(slots, dtype=torch.int32), slots)
            at = None if starts is None else starts[rows]
            pages = case.pages(call)
            out[rows] = ops.paged_memory_fusion(h[rows], key_value[rows], fusion, history, pages, at)  # type: ignore[attr-defined]
        return out, memory

    found = run(COMPILED, [case.whole])
    for ours, theirs in zip(found, run(REFERENCE, [case.whole])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for way in case.ways():
        assert all(map(torch.equal, run(COMPILED, [[chunk] for chunk in sorted(way)]), found))
    # While decoding, rows of all sequences go through together.
    singles = [[(b, p, p + 1) for b in range(len(LENS)) if p < LENS[b]] for p in range(max(LENS))]
    assert all(map(torch.equal, run(COMPILED, singles), found))


@pytest.mark.parametrize("length", [1 << 17, (1 << 17) - 5])
def test_sparse_attention_reaches_back_over_128k_tokens(length: int) -> None:
    """The last tokens of a text of 131,072: on pages of 64 in any order, with the paper's sizes."""
    sizes = NSASizes(block=32, stride=16, select_block=64, num_selected=16, window=512)
    case = Case([length], [3], 64, (2, 1), (16, 16))
    q, gates = 3 * torch.randn(3, 2, 16), torch.rand(3, 2, 3)
    pools = case.pool(sizes.stride), case.pool(), case.pool(1, sizes.window - 1)
    found = COMPILED.paged_nsa_attention(q, gates, *pools, sizes, case.pages(case.whole))
    wanted = REFERENCE.paged_nsa_attention(q, gates, *pools, sizes, case.pages(case.whole))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for cache in pools[1]:
        cache[case.table[0, 1 : length // 128].long()] += 1.0
    changed = COMPILED.paged_nsa_attention(q, gates, *pools, sizes, case.pages(case.whole))
    assert not torch.equal(changed, found), "blocks of the first half are among those that it selects"


def test_damage_is_seen() -> None:
    case = Case([40, 40], [1, 1], 16, (4, 2), (8, 8))
    pools = case.pool(TINY.stride), case.pool(), case.pool(1, 4)
    q, gates = torch.randn(2, 4, 8), torch.rand(2, 4, 3)
    sizes = replace(TINY, window=5)
    for pool, table in zip(pools, (case.table, case.table, case.recent)):
        for cache in pool:
            kept = cache.clone()
            cache[table[1]] = torch.nan
            found = COMPILED.paged_nsa_attention(q, gates, *pools, sizes, case.pages(case.whole))
            assert found[0].isfinite().all() and found[1].isnan().any()
            cache.copy_(kept)


@pytest.mark.parametrize("gap", [0, 1, 3, 8, 64])
def test_bits_do_not_depend_on_where_arrays_lie(gap: int) -> None:
    logits = np.random.default_rng(0).normal(size=16).astype(np.float32)
    apart = np.empty(16, np.float32)
    moe.score_experts(logits, False, apart)
    room = np.empty(256, np.float32)
    room[:16] = logits
    near = room[16 + gap : 32 + gap]
    moe.score_experts(room[:16], False, near)
    assert np.array_equal(near, apart)
