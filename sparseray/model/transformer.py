"""The network: embedding, blocks of (memory, attention, experts), final norm and head.

One call of `forward` is the work of one logical shard of a training step, one of `run_paged` a step of serving. Routed experts and memory tables are not parameters of this module: they come in through `experts` and
`memory`.
`predictions` and `predict_paged` are the same of the modules that predict further tokens (mtp.py).

Shapes: B sequences, T tokens, R rows (B*T, or all chunks' tokens padded), H hidden, V vocabulary,
L MoE layers, E experts, N table rows per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseray.errors import ConfigError
from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.block import Block
from sparseray.model.config import ModelConfig
from sparseray.model.dse import Memory, Rows
from sparseray.model.dse_layout import DSELayout
from sparseray.model.init import draw_each, initial_dense, room_for
from sparseray.model.layers import Batch, RMSNorm, Rope, Run, at_once, recomputed
from sparseray.model.moe import Experts
from sparseray.model.mtp import Predictor
from sparseray.model.paged import Paged


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one forward call returns.

    Args:
        hidden_BTH: hidden states after the final norm.
        aux_loss: fp32 scalar, balance losses of all layers with their coefficients (0 in inference).
        expert_counts_LE: int64 [MoE layers that ran, experts], tokens sent to each expert.
    """

    hidden_BTH: Tensor
    aux_loss: Tensor
    expert_counts_LE: Tensor


