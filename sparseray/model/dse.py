"""A memory layer: rows of n-gram tables, gated by the hidden state, added before the attention.

The rows come from whatever satisfies `Memory`: `LocalMemory` here, or memory shards in other processes.
Follows arXiv 2601.07372 section 2.3 and its released code (signed square root before the sigmoid, biases in
the two projections); the convolution starts at zero, as the paper says. One branch, no hyper-connections.

Shapes: R rows, T tokens, N table rows per token, D row width, H hidden, L reach of the convolution, K taps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseray.kernels.ops import REFERENCE, Fusion, History, Ops
from sparseray.model.buckets import bucket_bounds
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import DSELayout
from sparseray.model.init import initial_bucket
from sparseray.model.layers import Batch, Linear, RMSNorm
from sparseray.model.statistics import is_collecting, note_memory


class Rows(Protocol):
    """Table rows that were fetched for one call of the network."""

    def __call__(self, layer: int) -> Tensor:
        """The rows [T, N, head_dim] of 0-based model layer `layer`; differentiable in the table."""
        ...


class Memory(Protocol):
    """The tables of all memory layers."""

    def prefetch(self, rows: dict[int, Tensor]) -> Rows:
        """Read rows of all layers at once, before the forward pass that needs them.

        Args:
            rows: 0-based model layer to int64 rows [T, N] of that layer's table.
        """
        ...


class DSE(nn.Module):
    """The fusion of one memory layer."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops = REFERENCE) -> None:
        super().__init__()
        dse, hidden = config.dse, config.hidden
        self.layer, self.config, self.ops = layer, dse, ops
        self.key_value = Linear(dse.width, 2 * hidden, ops, bias=True)
        self.query_norm = RMSNorm(hidden, dse.gate_eps, ops)
        self.key_norm = RMSNorm(hidden, dse.gate_eps, ops)
        self.value_norm = RMSNorm(hidden, dse.conv_eps, ops)
        self.conv = nn.Module()
        self.conv.weight = nn.Parameter(torch.empty(hidden, dse.kernel_size))

    def fusion(self) -> Fusion:
        """Weights and constants, as the operations take them."""
        return Fusion(
            query_norm_C=self.query_norm.weight,
            key_norm_C=self.key_norm.weight,
            value_norm_C=self.value_norm.weight,
            conv_CK=self.get_parameter("conv.weight"),
            dilation=max(self.config.orders),
            gate_eps=self.config.gate_eps,
            conv_eps=self.config.conv_eps,
        )

    def forward(self, h_RH: Tensor, values_TND: Tensor, batch: Batch) -> Tensor:
        """What the memory adds to the hidden states, [R, H].

        Args:
            h_RH: hidden states before the layer.
            values_TND: the rows read for the tokens (without padding).
        """
        e_RE = values_TND.flatten(1).to(h_RH.dtype)
        if e_RE.shape[0] < h_RH.shape[0]:
            e_RE = F.pad(e_RE, (0, 0, 0, h_RH.shape[0] - e_RE.shape[0]))
        key_value_RH = self.key_value(e_RE, batch)
        if is_collecting():
            key_RH, value_RH = key_value_RH.chunk(2, dim=-1)
            gated_RH = self.ops.memory_gate(h_RH, key_RH, value_RH, self.fusion())
            note_memory(self.layer, value_RH[: batch.rows], gated_RH[: batch.rows])
        starts_BT = batch.starts_BT if self.config.reset_at_document else None
        if batch.paged is not None:
            paged = batch.paged
            return self.ops.paged_memory_fusion(
                h_RH,
                key_value_RH,
                self.fusion(),
                History(paged.histories[self.layer], paged.slots_B, paged.slots),
                paged.pages,
                None if starts_BT is None else starts_BT[0],
            )
        return self.ops.memory_fusion(h_RH, key_value_RH, self.fusion(), batch.shape, starts_BT)


class LocalMemory(nn.Module):
    """All tables in this process, as parameters with their logical names (one for each bucket).

    Args:
        config: of the model.
        layout: decides the number of rows.
        seed: of the initial rows.
    """

    def __init__(self, config: ModelConfig, layout: DSELayout, *, seed: int = 0) -> None:
        super().__init__()
        self.dse = nn.ModuleDict()
        for layer in config.dse.layers:
            holder = nn.Module()
            holder.bucket = nn.ParameterList()
            bounds = bucket_bounds(layout.num_rows(layer), config.dse.num_buckets).tolist()
            for bucket, (first, stop) in enumerate(pairwise(bounds)):
                rows = initial_bucket(config, layer, bucket, stop - first, seed=seed)
                holder.bucket.append(nn.Parameter(rows))
            self.dse[str(layer)] = holder

    def prefetch(self, rows: dict[int, Tensor]) -> Rows:
        """Read rows, as `Memory` asks."""

        def read(layer: int) -> Tensor:
            buckets = self.dse[str(layer)].bucket
            assert isinstance(buckets, nn.ParameterList)
            return F.embedding(rows[layer], torch.cat(list(buckets)))

        return read
