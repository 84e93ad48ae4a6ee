"""Multi-token prediction: modules that go on where the network ends, each one token further (arXiv 2412.19437 section 2.2).

Module k takes the hidden states that belong to position i (of the network after its final norm, or of module k - 1
after its own) and the embedding of token i + k, and gives those that predict token i + k + 1. Embedding and head are the
network's. As released, the projection takes the embedding first, and what goes on to the next module is normed.
Training calls them through objective.py, serving to draft tokens (actors/serving/drafter.py).

Shapes: R rows, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseray.kernels.ops import Ops
from sparseray.model.block import Block
from sparseray.model.config import ModelConfig
from sparseray.model.layers import Angles, Batch, Linear, RMSNorm, Run
from sparseray.model.moe import Experts


class Predictor(nn.Module):
    """One module.

    Args:
        config: of the model.
        layer: number of its block: `num_layers` for the first module.
        ops: what it computes with.
    """

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden, config.norm_eps, ops)
        self.hidden_norm = RMSNorm(config.hidden, config.norm_eps, ops)
        self.projection = Linear(2 * config.hidden, config.hidden, ops)
        self.block = Block(config, layer, ops)
        self.final_norm = RMSNorm(config.hidden, config.norm_eps, ops)

    def forward(
        self,
        embedded_RH: Tensor,
        hidden_RH: Tensor,
        batch: Batch,
        angles: Angles,
        experts: Experts,
        run: Run,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Predict one token further.

        Args:
            embedded_RH: of the tokens that were predicted last.
            hidden_RH: that predicted them.
            batch, angles, experts, run: as in `Block`; positions are those of the hidden states.

        Returns:
            (hidden states [R, H] after the norm, balance loss, tokens per expert int64 [E]).

        Source: arXiv 2412.19437 eq. 21 and 22.
        """
        both_RX = torch.cat([self.embedding_norm(embedded_RH), self.hidden_norm(hidden_RH)], -1)
        projected_RH = self.projection(both_RX, batch)
        h_RH, y_RH, loss, counts_E = self.block(projected_RH, None, batch, angles, experts, None, run)
        return self.final_norm.add(y_RH, h_RH)[0], loss, counts_E
