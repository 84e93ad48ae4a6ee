"""Native sparse attention (NSA): the layer, its compressors, and what it keeps of a sequence.

NSA follows arXiv 2502.11089 section 3.3: compressed blocks, selected blocks and a sliding window, each with
its own keys and values (`shared_kv` makes them one), mixed by a sigmoid gate per head.

Position convention: keys are compressed BEFORE the rotary encoding, and a compressed key is then rotated at
the position of its block's first token. Serving therefore keeps the raw (unrotated) keys too.

Shapes: R rows, B sequences, T tokens, Q query heads, G key/value heads, D and V head sizes, C compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparseray.kernels.ops import REFERENCE, BranchKeys, Compression, Ops
from sparseray.model.attention.protocol import Attention, AttentionFlops, new_pages, score_flops
from sparseray.model.config import ModelConfig
from sparseray.model.layers import Angles, Batch, Linear
from sparseray.model.paged import PageCounts, Paged
from sparseray.model.statistics import is_collecting, note_attention


class NSAPool:
    """Pages of the three branches, and of the raw keys and values that are compressed.

    A page of compressed tokens has those of a page's tokens, so one table serves them and the selected branch. The window
    and the raw keys and values, which nobody reads once they are old, lie on recent pages.
    """

    def __init__(
        self, config: ModelConfig, num_pages: PageCounts, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        compressed = page // config.nsa.stride
        self.compressed = new_pages(config, num_pages.whole, compressed, dtype, device)
        self.selected = new_pages(config, num_pages.whole, page, dtype, device)
        self.window = new_pages(config, num_pages.recent, page, dtype, device)
        self.raw = new_pages(config, num_pages.recent, page, dtype, device)

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [*self.compressed, *self.selected, *self.window, *self.raw]


class Compressor(nn.Module):
    """phi of eq. 7: an MLP over a block's tokens with an intra-block position encoding."""

    def __init__(self, config: ModelConfig, width: int, ops: Ops) -> None:
        super().__init__()
        nsa = config.nsa
        inner = nsa.compress_hidden or 2 * width
        self.sizes, self.ops = nsa.sizes, ops
        self.pos = nn.Parameter(torch.empty(nsa.block, width))
        self.up = Linear(nsa.block * width, inner, ops, bias=True)
        self.down = Linear(inner, width, ops, bias=True)

    @property
    def phi(self) -> Compression:
        """The weights, as the operations take them."""
        up, down = self.up, self.down
        return Compression(w1=up.weight, b1=up.bias, w2=down.weight, b2=down.bias, pos=self.pos)

    def forward(self, x_BTGD: Tensor) -> Tensor:
        """Compress [B, T, G, D] to [B, C, G, D]."""
        return self.ops.compress(x_BTGD, self.phi, self.sizes)

    @classmethod
    def num_matrix_parameters(cls, config: ModelConfig, width: int) -> int:
        """Weights of the two layers."""
        inner = config.nsa.compress_hidden or 2 * width
        return inner * (config.nsa.block + 1) * width

    @classmethod
    def num_parameters(cls, config: ModelConfig, width: int) -> int:
        """Weights, biases and positions."""
        inner = config.nsa.compress_hidden or 2 * width
        return cls.num_matrix_parameters(config, width) + inner + width + config.nsa.block * width


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


def _num_branches(config: ModelConfig) -> int:
    return 1 if config.nsa.shared_kv else 3


def _qkv_width(config: ModelConfig) -> int:
    keys = config.num_kv_heads * _num_branches(config)
    return (config.num_heads + keys) * config.head_dim + keys * config.value_dim


