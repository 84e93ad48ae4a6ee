"""Compile the dense, attention, expert and peer kernels for compute capability 9.0 on a machine without a GPU.

A branch of hopper_compile.py. The public functions are called with tensors of the CPU at the sizes of a model, and every
launch compiles its kernel instead. Prints what ptxas_report.py says of each launch, a line each. Without the word "all" of sizes that differ in nothing but width the widest are compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from ptxas_report import print_report
from torch import Tensor
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from sparseray.kernels import drafts, peer, peer_rounds, peer_rows
from sparseray.kernels.attention import decode, paged_write, prefill, recent_pages
from sparseray.kernels.dense import (
    adamw,
    draw,
    embedding,
    head_loss,
    most_probable,
    rms_norm,
    rope,
    squared_norm,
    sum_parts,
    swiglu,
)
from sparseray.kernels.dse import fusion, row_update, rows, staged_rows
from sparseray.kernels.moe import balance, expert_map, ffn, router, router_logits
from sparseray.kernels.moe import decode as decode_experts
from sparseray.kernels.moe.held_rounds import rows_of_held
from sparseray.kernels.nsa import append, compress, compress_backward, compress_step, inverse, top_n
from sparseray.kernels.nsa import decode as nsa_decode
from sparseray.kernels.nsa.geometry import uniform
from sparseray.kernels.paged import DraftDraws, DraftState, Draws, Pages
from sparseray.kernels.settings import NSASizes

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.float64: "fp64",
}


def kind(arg: Any) -> str:
    """The type of a run-time argument."""
    if isinstance(arg, TensorDescriptor):
        return f"tensordesc<{TYPES[arg.base.dtype]}{list(arg.block_shape)}>"
    if isinstance(arg, Tensor):
        return "*" + TYPES[arg.dtype]
    if arg is None or (isinstance(arg, int) and arg == 1):
        return "constexpr"
    return "fp32" if isinstance(arg, float) else "i64" if arg.bit_length() > 31 else "i32"


def compile_launch(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """Stands in for `launch_kernel`."""
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in named.items() if name in kernel.arg_names}
    signature = {name: kind(arg) for name, arg in zip(kernel.arg_names, args)} | dict.fromkeys(
        constants, "constexpr"
    )
    constants |= {n: a for n, a in zip(kernel.arg_names, args) if signature[n] == "constexpr"}
    aligned = [["tt.divisibility", 16]]
    attrs = {
        (i,): aligned
        for i, arg in enumerate(args)
        if isinstance(arg, Tensor) or (isinstance(arg, int) and arg % 16 == 0)
    }
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attrs
    )
    print_report(source, options)


def sizes(*narrow: Any, widest: Any) -> Iterator[Any]:
    """All of them where all are wanted, the widest otherwise."""
    yield from narrow if "all" in sys.argv else ()
    yield widest


def bf16(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def dense() -> None:
    R, H, I = 8, 1024, 2816
    weights, targets = torch.zeros(R), torch.zeros(R, dtype=torch.int64)
    for vocab in sizes(32768, widest=131072):
        head_loss.losses_and_gradients_(bf16(R, vocab), targets, weights, torch.empty(R), gradient=True)
    for width in (128, *sizes(H, 2048, widest=7168)):
        x, weight = bf16(R, width), torch.ones(width)
        out, total, rstd = rms_norm._forward(x, x, weight, 1e-6)
        for readers in (1, rms_norm.MOST_READERS):
            rms_norm._backward([out] * readers, x, total, weight, rstd)
    swiglu._launch(bf16(R, 2 * I), None, bf16(R, I))
    swiglu._launch(bf16(R, 2 * I), bf16(R, I), bf16(R, 2 * I))
    angles = (targets, torch.zeros(4096, 32), torch.zeros(4096, 32))
    for heads, width, start, is_interleaved in (((16, 16, 16), 64, 0, False), ((16, 0, 0), 192, 128, True)):
        parts = tuple(bf16(R, n, width) for n in heads)
        for is_backward in (False, True):
            rope._launch(bf16(R, sum(heads), width), parts, angles, start, is_interleaved, is_backward)
    slab = torch.zeros(64, H)
    for moments, gradient in ((torch.zeros(64, H), slab), (bf16(64, H), bf16(64, H))):
        adamw.adamw_step(
            slab, moments, moments.clone(), gradient, copy=bf16(64, H), scale=torch.tensor(1.0), lr=0.1, betas=(0.9, 0.95),
            eps=1e-8, weight_decay=0.1, step=1,
        )  # fmt: skip
    squared_norm.squared_norm([bf16(64, 4096), slab])
    embedding.embedding_grad_(slab, targets, bf16(R, H), accumulate=True)


def attention() -> None:
    lens, table = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 16, dtype=torch.int32)
    narrow = (16, 16, 64, 1), (64, 4, 128, 1)
    for heads, num_kv, width, new in sizes(*narrow, widest=(64, 4, 128, 8)):
        q, cache = bf16(2, new, heads, width), bf16(4, 64, num_kv, width)
        work = decode.PagedDecodeWorkspace.create(2, new, heads, width, 1024, "cpu")
        decode.paged_decode(q, cache, cache, table, lens, work, torch.empty_like(q))
    for heads, num_kv, width in sizes((16, 16, 64), widest=(64, 4, 128)):
        q, cache = bf16(512, heads, width), bf16(4, 256, num_kv, width)
        bounds = torch.zeros(3, dtype=torch.int32)
        prefill.paged_prefill(q, cache, cache, table, bounds, lens, torch.empty_like(q))


def drafting() -> None:
    """What a step with drafts computes between two passes of the network."""
    places = [torch.zeros(4, dtype=torch.int32) for _ in range(7)]
    state = DraftState(latest_S=places[0], draft_S=places[1], length_S=places[2])
    table = torch.zeros(4, 9, dtype=torch.int32)
    found = Pages(page=256, table_BW=table, context_lens_B=places[3], places_R=places[4], num_new=2)
    drafts.draft_rows(state, places[5], table, found, places[6], places[6])
    number = torch.zeros(8, dtype=torch.float64)
    each = DraftDraws(
        least_B=places[5],
        temperature_B=number[:4],
        min_p_B=number[:4],
        numbers_B4=number.repeat(2).view(4, 4),
    )
    for logits in (bf16(8, 32000), torch.zeros(8, 32000)):
        most_probable.most_probable(logits)
        draw.draw(logits, Draws(temperature_R=number, min_p_R=number, number_R=number))
        drafts.judge_drafts(logits, each, state, places[5], table, places[6])
        drafts.next_drafts(logits, each, table, state, places[5])


def pages() -> None:
    """What is written into the pages of a served sequence."""
    lens, table, places = (
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 16, dtype=torch.int32),
        bf16(2).int(),
    )
    for at in (places, places.long()):
        recent_pages.recent_pages(lens, table, at, torch.zeros_like(table), torch.zeros_like(at), 256)
    for num_kv, width in sizes((1, 64), widest=(4, 128)):
        cache, compressed = bf16(4, 256, num_kv, width), bf16(4, 16, num_kv, width)
        paged_write.paged_write(bf16(2, num_kv, width), bf16(2, num_kv, width), places, cache, cache)
        angle = torch.zeros(2, width // 2)
        fused = bf16(2, (16 + 2 * num_kv) * width)
        paged_write.rotary_write(fused, 16, angle, angle, places, cache, cache)
        weights = bf16(2 * width, 32 * width), bf16(2 * width), bf16(width, 2 * width), bf16(width)
        for angles in (None, (torch.zeros(64, width // 2), torch.zeros(64, width // 2))):
            compress_step.compress_step(
                cache, table, compressed, table, lens, places, *weights, block=32, stride=16, query_len=2, angles=angles
            )  # fmt: skip
        pools = [(compressed, compressed), *[(cache, cache)] * 3]
        fused, x, gate = bf16(2, (16 + 6 * num_kv) * width), bf16(2, 16 * width), bf16(48, 16 * width)
        where, sizes_of = ((places,) * 2, (table,) * 2, lens), {"query_len": 1, "block": 32, "stride": 16}
        append.write_rows(fused, 16, pools, (angle, angle), (places,) * 2)
        append.append_rows(fused, x, gate, pools, [weights] * 2, (angle, angle), angles, *where, **sizes_of)


def routers() -> None:
    few, many = (
        sizes((64, 1024, 64), widest=(1, 7168, 256)),
        sizes((4096, 2048, 64), widest=(4096, 7168, 256)),
    )
    for R, H, E in (*few, *many):
        logits = router_logits.router_logits(
            bf16(R, H).requires_grad_(), torch.zeros(E, H, requires_grad=True)
        )
        logits.sum().backward()


def selection() -> None:
    """Blocks of the queries of long sequences, the queries of each block, and the gradients of the compressor."""
    geometry = uniform(1, 4096, 255, 4096, 4096, 0, 0, torch.device("cpu"))
    for blocks, chosen in ((2048, 4), (2048, 16)):
        index = torch.zeros(4096, 1, chosen, dtype=torch.int32)
        top_n.top_n(
            torch.zeros(2, 16, 1, blocks), index, index[:, 0, 0], 0, select_block=16, num_initial=1, num_local=2, overlap=True
        )  # fmt: skip
    for blocks in (8, 64):
        inverse.invert_selection(index, geometry, select_block=blocks, chunk=4096, part=512)
    for width, hidden in sizes((64, 128), widest=(192, 384)):
        tables = compress.block_tables(1, 4096, 32, 16, torch.device("cpu"), cu_seqlens=None, num_blocks=None)
        weights = bf16(hidden, 32 * width), bf16(width, hidden), bf16(32, width)
        compress_backward.compress_backward(
            bf16(255, width), bf16(4096, 1, width), *weights, bf16(255, hidden), tables, block=32, stride=16
        )


def few_rows() -> None:
    """Routing of a few tokens, and native sparse attention from them to pages."""
    for T, E in sizes((1, 64), (64, 64), widest=(64, 256)):
        router.route(torch.zeros(T, E), top_k=6)
    nsa = NSASizes(block=32, stride=16, select_block=64, num_selected=16, window=512)
    single = (16, 16, 16, 256)
    for batch, heads, num_kv, page in (single, *sizes((1, 16, 16, 1024), widest=(16, 16, 4, 256))):
        pools = [(bf16(4, rows, num_kv, 64), bf16(4, rows, num_kv, 64)) for rows in (page // 16, page, page)]
        table, lens = (
            torch.zeros(batch, 65536 // page, dtype=torch.int32),
            torch.zeros(batch, dtype=torch.int32),
        )
        work = nsa_decode.DecodeWorkspace.create(batch, 1, heads, num_kv, 64, 65000, nsa, device="cpu")
        q, gates = bf16(batch, 1, heads, 64), bf16(batch, 1, heads, 3)
        nsa_decode.nsa_decode(q, gates, *pools, table, table, table, lens, work, torch.empty_like(q), nsa)


def experts() -> None:
    for H, I in sizes((1024, 512), widest=(2048, 1408)):
        T, E, K = 256, 4, 2
        x, up, down = bf16(T, H), bf16(E, 2 * I, H), bf16(E, H, I)
        config = ffn.HOPPER
        ids = torch.zeros(T, K, dtype=torch.int64)
        plan = expert_map.plan_experts(ids, E, tile_rows=config.m)
        act, pre = ffn.up_project(x, up, plan, config, save=True)
        ffn.project_rows(act, down, plan, config, config.down, transposed=True)
        dpre, weighted, _ = _activation_grad(x, pre, down, plan, config)
        ffn.project_rows(dpre, up, plan, config, config.input_grad, transposed=False)
        expert_map.count_experts(ids.clone(), E)
        balance._Balance.apply(torch.zeros(T, E, requires_grad=True), K, 1)[1].sum().backward()
        few = decode_experts.decode_config(16, x.dtype)
        ffn.up_project(x, up, expert_map.plan_experts(ids, E, tile_rows=few.m), few, save=False)
        for grads, out, first in ((dpre, up.float(), True), (weighted, down.float(), False)):
            ffn.weight_grad(grads, x, plan, config, rows_first=first, out=out, accumulate=True)


def few_tokens() -> None:
    """The experts of few rows: pairs of one or two, and the map of more in one launch."""
    for tokens, dtype, E, H, I, K in (
        (1, torch.bfloat16, 64, 1024, 512, 6),
        (2, torch.float32, 8, 128, 64, 2),
        (5, torch.bfloat16, 8, 128, 64, 2),
        (64, torch.bfloat16, 64, 1024, 512, 6),
        (64, torch.bfloat16, 64, 2048, 1408, 6),
    ):
        x, ids = torch.zeros(tokens, H, dtype=dtype), torch.zeros(tokens, K, dtype=torch.int64)
        up, down = torch.zeros(E, 2 * I, H, dtype=dtype), torch.zeros(E, H, I, dtype=dtype)
        decode_experts.moe_ffn_decode(x, ids, torch.zeros(tokens, K), up, down)
    decode_experts.plan_few_rows(torch.zeros(256, 6, dtype=torch.int64), 16, tile_rows=16)


def peers() -> None:
    flags, state = torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    order = torch.zeros(16, dtype=torch.int32)
    for source, into, places in (
        (bf16(16, 2048), bf16(32, 2048), order),
        (torch.zeros(16), torch.zeros(32), order),
    ):
        peer.put_rows(source, into, places, state)
        peer.put_rows(source, into, None, state)
        peer.put_all(source, flags, state)
        peer_rows.give_rows(source, places, order, flags, 8, 2048, state)
    peer_rows.give_sums(bf16(16, 2048), order, torch.zeros(16), order, flags, (4, 2, 2), 8192, state)
    owners = peer_rows.owners_of(torch.zeros(64, 6, dtype=torch.int32), torch.zeros(64, dtype=torch.int64))
    for is_beside in (False, True):
        peer_rows.put_tokens(bf16(64, 2048), owners, flags, state, beside=is_beside)
    peer_rows.sum_of_owners(bf16(64, 4, 2048), owners)
    peer.signal_all(flags, 2, 5 << 32, state)
    peer.signal(flags, 2, 5 << 32, state)
    peer.wait(flags, 0b101, 5 << 32, 6 << 32, state, order, 20.0)
    table, who = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for tokens in (0, 1, 8, 33):
        ids = torch.zeros(tokens, 6, dtype=torch.int32)
        peer_rounds.give(bf16(tokens, 2048), ids, 512, table, who, state)
    for field in (peer_rounds.OTHERS, peer_rounds.OWNERS):
        peer_rounds.say(7, field, table, who, state)
        peer_rounds.wait(7, field, flags, who, state, order, 20.0)
    peer_rounds.answer(bf16(16, 2048), order, order, 512 * 6, table, state)
    places = torch.zeros(2048, 6, dtype=torch.int32)
    rows_of_held(bf16(2048, 2048), places, bf16(32, 2816, 2048), bf16(32, 2048, 1408))


def _activation_grad(
    x: Tensor, pre: Tensor, down: Tensor, plan: Any, config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    plan.inverse_R.zero_()
    weights = torch.zeros(x.shape[0], plan.top_k)
    return ffn.activation_grad(x, pre, down, weights, plan, config)


def memory() -> None:
    """Staged rows of a table, and their fusion into the hidden state."""
    U, first = 8, torch.arange(9)
    small = first.int()
    narrow = (16, torch.bfloat16), (64, torch.bfloat16)
    for width, dtype in ((80, torch.float32), *sizes(*narrow, widest=(512, torch.bfloat16))):
        sums = rows.sum_segments(bf16(U, width), small[:-1], small)
        row_update.range_norms(sums, first)
        state = torch.zeros(U, width), torch.zeros(U), torch.zeros(U, dtype=torch.int64)
        fields = torch.zeros(U, width, dtype=dtype), *state
        row_update.row_adam(*fields, first[:-1], sums, scale=1.0, lr=0.1, betas=(0.9, 0.95), eps=1e-8, seed=3)
        staged_rows.take_rows(fields[0], small[:-1])
        staged_rows.take_newer(fields, first[:-1], fields, first[:-1])
    for hidden in sizes(1024, widest=2048):
        h, kv = bf16(2, 64, hidden), bf16(2, 64, 2 * hidden)
        norm = bf16(hidden)
        constants = {"dilation": 3, "gate_eps": 1e-6, "conv_eps": 1e-5}
        learnt = fusion._fusion(constants, (norm, norm, norm, bf16(hidden, 4)))
        for segment in (None, torch.zeros(2, 64, dtype=torch.int32)):
            out, kept, folded = fusion._forward(h, kv, learnt, segment)
            fusion._backward(out, h, kv, learnt, kept, folded, segment)


def main() -> None:
    modules = (
        adamw,
        embedding,
        head_loss,
        rms_norm,
        rope,
        squared_norm,
        sum_parts,
        swiglu,
        compress_backward,
        inverse,
        top_n,
        decode,
        paged_write,
        recent_pages,
        prefill,
        drafts,
        draw,
        most_probable,
        append,
        compress_step,
        ffn,
        decode_experts,
        expert_map,
        balance,
        router,
        nsa_decode,
        peer,
        peer_rows,
        peer_rounds,
        router_logits,
        fusion,
        row_update,
        rows,
        staged_rows,
    )
    for module in modules:
        module.launch_kernel = compile_launch
    dense()
    attention()
    drafting()
    pages()
    routers()
    selection()
    few_rows()
    experts()
    few_tokens()
    peers()
    memory()
