"""A memory layer: rows of n-gram tables, gated by the hidden state, added before the attention.

The rows come from whatever satisfies `Memory`: `LocalMemory` here, or memory shards in other processes.
Follows arXiv 2601.07372 section 2.3 and its released code (signed square root before the sigmoid, biases in
the two projections); the convolution starts at zero, as the paper says. One branch, no hyper-connections.

Shapes: R rows, T tokens, N table rows per token, D row width, H hidden, L reach of the convolution, K taps.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseray.kernels.dse.reference import context_gate, short_conv
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import DSELayout
from sparseray.model.init import initial_bucket
from sparseray.model.layers import Batch, Linear, RMSNorm, Span
from sparseray.model.statistics import is_collecting, note_memory


class Memory(Protocol):
    """The tables of all memory layers."""

    def __call__(self, layer: int, rows_TN: Tensor) -> Tensor:
        """Read rows; differentiable in the table.

        Args:
            layer: 0-based model layer.
            rows_TN: int64 rows of that layer's table.

        Returns:
            [T, N, head_dim].
        """
        ...


class DSE(nn.Module):
    """The fusion of one memory layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dse, hidden = config.dse, config.hidden
        self.layer, self.eps, self.dilation = layer, config.norm_eps, max(dse.orders)
        self.reset = dse.reset_at_document
        self.key_value = Linear(dse.width, 2 * hidden, bias=True)
        self.query_norm = RMSNorm(hidden, config.norm_eps)
        self.key_norm = RMSNorm(hidden, config.norm_eps)
        self.value_norm = RMSNorm(hidden, config.norm_eps)
        self.conv = nn.Module()
        self.conv.weight = nn.Parameter(torch.empty(hidden, dse.kernel_size))

    def _conv(self, x_BTH: Tensor, starts_BT: Tensor | None, history_BLH: Tensor | None = None) -> Tensor:
        weight = self.conv.weight
        assert isinstance(weight, Tensor)
        return short_conv(
            x_BTH,
            weight,
            dilation=self.dilation,
            history_BLC=history_BLH,
            document_starts_BT=starts_BT if self.reset else None,
        )

    def _conv_span(self, x_TH: Tensor, starts_T: Tensor | None, span: Span) -> Tensor:
        """Convolve one chunk after its history, and keep what the next chunk reaches back to."""
        history_LH = span.cache.conv[self.layer]
        starts_1T = None if starts_T is None else starts_T[None]
        y_TH = self._conv(x_TH[None], starts_1T, history_LH[None])[0]
        seen = torch.cat([history_LH, x_TH.float()])
        if starts_T is not None and self.reset:
            document = F.pad(starts_T.long().cumsum(0), (history_LH.shape[0], 0))
            seen = seen * (document == document[-1])[:, None]
        history_LH.copy_(seen[seen.shape[0] - history_LH.shape[0] :])
        return y_TH

    def forward(self, h_RH: Tensor, values_TND: Tensor, batch: Batch) -> Tensor:
        """What the memory adds to the hidden states, [R, H].

        Args:
            h_RH: hidden states before the layer.
            values_TND: the rows read for the tokens (without padding).
        """
        e_RE = values_TND.flatten(1).to(h_RH.dtype)
        if e_RE.shape[0] < h_RH.shape[0]:
            e_RE = F.pad(e_RE, (0, 0, 0, h_RH.shape[0] - e_RE.shape[0]))
        key_RH, value_RH = self.key_value(e_RE, batch).chunk(2, dim=-1)
        gated_RH = context_gate(
            h_RH, key_RH, value_RH, self.query_norm.weight, self.key_norm.weight, eps=self.eps
        )
        if is_collecting():
            note_memory(self.layer, value_RH[: batch.rows], gated_RH[: batch.rows])
        normed_RH = self.value_norm(gated_RH)
        if batch.spans is None:
            conv_RH = self._conv(normed_RH.unflatten(0, batch.shape), batch.starts_BT).flatten(0, 1)
        else:
            conv_RH = torch.zeros_like(normed_RH)
            for span in batch.spans:
                rows = slice(span.start, span.stop)
                starts_T = None if batch.starts_BT is None else batch.starts_BT[0, rows]
                conv_RH[rows] = self._conv_span(normed_RH[rows], starts_T, span)
        return F.silu(conv_RH) + gated_RH


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
            for bucket in range(config.dse.num_buckets):
                first, stop = layout.bucket_range(layer, bucket)
                rows = initial_bucket(config, layer, bucket, stop - first, seed=seed)
                holder.bucket.append(nn.Parameter(rows))
            self.dse[str(layer)] = holder

    def forward(self, layer: int, rows_TN: Tensor) -> Tensor:
        """Read rows, as `Memory` asks."""
        buckets = self.dse[str(layer)].bucket
        assert isinstance(buckets, nn.ParameterList)
        return F.embedding(rows_TN, torch.cat(list(buckets)))
