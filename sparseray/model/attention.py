"""The attention of one layer: full (grouped-query, RoPE) or native sparse attention (NSA).

NSA follows arXiv 2502.11089 section 3.3: compressed blocks, selected blocks and a sliding window, each with
its own keys and values (`shared_kv` makes them one), mixed by a sigmoid gate per head. The attention itself
is `kernels/nsa/reference.py`.

Position convention: keys are compressed BEFORE the rotary encoding, and a compressed key is then rotated at
the position of its block's first token. Chunked prefill therefore keeps the raw (unrotated) keys of the block
that is not complete yet.

Shapes: R rows, B sequences, T tokens, Q query heads, G key/value heads, D and V head sizes, C compressed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseray.kernels.nsa.reference import compress_reference, select_reference
from sparseray.model.cache import FullCache, NSACache
from sparseray.model.config import ModelConfig, NSAConfig
from sparseray.model.layers import Batch, Linear, Span, rope_tables, rotate
from sparseray.model.statistics import is_collecting, note_attention


def _attend_masked(q_BTQD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, mask: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        q_BTQD.transpose(1, 2),
        k_BSGD.transpose(1, 2),
        v_BSGV.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def selected_mask(indices_BTGN: Tensor, positions_T: Tensor, num_keys: int, select_block: int) -> Tensor:
    """Keys that each query sees through its selected blocks, causally.

    Args:
        indices_BTGN: block numbers, -1 for an unused slot.
        positions_T: absolute positions of the queries.
        num_keys: keys, from position 0.
        select_block: tokens per block.

    Returns:
        bool [B, G, T, S].
    """
    B, T, G, _ = indices_BTGN.shape
    blocks = -(-num_keys // select_block)
    slots = torch.where(indices_BTGN < 0, blocks, indices_BTGN).long()
    chosen = torch.zeros(B, T, G, blocks + 1, dtype=torch.bool, device=slots.device).scatter_(-1, slots, True)
    keys_S = torch.arange(num_keys, device=slots.device)
    mask = chosen[..., :blocks].repeat_interleave(select_block, dim=-1)[..., :num_keys]
    return mask.transpose(1, 2) & (keys_S <= positions_T[:, None])


def nsa_attention(
    q_BTQD: Tensor,
    kv: tuple[Tensor, ...],
    gates_BTQ3: Tensor,
    config: NSAConfig,
    *,
    q_start: int = 0,
    win_start: int = 0,
    layer: int = -1,
) -> Tensor:
    """The gated sum of the three branches.

    Compression and selection are the reference's; the two other branches run as masked attention, so that a
    training step on a CPU keeps no probabilities. Equal to `nsa_attention_reference` up to rounding.

    Args:
        q_BTQD: rotated queries at positions q_start, q_start + 1, ...
        kv: keys and values of the compressed, selected and window branches, [B, length, G, D | V] each.
        gates_BTQ3: fp32 in [0, 1].
        config: block sizes.
        win_start: position of the first window key.
        layer: number under which statistics are noted.

    Returns:
        [B, T, Q, V] in the dtype of q.

    Source: arXiv 2502.11089 eq. 5 and 7-12.
    """
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = kv
    group = q_BTQD.shape[2] // k_slc.shape[2]
    positions_T = torch.arange(q_start, q_start + q_BTQD.shape[1], device=q_BTQD.device)
    o_cmp, indices = select_reference(
        q_BTQD,
        k_cmp,
        v_cmp,
        k_slc.shape[1],
        block=config.block,
        stride=config.stride,
        select_block=config.select_block,
        num_selected=config.num_selected,
        num_initial=config.num_initial,
        num_local=config.num_local,
        q_start=q_start,
    )
    if is_collecting():
        note_attention(layer, gates_BTQ3, indices, positions_T, config.select_block)
    mask_BGTS = selected_mask(indices, positions_T, k_slc.shape[1], config.select_block)
    o_slc = _attend_masked(q_BTQD, k_slc, v_slc, mask_BGTS.repeat_interleave(group, dim=1))
    keys_S = torch.arange(win_start, win_start + k_win.shape[1], device=q_BTQD.device)
    distance_TS = positions_T[:, None] - keys_S
    o_win = _attend_masked(q_BTQD, k_win, v_win, (distance_TS >= 0) & (distance_TS < config.window))
    g_cmp, g_slc, g_win = gates_BTQ3.unsqueeze(-2).unbind(-1)
    return (g_cmp * o_cmp + g_slc * o_slc.float() + g_win * o_win.float()).to(q_BTQD.dtype)


class Rope(nn.Module):
    """Cosines and sines for every position, shared by the layers; not part of the state."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        cos, sin = rope_tables(config.max_seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, D / 2] at the positions."""
        return self.cos[positions_T], self.sin[positions_T]