class NSAttention(Attention):
    """Native sparse attention with independent keys and values per branch."""

    num_readers = 2

    def __init__(self, config: ModelConfig, layer: int, ops: Ops = REFERENCE) -> None:
        super().__init__(config, layer, ops)
        self.sizes = config.nsa.sizes
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.value_dim = config.head_dim, config.value_dim
        self.qkv = Linear(config.hidden, _qkv_width(config), ops)
        self.gate = Linear(config.hidden, 3 * self.heads, ops)
        self.compress_k = Compressor(config, self.head_dim, ops)
        self.compress_v = Compressor(config, self.value_dim, ops)
        self.out = Linear(self.heads * self.value_dim, config.hidden, ops)

    def project(self, xs_RH: Sequence[Tensor], batch: Batch, angles: Angles) -> Branches:
        """Queries, keys and values [R, heads, size] of all rows, and the gates [R, Q, 3]."""
        heads, widths = (self.heads, self.kv_heads), (self.head_dim, self.value_dim)
        qkv = self.qkv(xs_RH[0], batch)
        q, (slc, win, cmp) = self.ops.branch_rows(qkv, heads, widths, (angles.cos_RD, angles.sin_RD))
        return Branches(
            q=q,
            k_slc=slc[0],
            k_win=win[0],
            k_cmp=cmp[0],
            v_slc=slc[1],
            v_win=win[1],
            v_cmp=cmp[1],
            gates=self.ops.sigmoid(self.gate(xs_RH[1], batch)).view(-1, self.heads, 3),
        )

    def compress(self, k_BTGD: Tensor, v_BTGV: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Compressed keys, rotated at their blocks' first positions, and values."""
        k_BCGD, v_BCGV = self.compress_k(k_BTGD), self.compress_v(v_BTGV)
        count, stride = k_BCGD.shape[1], self.sizes.stride
        if count:
            at = slice(0, (count - 1) * stride + 1, stride)
            k_BCGD = self.ops.rotary(k_BCGD, angles.cos_PD[at], angles.sin_PD[at])
        return k_BCGD, v_BCGV

    def _attend(self, q_BTQD: Tensor, keys: BranchKeys, gates_BTQ3: Tensor) -> Tensor:
        if is_collecting():
            num_keys, positions_T = keys.k_slc.shape[1], torch.arange(q_BTQD.shape[1], device=q_BTQD.device)
            selected = self.ops.nsa_selection(q_BTQD, keys.k_cmp, num_keys, self.sizes)
            note_attention(self.layer, gates_BTQ3, selected, positions_T, self.sizes.select_block)
        return self.ops.nsa_attention(q_BTQD, keys, gates_BTQ3, self.sizes)

    def _attend_pages(self, xs_RH: Sequence[Tensor], batch: Batch, paged: Paged, angles: Angles) -> Tensor:
        """Append the rows to their pages and attend to them, [R, Q, V]."""
        pool, pages = paged.pools[self.layer], paged.pages
        assert isinstance(pool, NSAPool)
        branches = (pool.compressed, pool.selected, pool.window)
        q, gates = self.ops.paged_nsa_append(
            (*branches, pool.raw),
            self.qkv(xs_RH[0], batch),
            xs_RH[1],
            self.gate.weight,
            (self.compress_k.phi, self.compress_v.phi),
            self.sizes,
            (angles.cos_RD, angles.sin_RD),
            (angles.cos_PD, angles.sin_PD),
            pages,
        )
        return self.ops.paged_nsa_attention(q, gates, *branches, self.sizes, pages)

    def forward(self, xs_RH: Sequence[Tensor], batch: Batch, angles: Angles) -> Tensor:
        """Attend within each sequence; [R, H]."""
        if batch.paged is not None:
            o = self._attend_pages(xs_RH, batch, batch.paged, angles)
        else:
            b = self.project(xs_RH, batch, angles)
            shaped: dict[str, Tensor] = {
                name: torch.unflatten(x, 0, batch.shape) for name, x in vars(b).items()
            }
            s = Branches(**shaped)
            k_cmp, v_cmp = self.compress(s.k_cmp, s.v_cmp, angles)
            keys = BranchKeys(
                k_cmp=k_cmp, v_cmp=v_cmp, k_slc=s.k_slc, v_slc=s.v_slc, k_win=s.k_win, v_win=s.v_win
            )
            o = self._attend(s.q, keys, s.gates).flatten(0, 1)
        out: Tensor = self.out(o.flatten(1), batch)
        return out

    @classmethod
    def new_pool(
        cls, config: ModelConfig, num_pages: PageCounts, page: int, dtype: torch.dtype, device: torch.device
    ) -> NSAPool:
        """Empty pages."""
        return NSAPool(config, num_pages, page, dtype, device)

    @classmethod
    def page_overlap(cls, config: ModelConfig) -> int:
        # A compressed token lies on the page of its block's first token.
        return config.nsa.block - config.nsa.stride

    @classmethod
    def recent_reach(cls, config: ModelConfig) -> int:
        """The window, and what the tokens lack that complete a block with the row."""
        return max(config.nsa.window, config.nsa.block) - 1

    @classmethod
    def _projections(cls, config: ModelConfig) -> int:
        out = config.num_heads * config.value_dim
        return config.hidden * (_qkv_width(config) + 3 * config.num_heads + out)

    @classmethod
    def num_parameters(cls, config: ModelConfig) -> int:
        """Projections, gate and the two compressors."""
        widths = (config.head_dim, config.value_dim)
        return cls._projections(config) + sum(Compressor.num_parameters(config, width) for width in widths)

    @classmethod
    def keys_per_query(cls, config: ModelConfig, seq_len: int) -> dict[str, float]:
        """Of the compressed, the selected and the window branch.

        The selected count is of causal keys in whole blocks and the query's own; exact when num_local is at
        least 1.
        """
        sizes, t = config.nsa.sizes, np.arange(seq_len)
        compressed = np.maximum(0, (t + 1 - sizes.block) // sizes.stride + 1)
        # All selected blocks are whole but the query's own, which ends at the query.
        whole = np.minimum(t // sizes.select_block, sizes.num_selected - 1) * sizes.select_block
        selected = whole + t % sizes.select_block + 1
        return {
            "compressed": float(compressed.mean()),
            "selected": float(selected.mean()),
            "window": float(np.minimum(t + 1, sizes.window).mean()),
        }

    @classmethod
    def flops_per_token(cls, config: ModelConfig, seq_len: int) -> AttentionFlops:
        """Projections and gate; the compressors, which run once a stride and key/value head; scores and values."""
        blocks_per_token = config.nsa.sizes.num_compressed(seq_len) / seq_len
        widths = (config.head_dim, config.value_dim)
        compressors = sum(Compressor.num_matrix_parameters(config, width) for width in widths)
        linear = cls._projections(config) + compressors * config.num_kv_heads * blocks_per_token
        keys = cls.keys_per_query(config, seq_len)
        return AttentionFlops(linear=2 * linear, attention=score_flops(config, keys))
