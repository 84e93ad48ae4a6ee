"""One layer of the network: memory, attention, and experts or a dense MLP, each added to the hidden states.

Pre-norm residual; the memory is added before the attention (arXiv 2601.07372 section 2.3). transformer.py has a stack
of them, and each module of mtp.py has one.

Shapes: R rows, T tokens, N table rows per token, D row width, H hidden, E experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from sparseray.kernels.ops import Ops
from sparseray.model.attention import attention_of
from sparseray.model.config import ModelConfig
from sparseray.model.dse import DSE
from sparseray.model.layers import Angles, Batch, RMSNorm, Run, SwiGLU
from sparseray.model.moe import Experts, MoE


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.layer = layer
        self.dse = DSE(config, layer, ops) if layer in config.dse.layers else None
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps, ops)
        self.attention = attention_of(config, layer)(config, layer, ops)
        self.ffn_norm = RMSNorm(config.hidden, config.norm_eps, ops)
        self.moe = MoE(config, layer, ops) if layer in config.moe_layers else None
        self.ffn = None if self.moe else SwiGLU(config.hidden, config.dense_width(layer), ops)

    def _attend(
        self, h_RH: Tensor, y_RH: Tensor | None, batch: Batch, angles: Angles, values_TND: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Add what the layer before gave, memory and attention: (the sum after the norm before the MLP, once for each of
        its readers, the sum)."""
        readers = self.attention.num_readers
        if self.dse is not None:
            assert values_TND is not None
            h_RH = h_RH if y_RH is None else h_RH + y_RH
            *xs_RH, h_RH = self.attention_norm.add(self.dse(h_RH, values_TND, batch), h_RH, readers)
        elif y_RH is not None:
            *xs_RH, h_RH = self.attention_norm.add(y_RH, h_RH, readers)
        else:
            xs_RH = [self.attention_norm(h_RH)] * readers
        attended_RH = self.attention(xs_RH, batch, angles)
        return self.ffn_norm.add(attended_RH, h_RH, 1 if self.moe is None else self.moe.num_readers)

    def forward(
        self,
        h_RH: Tensor,
        y_RH: Tensor | None,
        batch: Batch,
        angles: Angles,
        experts: Experts,
        values_TND: Tensor | None,
        run: Run,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Add memory, attention and experts (or the dense MLP).

        Args:
            h_RH, y_RH: their sum enters; the norm adds them in the pass that it makes anyway. y is None before the
                first layer.
            values_TND: table rows of the tokens; None for a layer without memory.
            run: calls the stretches of the layer that may be recomputed.

        Returns:
            (hidden states before the MLP [R, H], what it adds [R, H], balance loss, tokens per expert int64 [E]).
        """
        *xs_RH, h_RH = run(self._attend, h_RH, y_RH, batch, angles, values_TND)
        if self.moe is None:
            assert self.ffn is not None
            return h_RH, run(self.ffn, xs_RH[0], batch), None, None
        y_RH, loss, counts_E = self.moe(xs_RH, batch, experts, run)
        assert y_RH is not None
        return h_RH, y_RH, loss, counts_E