def attend_full(q_BTQD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> Tensor:
    """Causal attention of the last T of S positions, [B, T, Q, V]."""
    T, S = q_BTQD.shape[1], k_BSGD.shape[1]
    mask = None
    if T != S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BTQD.device).tril(S - T)
    out = F.scaled_dot_product_attention(
        q_BTQD.transpose(1, 2),
        k_BSGD.transpose(1, 2),
        v_BSGV.transpose(1, 2),
        attn_mask=mask,
        is_causal=T == S,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


class FullAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.value_dim = config.head_dim, config.value_dim
        self.rotated = self.heads + self.kv_heads
        width = self.rotated * self.head_dim + self.kv_heads * self.value_dim
        self.qkv = Linear(config.hidden, width)
        self.out = Linear(self.heads * self.value_dim, config.hidden)

    def forward(self, x_RH: Tensor, batch: Batch, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Attend within each sequence; [R, H]."""
        split = self.rotated * self.head_dim
        qkv = self.qkv(x_RH, batch)
        qk = rotate(qkv[:, :split].unflatten(-1, (self.rotated, self.head_dim)), *rope)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        v = qkv[:, split:].unflatten(-1, (self.kv_heads, self.value_dim))
        if batch.spans is None:
            o = attend_full(*(x.unflatten(0, batch.shape) for x in (q, k, v))).flatten(0, 1)
        else:
            o = x_RH.new_zeros(x_RH.shape[0], self.heads, self.value_dim)
            for span in batch.spans:
                cache, rows = span.cache.layers[self.layer], slice(span.start, span.stop)
                assert isinstance(cache, FullCache)
                keys, values = cache.append(span.cache.length, k[rows], v[rows])
                o[rows] = attend_full(q[rows][None], keys[None], values[None])[0]
        out: Tensor = self.out(o.flatten(1), batch)
        return out


class Compressor(nn.Module):
    """phi of eq. 7: an MLP over a block's tokens with an intra-block position encoding."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        nsa = config.nsa
        inner = nsa.compress_hidden or 2 * width
        self.block, self.stride = nsa.block, nsa.stride
        self.pos = nn.Parameter(torch.empty(nsa.block, width))
        self.up = nn.Module()
        self.up.weight = nn.Parameter(torch.empty(inner, nsa.block * width))
        self.up.bias = nn.Parameter(torch.empty(inner))
        self.down = nn.Module()
        self.down.weight = nn.Parameter(torch.empty(width, inner))
        self.down.bias = nn.Parameter(torch.empty(width))

    def forward(self, x_BTGD: Tensor) -> Tensor:
        """Compress [B, T, G, D] to [B, C, G, D]."""
        up, down = self.up, self.down
        return compress_reference(
            x_BTGD,
            up.weight,  # type: ignore[arg-type]
            up.bias,  # type: ignore[arg-type]
            down.weight,  # type: ignore[arg-type]
            down.bias,  # type: ignore[arg-type]
            self.pos,
            self.block,
            self.stride,
        )


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Keys and values of the rows for the three branches; `cmp` ones are raw, the others rotated."""

    q: Tensor
    k_slc: Tensor
    k_win: Tensor
    k_cmp: Tensor
    v_slc: Tensor
    v_win: Tensor
    v_cmp: Tensor
    gates: Tensor


class NSAttention(nn.Module):
    """Native sparse attention with independent keys and values per branch."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config.nsa
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.value_dim = config.head_dim, config.value_dim
        self.branches = 1 if config.nsa.shared_kv else 3
        keys = self.branches * self.kv_heads
        self.qkv = Linear(config.hidden, (self.heads + keys) * self.head_dim + keys * self.value_dim)
        self.gate = Linear(config.hidden, 3 * self.heads)
        self.compress_k = Compressor(config, self.head_dim)
        self.compress_v = Compressor(config, self.value_dim)
        self.out = Linear(self.heads * self.value_dim, config.hidden)

    def project(self, x_RH: Tensor, batch: Batch, rope: tuple[Tensor, Tensor]) -> Branches:
        """Queries, keys and values [R, heads, size] of all rows, and the gates [R, Q, 3]."""
        heads, kv = self.heads, self.kv_heads
        keys = self.branches * kv
        qkv = self.qkv(x_RH, batch)
        split = (heads + keys) * self.head_dim
        qk = qkv[:, :split].unflatten(-1, (heads + keys, self.head_dim))
        v = qkv[:, split:].unflatten(-1, (keys, self.value_dim))
        turned = heads + min(2, self.branches) * kv
        roped = rotate(qk[:, :turned], *rope)
        return Branches(
            q=roped[:, :heads],
            k_slc=roped[:, heads : heads + kv],
            k_win=roped[:, turned - kv : turned],
            k_cmp=qk[:, heads + keys - kv :],
            v_slc=v[:, :kv],
            v_win=v[:, min(1, self.branches - 1) * kv :][:, :kv],
            v_cmp=v[:, keys - kv :],
            gates=torch.sigmoid(self.gate(x_RH, batch).float()).view(-1, heads, 3),
        )

    def compress(self, k_BTGD: Tensor, v_BTGV: Tensor, rope: Rope, first: int = 0) -> tuple[Tensor, Tensor]:
        """Compressed keys, rotated at their blocks' first positions, and values; `first` is their index."""
        k_BCGD, v_BCGV = self.compress_k(k_BTGD), self.compress_v(v_BTGV)
        count, stride = k_BCGD.shape[1], self.config.stride
        if count:
            stop = (first + count - 1) * stride + 1
            k_BCGD = rotate(
                k_BCGD, rope.cos[first * stride : stop : stride], rope.sin[first * stride : stop : stride]
            )
        return k_BCGD, v_BCGV

    def _attend_span(self, b: Branches, span: Span, rope: Rope) -> Tensor:
        """One chunk against its cache, [T, Q, V]."""
        rows, length = slice(span.start, span.stop), span.cache.length
        cache = span.cache.layers[self.layer]
        assert isinstance(cache, NSACache)
        k_raw, v_raw, first = cache.tail(length, b.k_cmp[rows], b.v_cmp[rows])
        k_new, v_new = self.compress(k_raw[None], v_raw[None], rope, first)
        k_cmp, v_cmp = cache.append_compressed(first, k_new[0], v_new[0])
        k_slc, v_slc = cache.append_selection(length, b.k_slc[rows], b.v_slc[rows])
        k_win, v_win, win_start = cache.append_window(length, b.k_win[rows], b.v_win[rows])
        kv = tuple(x[None] for x in (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win))
        q, gates = b.q[rows][None], b.gates[rows][None]
        return nsa_attention(
            q, kv, gates, self.config, q_start=length, win_start=win_start, layer=self.layer
        )[0]

    def forward(self, x_RH: Tensor, batch: Batch, rope: tuple[Tensor, Tensor], tables: Rope) -> Tensor:
        """Attend within each sequence; [R, H]."""
        b = self.project(x_RH, batch, rope)
        if batch.spans is None:
            shaped: dict[str, Tensor] = {
                name: torch.unflatten(x, 0, batch.shape) for name, x in vars(b).items()
            }
            s = Branches(**shaped)
            k_cmp, v_cmp = self.compress(s.k_cmp, s.v_cmp, tables)
            kv = (k_cmp, v_cmp, s.k_slc, s.v_slc, s.k_win, s.v_win)
            o = nsa_attention(s.q, kv, s.gates, self.config, layer=self.layer).flatten(0, 1)
        else:
            o = x_RH.new_zeros(x_RH.shape[0], self.heads, self.value_dim)
            for span in batch.spans:
                o[span.start : span.stop] = self._attend_span(b, span, tables)
        out: Tensor = self.out(o.flatten(1), batch)
        return out
