"""Full attention: grouped-query, causal, with rotary positions; its pages keep all keys and values.

Shapes: R rows, S positions, T tokens, G key/value heads, D and V head sizes, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.attention.protocol import Attention, AttentionFlops, new_pages, score_flops
from sparseray.model.config import ModelConfig
from sparseray.model.layers import Angles, Batch, Linear
from sparseray.model.paged import PageCounts


class FullPool:
    """Pages of keys and values, [pages, P, G, D] and [pages, P, G, V]."""

    def __init__(
        self, config: ModelConfig, num_pages: PageCounts, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pool = new_pages(config, num_pages.whole, page, dtype, device)

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return list(self.pool)


def _qkv_width(config: ModelConfig) -> int:
    heads, kv = config.num_heads, config.num_kv_heads
    return (heads + kv) * config.head_dim + kv * config.value_dim


class FullAttention(Attention):
    """Grouped-query attention with rotary positions."""

    takes_bounds = True

    def __init__(self, config: ModelConfig, layer: int, ops: Ops = REFERENCE) -> None:
        super().__init__(config, layer, ops)
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.value_dim = config.head_dim, config.value_dim
        self.qkv = Linear(config.hidden, _qkv_width(config), ops)
        self.out = Linear(self.heads * self.value_dim, config.hidden, ops)

    def forward(self, xs_RH: Sequence[Tensor], batch: Batch, angles: Angles) -> Tensor:
        """Attend within each sequence; [R, H]."""
        heads, turns, fused_RX = (
            (self.heads, self.kv_heads),
            (angles.cos_RD, angles.sin_RD),
            self.qkv(xs_RH[0], batch),
        )
        if batch.paged is not None:
            pool, pages = batch.paged.pools[self.layer], batch.paged.pages
            assert isinstance(pool, FullPool)
            q = self.ops.paged_rotary_write(pool.pool, fused_RX, heads, turns, pages)
            o = self.ops.paged_attend(q, pool.pool, pages)
        else:
            q, k, v = self.ops.rotary_split(fused_RX, heads, self.head_dim, 1, (self.value_dim,), *turns)
            o = self.ops.attend(*(x.unflatten(0, batch.shape) for x in (q, k, v))).flatten(0, 1)
        out: Tensor = self.out(o.flatten(1), batch)
        return out

    @classmethod
    def new_pool(
        cls, config: ModelConfig, num_pages: PageCounts, page: int, dtype: torch.dtype, device: torch.device
    ) -> FullPool:
        """Empty pages."""
        return FullPool(config, num_pages, page, dtype, device)

    @classmethod
    def num_parameters(cls, config: ModelConfig) -> int:
        """Parameters of a layer, all of them in matrices."""
        return config.hidden * (_qkv_width(config) + config.num_heads * config.value_dim)

    @classmethod
    def keys_per_query(cls, config: ModelConfig, seq_len: int) -> dict[str, float]:
        """Half of the sequence, and the query's own."""
        return {"full": (seq_len + 1) / 2}

    @classmethod
    def flops_per_token(cls, config: ModelConfig, seq_len: int) -> AttentionFlops:
        """Two projections, scores and values."""
        keys = cls.keys_per_query(config, seq_len)
        return AttentionFlops(linear=2.0 * cls.num_parameters(config), attention=score_flops(config, keys))
