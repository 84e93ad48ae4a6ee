"""Multi-head latent attention (MLA): keys and values of all heads come from one small vector a token.

Follows arXiv 2405.04434 section 2.1 and the released code of DeepSeek-V2 and V3: rotary channels lie in pairs
(2i, 2i + 1), the two inner norms have an eps of their own, and under YaRN the scores have the factor mscale^2.
The cache keeps the normed latent and the rotated part of the key, which all heads share. With a cache the
matrices that make keys and values of a latent are applied to the query and to the result instead (section 2.1.2):
what is left is attention with one key/value head, whose value is the first part of its key.

Shapes: R rows, Q heads, N channels without position, P with, V value size, C latent, K = C + P, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.attention.protocol import Attention, AttentionFlops
from sparseray.model.config import ModelConfig
from sparseray.model.layers import Angles, Batch, Linear, RMSNorm
from sparseray.model.paged import PageCounts, Paged
from sparseray.model.yarn import score_scale

LATENT_EPS = 1e-6
"""Of the two inner norms; as released, whatever the model's `norm_eps` is."""


class LatentPool:
    """Pages of latents and rotated keys, [pages, P, 1, K]."""

    def __init__(
        self, config: ModelConfig, num_pages: PageCounts, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pool = torch.zeros(num_pages.whole, page, 1, config.mla.cache_width, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.pool]


class MLAttention(Attention):
    """Latent attention with decoupled rotary positions."""

    num_readers = 2

    def __init__(self, config: ModelConfig, layer: int, ops: Ops = REFERENCE) -> None:
        super().__init__(config, layer, ops)
        mla, hidden, heads = config.mla, config.hidden, config.num_heads
        self.sizes, self.heads = mla, heads
        if mla.q_lora_rank is None:
            self.q = Linear(hidden, heads * mla.qk_head_dim, ops)
        else:
            self.q_down = Linear(hidden, mla.q_lora_rank, ops)
            self.q_norm = RMSNorm(mla.q_lora_rank, LATENT_EPS, ops)
            self.q_up = Linear(mla.q_lora_rank, heads * mla.qk_head_dim, ops)
        self.kv_down = Linear(hidden, mla.cache_width, ops)
        self.kv_norm = RMSNorm(mla.kv_lora_rank, LATENT_EPS, ops)
        self.kv_up = Linear(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim), ops)
        self.out = Linear(heads * mla.v_head_dim, hidden, ops)
        self.magnitude = score_scale(config.rope)
        self.scale = self.magnitude / math.sqrt(mla.qk_head_dim)

    def _queries(self, x_RH: Tensor, batch: Batch, angles: Angles) -> Tensor:
        """Queries whose last channels are rotated, [R, Q, N + P]."""
        if self.sizes.q_lora_rank is None:
            q_RX = self.q(x_RH, batch)
        else:
            q_RX = self.q_up(self.q_norm(self.q_down(x_RH, batch)), batch)
        q_RQD = q_RX.unflatten(-1, (self.heads, -1))
        return self.ops.rotary_pairs(q_RQD, self.sizes.qk_nope_head_dim, angles.cos_RD, angles.sin_RD)

    def _attend(self, q_BTQD: Tensor, latent_RC: Tensor, k_R1P: Tensor, batch: Batch) -> Tensor:
        """Attend to the keys and values of latents of B sequences, [B, T, Q, V]."""
        widths = (self.sizes.qk_nope_head_dim, self.sizes.v_head_dim)
        k_RQN, v_RQV = self.kv_up(latent_RC, batch).unflatten(-1, (self.heads, -1)).split(widths, -1)
        k = torch.cat([k_RQN, k_R1P.expand(-1, self.heads, -1)], -1)
        k_BSQD, v_BSQV = (x.unflatten(0, (len(q_BTQD), -1)) for x in (k, v_RQV))
        # `Ops.attend` divides by the root of the width.
        return self.ops.attend(q_BTQD * self.magnitude, k_BSQD, v_BSQV)

    def _attend_pages(
        self, q_RQD: Tensor, x_RK: Tensor, batch: Batch, angles: Angles, paged: Paged
    ) -> Tensor:
        """Append the rows to their pages and attend to what is there, [R, Q, V]."""
        pool, pages, ops, sizes = paged.pools[self.layer], paged.pages, self.ops, self.sizes
        assert isinstance(pool, LatentPool)
        turns = angles.cos_RD, angles.sin_RD
        ops.paged_latent_append(pool.pool, x_RK, self.kv_norm.weight, LATENT_EPS, turns, pages)
        if ops.expands_latents and pages.chunks is not None:
            o_RQV = q_RQD.new_empty(*q_RQD.shape[:2], sizes.v_head_dim)
            for rows, latents_BS1K in ops.paged_latents(pool.pool, pages):
                parts = latents_BS1K.flatten(0, 1).split((sizes.kv_lora_rank, sizes.qk_rope_head_dim), -1)
                q_BTQD = q_RQD[rows].unflatten(0, (len(latents_BS1K), -1))
                o_RQV[rows] = self._attend(q_BTQD, parts[0][:, 0], parts[1], batch).flatten(0, 1)
            return o_RQV
        q_RQN, q_RQP = q_RQD.split((sizes.qk_nope_head_dim, sizes.qk_rope_head_dim), -1)
        widths = (sizes.qk_nope_head_dim, sizes.v_head_dim)
        up_QNC, up_QVC = self.kv_up.weight.unflatten(0, (self.heads, -1)).split(widths, 1)
        q_RQC = ops.linear_by_head(q_RQN, up_QNC.transpose(1, 2))
        o_RQC = ops.paged_latent_attend(q_RQC, q_RQP, pool.pool, self.scale, pages)
        return ops.linear_by_head(o_RQC, up_QVC)

    def forward(self, xs_RH: Sequence[Tensor], batch: Batch, angles: Angles) -> Tensor:
        """Attend within each sequence; [R, H]."""
        assert angles.latent is not None
        turns, sizes = angles.latent, self.sizes
        q_RQD, x_RK = self._queries(xs_RH[0], batch, turns), self.kv_down(xs_RH[1], batch)
        if batch.paged is not None:
            o_RQV = self._attend_pages(q_RQD, x_RK, batch, turns, batch.paged)
        else:
            latent_RC, k_RP = x_RK.split((sizes.kv_lora_rank, sizes.qk_rope_head_dim), -1)
            k_R1P = self.ops.rotary_pairs(k_RP[:, None], 0, turns.cos_RD, turns.sin_RD)
            q_BTQD = q_RQD.unflatten(0, batch.shape)
            o_RQV = self._attend(q_BTQD, self.kv_norm(latent_RC), k_R1P, batch).flatten(0, 1)
        out: Tensor = self.out(o_RQV.flatten(1), batch)
        return out

    @classmethod
    def new_pool(
        cls, config: ModelConfig, num_pages: PageCounts, page: int, dtype: torch.dtype, device: torch.device
    ) -> LatentPool:
        """Empty pages."""
        return LatentPool(config, num_pages, page, dtype, device)

    @classmethod
    def _projections(cls, config: ModelConfig) -> int:
        """Parameters in matrices."""
        mla, hidden, heads = config.mla, config.hidden, config.num_heads
        query, rank = heads * mla.qk_head_dim, mla.q_lora_rank
        queries = hidden * query if rank is None else rank * (hidden + query)
        up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return queries + hidden * mla.cache_width + up + heads * mla.v_head_dim * hidden

    @classmethod
    def num_parameters(cls, config: ModelConfig) -> int:
        """Projections and the inner norms."""
        return cls._projections(config) + (config.mla.q_lora_rank or 0) + config.mla.kv_lora_rank

    @classmethod
    def keys_per_query(cls, config: ModelConfig, seq_len: int) -> dict[str, float]:
        """Half of the sequence, and the query's own."""
        return {"latent": (seq_len + 1) / 2}

    @classmethod
    def flops_per_token(cls, config: ModelConfig, seq_len: int) -> AttentionFlops:
        """Projections, and scores and values as in training."""
        widths = config.num_heads * (config.mla.qk_head_dim + config.mla.v_head_dim)
        keys = cls.keys_per_query(config, seq_len)["latent"]
        return AttentionFlops(linear=2.0 * cls._projections(config), attention=2.0 * keys * widths)