class Transformer(nn.Module):
    """The dense part of the model, with seams for the experts and the memory.

    Args:
        config: of the model.
        layout: row addresses of the memory; None for a model without memory layers.
        seed: of the initial weights.
        ops: what the network computes with.
        recompute: keep of each layer only its input and its routing for the backward pass, which computes the rest
            again.

    Raises:
        ConfigError: the config has memory layers and the layout is missing or belongs to other settings.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: DSELayout | None,
        *,
        seed: int = 0,
        ops: Ops = REFERENCE,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if config.dse.layers and layout is None:
            raise ConfigError(f"dse.layers={config.dse.layers} needs a DSELayout; build or load one")
        if config.dse.layers and layout is not None and layout.config != config.dse:
            raise ConfigError(
                "the DSELayout was built from other settings than model.dse; rebuild one of them"
            )
        if config.dse.layers and layout is not None and len(layout.token_map) < config.vocab_size:
            raise ConfigError(
                f"the DSELayout maps {len(layout.token_map)} tokens, model.vocab_size={config.vocab_size};"
                " pass vocab_size to DSELayout.build"
            )
        self.config, self.layout, self.ops, self.recompute = config, layout, ops, recompute
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden))
        self.layers = nn.ModuleList(Block(config, layer, ops) for layer in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden, config.norm_eps, ops)
        self.head = (
            None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden))
        )
        self.mtp = nn.ModuleList(
            Predictor(config, layer, ops) for layer in range(config.num_layers, config.num_blocks)
        )
        self.rope = Rope(config)

        def draw(named: tuple[str, nn.Parameter]) -> None:
            name, parameter = named
            value = initial_dense(
                name, parameter.shape, seed=seed, std=config.init_std, room=room_for(parameter)
            )
            parameter.copy_(value)

        draw_each(draw, list(self.named_parameters()))

    def _blocks(
        self,
        tokens_R: Tensor,
        batch: Batch,
        experts: Experts,
        fetched: Rows | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run all layers on the rows: (hidden after the final norm, aux loss, counts)."""
        h_RH, y_RH = self.ops.embedding(tokens_R, self.embedding), None
        angles = self.rope.at(batch.positions_R)
        run = self._run
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        for block in self.layers:
            assert isinstance(block, Block)
            values_TND = None
            if block.dse is not None:
                assert fetched is not None
                values_TND = fetched(block.layer)
            h_RH, y_RH, loss, counts_E = block(h_RH, y_RH, batch, angles, experts, values_TND, run)
            losses += [] if loss is None else [loss]
            counts += [] if counts_E is None else [counts_E]
        aux = torch.stack(losses).sum() if losses else torch.zeros((), device=h_RH.device)
        counts_LE = torch.stack(counts) if counts else self._no_counts(h_RH.device)
        assert y_RH is not None
        return self.final_norm.add(y_RH, h_RH)[0], aux, counts_LE

    @property
    def _run(self) -> Run:
        return recomputed if self.recompute and torch.is_grad_enabled() else at_once

    def memory_rows(
        self, tokens_BT: Tensor, document_starts_BT: Tensor | None = None, history_BL: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Table rows [B*T, N] of every memory layer, known before the forward pass (fetch them ahead)."""
        if self.layout is None:
            return {}
        layout = self.layout
        return {
            layer: layout.rows(layer, tokens_BT, history_BL, document_starts_BT, self.ops).flatten(0, 1)
            for layer in self.config.dse.layers
        }

    def _fetch(self, rows: dict[int, Tensor], memory: Memory | None) -> Rows | None:
        """Read the rows of all layers at once."""
        if not rows:
            return None
        if memory is None:
            raise ConfigError(f"layers {sorted(rows)} have a memory; pass `memory`")
        return memory.prefetch(rows)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        experts: Experts,
        memory: Memory | None,
        document_starts_BT: Tensor | None = None,
        fetched: Rows | None = None,
    ) -> Output:
        """Run the network on B sequences from their start.

        Args:
            tokens_BT: int64.
            experts: the routed experts.
            memory: the memory tables; None for a model without memory layers.
            document_starts_BT: bool, True at documents' first tokens. None: derived from
                `dse.document_end_id`, if that is set.
            fetched: what `memory` gave for the rows of `memory_rows`; None to ask it now.

        Raises:
            ConfigError: too many tokens for the model.
        """
        B, T = tokens_BT.shape
        if self.config.max_seq_len < T:
            raise ConfigError(f"{T} tokens exceed model.max_seq_len={self.config.max_seq_len}")
        if document_starts_BT is None and self.layout is not None:
            document_starts_BT = self.layout.document_starts(tokens_BT)
        batch = Batch(
            shape=(B, T),
            positions_R=torch.arange(T, device=tokens_BT.device).repeat(B),
            rows=B * T,
            starts_BT=document_starts_BT,
        )
        if fetched is None:
            fetched = self._fetch(self.memory_rows(tokens_BT, document_starts_BT), memory)
        hidden_RH, aux, counts_LE = self._blocks(tokens_BT.reshape(-1), batch, experts, fetched)
        return Output(hidden_BTH=hidden_RH.view(B, T, -1), aux_loss=aux, expert_counts_LE=counts_LE)

    def predictions(self, tokens_BT: Tensor, hidden_BTH: Tensor, experts: Experts) -> Iterator[Output]:
        """Run the modules that predict further tokens, one after another, on what `forward` gave.

        Args:
            tokens_BT: as in `forward`.
            hidden_BTH: of it.
            experts: as in `forward`.

        Returns:
            of module k hidden states [B, T - k, H]: a sequence's last k tokens have none, nor have they a part in it.
        """
        for index, module in enumerate(self.mtp):
            ahead_BT, hidden_BTH = tokens_BT[:, index + 1 :], hidden_BTH[:, :-1]
            B, T = ahead_BT.shape
            positions_R = torch.arange(T, device=tokens_BT.device).repeat(B)
            batch = Batch(shape=(B, T), positions_R=positions_R, rows=B * T)
            hidden_RH, aux, counts_E = module(
                self.ops.embedding(ahead_BT.reshape(-1), self.embedding),
                hidden_BTH.reshape(B * T, -1),
                batch,
                self.rope.at(positions_R),
                experts,
                self._run,
            )
            hidden_BTH = hidden_RH.view(B, T, -1)
            aux = torch.zeros((), device=hidden_RH.device) if aux is None else aux
            counts_LE = self._no_counts(hidden_RH.device) if counts_E is None else counts_E[None]
            yield Output(hidden_BTH=hidden_BTH, aux_loss=aux, expert_counts_LE=counts_LE)

    def _no_counts(self, device: torch.device) -> Tensor:
        return torch.zeros(0, self.config.moe.num_experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def predict_paged(
        self,
        module: int,
        tokens_R: Tensor,
        hidden_RH: Tensor,
        positions_R: Tensor,
        paged: Paged,
        *,
        rows: int,
        experts: Experts,
    ) -> Tensor:
        """Run one module on the next rows of several sequences, whose caches of its block are appended to.

        Args:
            module: 0-based.
            tokens_R: integers, the tokens `module` + 1 places after the rows.
            hidden_RH: of the network, or of the module before.
            positions_R, paged, rows, experts: as in `run_paged`.

        Returns:
            Hidden states [R, H] after the module's norm, for `logits` and the next module.
        """
        batch = Batch(shape=(1, rows), positions_R=positions_R, rows=rows, paged=paged)
        embedded_RH = self.ops.embedding(tokens_R, self.embedding)
        angles = self.rope.at(positions_R)
        found: Tensor = self.mtp[module](embedded_RH, hidden_RH, batch, angles, experts, at_once)[0]
        return found

    @torch.no_grad()
    def run_paged(
        self,
        tokens_R: Tensor,
        positions_R: Tensor,
        paged: Paged,
        *,
        rows: int,
        experts: Experts,
        fetched: Rows | None,
        starts_1R: Tensor | None,
    ) -> Tensor:
        """Run the next chunk, or the next token, of several sequences whose caches lie in pages.

        Args:
            tokens_R: integers; padding after `rows` of them.
            positions_R: integers, of each row in its sequence.
            paged: pages and pools, which the rows are appended to.
            rows: rows that hold tokens.
            experts: as in `forward`.
            fetched: table rows [rows, N, D] of every memory layer.
            starts_1R: bool, documents' first tokens; None when nothing resets there.

        Returns:
            Hidden states [R, H] after the final norm.
        """
        batch = Batch(shape=(1, rows), positions_R=positions_R, rows=rows, starts_BT=starts_1R, paged=paged)
        hidden_RH, _, _ = self._blocks(tokens_R, batch, experts, fetched)
        return hidden_RH

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H]; batch invariant without gradients."""
        logits_RV = self.ops.logits(hidden.flatten(0, -2), self.head_weight)
        return logits_RV.reshape(*hidden.shape[:-1], -1)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, H] of the head."""
        return self.embedding if self.head is None else self.head

    @torch.no_grad()
    def update_router_bias(self, counts_LE: Tensor) -> None:
        """Move the selection biases against the load, once per optimizer step (V3 routing only).

        Args:
            counts_LE: int64 [MoE layers, E], tokens per expert over the whole global batch.

        Source: arXiv 2412.19437 section 2.1.2: b_i += gamma * sign(mean count - count_i).
        """
        if self.config.moe.router != "v3":
            return
        for layer, counts_E in zip(self.config.moe_layers, counts_LE, strict=True):
            is_main = layer < self.config.num_layers
            block = self.layers[layer] if is_main else self.mtp[layer - self.config.num_layers].block
            assert isinstance(block, Block) and block.moe is not None
            # Whole numbers: sum - E * count has the sign of mean - count, without rounding.
            sign_E = torch.sign(counts_E.sum() - counts_E * counts_E.numel())
            block.moe.router_bias.add_(sign_E.to(torch.float32), alpha=self.config.moe.bias_update)


def cross_entropy_sum(
    model: Transformer, hidden_BTH: Tensor, targets_BT: Tensor, weights_BT: Tensor | None = None
) -> Tensor:
    """Sum of the targets' cross-entropies, each times its weight, in fp32; targets of -1 are ignored.

    Args:
        model: whose head is used.
        hidden_BTH: hidden states after the final norm.
        targets_BT: int64.
        weights_BT: fp32; None means ones.

    Returns:
        fp32 scalar.
    """
    weights_R = None if weights_BT is None else weights_BT.reshape(-1)
    return model.ops.head_loss(
        hidden_BTH.flatten(0, -2), model.head_weight, targets_BT.reshape(-1), weights_R
    )
