"""NSA kernels against their plain reference: outputs, gradients, selection, packed sequences."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa_sizes import DEVICE, HAS_GPU, PAPER, TINY, TINY_SPARSE, relative, small_tiles
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.nsa import branches, inverse
from sparseray.kernels.nsa.attention import nsa_attention, nsa_layer
from sparseray.kernels.nsa.branches import selects_all
from sparseray.kernels.nsa.compress import compress
from sparseray.kernels.nsa.geometry import query_positions, uniform
from sparseray.kernels.nsa.pipeline import Attended, Forced
from sparseray.kernels.nsa.range_forward import LOG2E
from sparseray.kernels.nsa.reference import (
    Compression,
    compress_reference,
    compressed_attention_reference,
    nsa_attention_reference,
    selection_scores_reference,
    top_n_reference,
)
from sparseray.kernels.nsa.selected_by_block import selected_by_block
from sparseray.kernels.nsa.selected_forward import selected_forward, selected_query_gradient
from sparseray.kernels.settings import NSASizes, num_compressed

assert small_tiles  # A fixture of every test here.


def draw(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    compressed: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    (HQ, H), (D, Dv) = heads, dims
    found = [normal(batch, tokens, HQ, D), normal(batch, compressed, H, D), normal(batch, compressed, H, Dv)]
    for _ in range(2):
        found += [normal(batch, tokens, H, D), normal(batch, tokens, H, Dv)]
    gates = torch.rand(batch, tokens, HQ, 3, generator=generator).to(DEVICE, dtype)
    gates[0, 0, 0, 0] = 0.0
    return [*found, gates]


def outputs_and_gradients(call: Any, inputs: list[Tensor], weight: Tensor | None = None) -> list[Tensor]:
    out = call(*inputs)
    weight = torch.cos(torch.arange(out.numel(), device=DEVICE)).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


def compare(inputs: list[Tensor], sizes: NSASizes, bound: float, cu: list[int] | None = None) -> None:
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    cu_seqlens = None if cu is None else torch.tensor(cu, device=DEVICE)

    def reference(q: Tensor, kc: Tensor, vc: Tensor, *rest: Tensor) -> Tensor:
        if cu is None:
            return nsa_attention_reference(q, kc, vc, *rest, sizes)
        parts, first = [], 0
        for a, b in itertools.pairwise(cu):
            n = num_compressed(b - a, sizes.block, sizes.stride)
            cut = [x[:, a:b] for x in rest]
            c = slice(first, first + n)
            parts.append(nsa_attention_reference(q[:, a:b], kc[:, c], vc[:, c], *cut, sizes))
            first += n
        return torch.cat(parts, 1)

    found = outputs_and_gradients(lambda *x: nsa_attention(*x, sizes, cu_seqlens=cu_seqlens), ours)
    wanted = outputs_and_gradients(reference, exact)
    errors = [relative(a, b) for a, b in zip(found, wanted)]
    assert all(error < bound for error in errors), errors


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dims", "sizes"),
    [
        pytest.param(1, 67, (2, 1), (16, 16), TINY, id="more blocks than selected"),
        pytest.param(2, 15, (3, 1), (24, 12), replace(TINY, select_block=12), id="dense, split head size"),
        pytest.param(1, 26, (3, 1), (24, 12), TINY_SPARSE, id="odd sizes"),
        pytest.param(1, 5, (2, 2), (16, 8), TINY, id="shorter than a block"),
    ],
)
def test_attention_matches_the_reference_in_outputs_and_gradients(
    batch: int, tokens: int, heads: tuple[int, int], dims: tuple[int, int], sizes: NSASizes
) -> None:
    count = num_compressed(tokens, sizes.block, sizes.stride)
    compare(draw(batch, tokens, heads, dims, count, torch.float32), sizes, 1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    cu = [0, 3, 3, 16, 26]
    count = sum(num_compressed(b - a, 8, 4) for a, b in itertools.pairwise(cu))
    compare(draw(1, 26, (2, 1), (16, 16), count, torch.float32), TINY_SPARSE, 1e-5, cu)


def test_chunk_against_longer_keys_equals_the_full_call() -> None:
    tokens, start = 45, 21
    q, kc, vc, ks, vs, kw, vw, gates = draw(1, tokens, (2, 1), (16, 16), 10, torch.float32)
    full = nsa_attention_reference(q, kc, vc, ks, vs, kw, vw, gates, TINY)
    first = start - TINY.window + 1
    chunk = nsa_attention(
        q[:, start:], kc, vc, ks, vs, kw[:, first:], vw[:, first:], gates[:, start:], TINY, q_start=start,
        win_start=first,
    )  # fmt: skip
    torch.testing.assert_close(chunk, full[:, start:], rtol=1e-5, atol=1e-5)


def test_dense_and_selected_kernels_agree_where_every_block_is_selected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []
    for is_dense in (True, False):
        monkeypatch.setattr(branches, "selects_all", lambda *args, is_dense=is_dense, **kwargs: is_dense)
        inputs = [x.requires_grad_() for x in draw(1, 19, (2, 1), (16, 16), 3, torch.float32)]
        runs.append(outputs_and_gradients(lambda *x: nsa_attention(*x, TINY), inputs))
    assert max(relative(a, b) for a, b in zip(*runs)) < 1e-5


@pytest.mark.one_in(3)
@pytest.mark.parametrize("select_block", [8, 24, 32])
def test_selected_branch_by_block_and_by_query_agree(
    monkeypatch: pytest.MonkeyPatch, select_block: int
) -> None:
    forced = {"num_selected": 2, "num_initial": 0, "num_local": 1}
    tokens, sizes = 2 * select_block + 1, replace(TINY_SPARSE, select_block=select_block, **forced)
    tensors = draw(1, tokens, (2, 1), (24, 12), num_compressed(tokens, 8, 4), torch.float32)
    found = []
    for below in (1, 64):
        monkeypatch.setattr(inverse, "BY_BLOCK_BELOW", below)
        inputs = [x.clone().requires_grad_() for x in tensors]
        found.append(outputs_and_gradients(lambda *x: nsa_attention(*x, sizes), inputs))
    assert max(relative(a, b) for a, b in zip(*found)) < 1e-5


@pytest.mark.parametrize("num_initial", [0, 1])
@pytest.mark.parametrize("num_local", [1, 2])
def test_free_blocks_add_to_what_the_forced_ones_gave(num_initial: int, num_local: int) -> None:
    """By query, by block, and in the query gradient: the forced blocks from plain PyTorch, the others from the kernels."""
    tokens, heads, width, block = 37, 2, 16, 8
    geometry = uniform(1, tokens, 8, tokens, tokens, 0, 0, torch.device(DEVICE))
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (heads, width),
        (1, width),
        (1, width),
        (heads, width),
        (heads, width),
        (heads, width),
        (heads, 3),
    ]
    q, k, v, o_cmp, o_win, do, gates = (
        torch.randn(tokens, *shape, generator=generator).to(DEVICE) for shape in shapes
    )
    scores = torch.rand(1, tokens, 1, -(-tokens // block), generator=generator).to(DEVICE)
    index = top_n_reference(
        scores, select_block=block, num_selected=4, num_initial=num_initial, num_local=num_local
    )[0]
    positions = query_positions(geometry)
    t, p = torch.arange(tokens, device=DEVICE)[:, None], torch.arange(tokens, device=DEVICE)[None]
    seen = (p <= t) & ((p < num_initial * block) | (p >= (t // block - num_local + 1) * block))
    logits = torch.einsum("thd,sd->ths", q, k[:, 0]) * width**-0.5 * LOG2E
    masked = logits.masked_fill(~seen[:, None], -torch.inf)
    lse = torch.logsumexp(masked / LOG2E, -1) * LOG2E
    weights = torch.exp2(masked - lse[..., None])
    attended = Attended(
        out=torch.einsum("ths,sd->thd", weights, v[:, 0]),
        lse=lse,
        num_initial=num_initial,
        num_local=num_local,
    )
    rest = (q, k, v, index, positions, geometry, (o_cmp, o_win), gates)
    sizes: dict[str, Any] = {"select_block": block, "scale": width**-0.5}
    for run in (selected_forward, selected_by_block):
        whole, added = run(*rest, **sizes, keep=True), run(*rest, **sizes, keep=True, forced=attended)
        assert max(relative(a, b) for a, b in zip(added, whole)) < 1e-5
    row_lse, row_dg = whole[2], torch.randn(tokens, heads, generator=generator).to(DEVICE)
    found = []
    for forced in (None, Forced(k=k, v=v, select_block=block, num_initial=num_initial, num_local=num_local)):
        dq = torch.empty_like(q)
        selected_query_gradient(
            q, k, v, do, row_lse, row_dg, dq, index, positions, geometry, **sizes, add=False, forced=forced
        )
        found.append(dq)
    weights = torch.exp2(masked - row_lse[..., None])
    grads = weights * (torch.einsum("thd,sd->ths", do, v[:, 0]) - row_dg[..., None])
    left_out = torch.einsum("ths,sd->thd", grads, k[:, 0]) * width**-0.5
    assert relative(found[1] + left_out, found[0]) < 1e-5


def test_same_inputs_give_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        inputs = [x.requires_grad_() for x in draw(1, 25, (2, 1), (16, 16), 5, torch.float32)]
        runs.append(outputs_and_gradients(lambda *x: nsa_attention(*x, TINY_SPARSE), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_fold_of_scores_counts_overlapping_blocks() -> None:
    probs = torch.arange(1.0, 13.0).view(1, 1, 1, 1, 12)
    scores = selection_scores_reference(probs, block=32, stride=16, select_block=64, num_blocks=3)
    p = [0.0, *probs.flatten().tolist()]
    for j in range(3):
        expected = p[4 * j] + 2 * (p[4 * j + 1] + p[4 * j + 2] + p[4 * j + 3]) + p[4 * j + 4]
        assert scores.flatten()[j] == expected


def test_ties_go_to_the_lower_block_and_forced_blocks_are_always_read() -> None:
    index = top_n_reference(torch.zeros(1, 1, 1, 8), select_block=4, num_selected=5, q_start=31)
    assert index.flatten().tolist() == [0, 1, 2, 6, 7]
    early = top_n_reference(torch.zeros(1, 1, 1, 8), select_block=4, num_selected=5, q_start=5)
    assert early.flatten().tolist() == [0, 1, -1, -1, -1]


def test_queries_before_the_first_block_get_zero_and_no_nan() -> None:
    q, kc, vc, *_ = draw(1, 12, (2, 1), (8, 8), 2, torch.float32)
    out, lse, _ = compressed_attention_reference(q, kc, vc, block=8, stride=4)
    assert torch.equal(out[:, :7], torch.zeros_like(out[:, :7]))
    assert torch.isinf(lse[:, :7]).all()


def test_sizes_that_the_equations_do_not_define_are_refused() -> None:
    inputs = draw(1, 12, (2, 1), (16, 16), 2, torch.float32)
    with pytest.raises(ConfigError, match="stride=3 must divide"):
        nsa_attention(*inputs, replace(TINY, stride=3))
    mlp = Compression(
        w1=torch.ones(4, 8 * 16, device=DEVICE),
        b1=None,
        w2=torch.ones(16, 4, device=DEVICE),
        b2=None,
        pos=None,
    )
    q, _, _, k, v, k_win, v_win, gates = inputs
    with pytest.raises(ConfigError, match="stride=0"):
        nsa_layer(q, k, v, k, v, k_win, v_win, gates, replace(TINY, stride=0), keys=mlp, values=mlp)


@pytest.mark.parametrize(
    ("cu", "width", "has_bias"),
    [
        pytest.param(None, 12, True, id="batch"),
        pytest.param([0, 3, 20, 30], 12, True, id="packed"),
        pytest.param([0, 9, 19], 24, False, id="split head size, no bias"),
    ],
)
def test_compression_matches_the_reference(cu: list[int] | None, width: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 30 if cu is None else cu[-1]
    shapes = [(1 if cu else 2, tokens, 2, width), (20, 8 * width), (20,), (10, 20), (10,), (8, width)]
    shapes = shapes if has_bias else [shapes[0], shapes[1], shapes[3]]
    inputs = [torch.randn(*s, generator=generator).to(DEVICE) for s in shapes]
    ours, exact = [x.clone().requires_grad_() for x in inputs], [x.double().requires_grad_() for x in inputs]
    boundaries = None if cu is None else torch.tensor(cu, device=DEVICE)
    spans = [(0, tokens)] if cu is None else list(itertools.pairwise(cu))

    def all_weights(x: Tensor, *w: Tensor) -> tuple[Tensor | None, ...]:
        return (x, *w) if has_bias else (x, w[0], None, w[1], None, None)

    found = outputs_and_gradients(lambda *x: compress(*all_weights(*x), 8, 4, cu_seqlens=boundaries), ours)
    wanted = outputs_and_gradients(
        lambda x, *w: torch.cat([compress_reference(*all_weights(x[:, a:b], *w), 8, 4) for a, b in spans], 1),
        exact,
    )
    assert max(relative(a, b) for a, b in zip(found, wanted)) < 1e-5


@pytest.mark.one_in(2)
@pytest.mark.parametrize("cu", [None, [0, 25, 27, 34]])
def test_the_layer_equals_its_three_calls_to_the_bit(cu: list[int] | None) -> None:
    tokens = 27 if cu is None else cu[-1]
    q, _, _, k, v, k_win, v_win, gates = draw(1, tokens, (2, 1), (24, 12), 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    shapes = [(20, 8 * 24), (20,), (24, 20), (24,), (8, 24), (16, 8 * 12), (12, 16)]
    weights = [torch.randn(s, generator=generator).to(DEVICE) * 0.1 for s in shapes]
    inputs = [x.requires_grad_() for x in (q, k, v, k_win, v_win, gates, *weights)]
    cu_seqlens = None if cu is None else torch.tensor(cu, device=DEVICE)

    def layer(*x: Tensor) -> Tensor:
        keys = Compression(w1=x[6], b1=x[7], w2=x[8], b2=x[9], pos=x[10])
        values = Compression(w1=x[11], b1=None, w2=x[12], b2=None, pos=None)
        return nsa_layer(
            x[0], x[1], x[2], *x[1:6], TINY_SPARSE, keys=keys, values=values, cu_seqlens=cu_seqlens
        )

    def calls(*x: Tensor) -> Tensor:
        k_cmp = compress(x[1], *x[6:11], 8, 4, cu_seqlens=cu_seqlens)
        v_cmp = compress(x[2], x[11], None, x[12], None, None, 8, 4, cu_seqlens=cu_seqlens)
        return nsa_attention(x[0], k_cmp, v_cmp, *x[1:6], TINY_SPARSE, cu_seqlens=cu_seqlens)

    found, wanted = (outputs_and_gradients(call, inputs) for call in (layer, calls))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    with torch.no_grad():
        assert torch.equal(layer(*inputs), wanted[0])


def test_short_sequences_take_the_dense_kernel_and_long_ones_do_not() -> None:
    assert selects_all(64, select_block=16, num_selected=4)
    assert not selects_all(65, select_block=16, num_selected=4)


def check_end_of_long_sequence(tokens: int, heads: int, width: int, sizes: NSASizes) -> None:
    """The last queries of a sequence, and their gradient, are those of a chunk that has nothing else."""
    count, last = num_compressed(tokens, sizes.block, sizes.stride), 3 * sizes.select_block
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    torch.manual_seed(0)
    q, k_cmp, v_cmp, k, v, gates = (
        torch.randn(1, n, h, d, device=DEVICE, dtype=dtype)
        for n, h, d in (
            (tokens, heads, width), (count, 1, width), (count, 1, width), (tokens, 1, width), (tokens, 1, width),
            (tokens, heads, 3),
        )
    )  # fmt: skip
    gates = gates.sigmoid()
    found = []
    for start in (0, tokens - last):
        ours = q[:, start:].clone().requires_grad_()
        out = nsa_attention(ours, k_cmp, v_cmp, k, v, k, v, gates[:, start:], sizes, q_start=start)
        weight = torch.zeros_like(out)
        weight[:, -last:] = 1.0
        out.backward(weight)
        assert ours.grad is not None
        found.append((out.detach()[:, -last:].double(), ours.grad[:, -last:].double()))
    for whole, chunk in zip(*found):
        assert relative(whole, chunk) < (1e-3 if HAS_GPU else 1e-5)


def test_the_end_of_a_sequence_equals_a_chunk_of_its_own() -> None:
    check_end_of_long_sequence(53, 2, 16, TINY_SPARSE)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_offsets_beyond_the_range_of_32_bits() -> None:
    tokens = 262_400
    assert tokens * 64 * 128 > 2**31
    check_end_of_long_sequence(tokens, 64, 128, PAPER)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((64, 4), (128, 128)),
        ((32, 8), (128, 128)),
        ((16, 1), (192, 128)),
        ((12, 2), (96, 64)),
        ((64, 1), (64, 64)),
    ],
)
@pytest.mark.parametrize("is_dense", [False, True])
def test_half_precision_at_real_sizes(
    monkeypatch: pytest.MonkeyPatch,
    is_dense: bool,
    dtype: torch.dtype,
    heads: tuple[int, int],
    dims: tuple[int, int],
) -> None:
    """Every block is selected, so that no near tie decides; by the dense kernel and by the selecting ones."""
    monkeypatch.setattr(branches, "selects_all", lambda *args, **kwargs: is_dense)
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-3
    compare(draw(1, 777, heads, dims, num_compressed(777, 32, 16), dtype), PAPER, bound)
