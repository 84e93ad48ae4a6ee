"""The mixture-of-experts layer: routing, balance, the shared experts, and the seam to the routed ones.

The routed experts are whatever satisfies `Experts`: `LocalExperts` here, or expert shards in other processes.
Follows arXiv 2401.06066 (DeepSeekMoE), 2405.04434 (V2) and
2412.19437 section 2.1.2 (V3); GShard, Switch and a dense MLP are settings of the same layer.

Shapes: R rows, T tokens, K experts per token, E experts, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.config import ModelConfig, MoEConfig
from sparseray.model.init import expert_name, expert_views, initial_expert
from sparseray.model.layers import Batch, Linear, Run, SwiGLU, at_once


class Experts(Protocol):
    """The routed experts of all layers."""

    def __call__(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k, in k order, of weight * expert(x); differentiable in x and the weights.

        Args:
            layer: 0-based model layer.
            x_TH: tokens.
            topk_ids_TK: int64 expert ids.
            topk_weights_TK: fp32.

        Returns:
            [T, H] in the dtype of x.
        """
        ...


@runtime_checkable
class ExpertsBeside(Experts, Protocol):
    """Routed experts elsewhere: something else may be computed while tokens travel."""

    def beside(
        self,
        layer: int,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        other: Callable[[], Tensor],
    ) -> Tensor:
        """The experts' sum plus what `other` gives.

        Args:
            layer, x_TH, topk_ids_TK, topk_weights_TK: as in `Experts`.
            other: [T, H].
        """
        ...


def balance_loss(
    config: MoEConfig, scores_TE: Tensor, topk_ids_TK: Tensor, shape: tuple[int, int], ops: Ops = REFERENCE
) -> Tensor:
    """The router's balance loss, coefficient included, as a scalar fp32.

    With f_i the share of choices that fell on expert i, times E, and P_i its mean score: alpha * sum f_i P_i. v2
    and v3: for each sequence, the mean over sequences; v3 counts the top-k of the unbiased scores and divides
    scores by their sum. gshard and switch: over all tokens of the call, from first choices; GShard's sum is over
    E, of shares that are not times E, so it is 1/E^2 of Switch's.

    Args:
        config: of the router.
        scores_TE: fp32 scores.
        topk_ids_TK: the chosen experts.
        shape: (B, T) of the call.
        ops: counts v3's unbiased top-k.

    Source: arXiv 2405.04434 eq. 23-25; 2412.19437 eq. 17-20; GShard algorithm 1; Switch eq. 4-6.
    """
    groups, choices = shape[0], topk_ids_TK
    if config.router in ("gshard", "switch"):
        groups, choices = 1, topk_ids_TK[:, :1]
    f_BE, p_BE = ops.balance(scores_TE, config.top_k if config.router == "v3" else choices, groups)
    loss = config.balance_loss * (f_BE * p_BE).sum() / groups
    return loss / scores_TE.shape[1] ** 2 if config.router == "gshard" else loss


class MoE(nn.Module):
    """Shared experts here, routed experts through the seam."""

    router_bias: Tensor

    def __init__(self, config: ModelConfig, layer: int, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.layer, self.config, self.ops = layer, config.moe, ops
        self.router = Linear(config.hidden, config.moe.num_experts, ops)
        self.register_buffer("router_bias", torch.zeros(config.moe.num_experts, dtype=torch.float32))
        inner = config.moe.num_shared * config.moe.expert_dim
        self.shared = SwiGLU(config.hidden, inner, ops) if inner else None
        self.num_readers = 3 if inner else 2

    def _route(self, x_RH: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Choose the experts of every token.

        Returns:
            (expert ids [T, K], their weights [T, K], balance loss or None in inference).
        """
        config = self.config
        logits_RE = self.ops.router_logits(x_RH, self.router.weight, invariant=batch.invariant)
        ids_RK, weights_RK, scores_RE = self.ops.route(
            logits_RE,
            top_k=config.top_k,
            router=config.router,
            bias_E=self.router_bias if config.router == "v3" else None,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            group_scores=config.group_scores,
            normalize=config.normalize,
            scaling=config.scaling,
        )
        ids_TK, weights_TK, rows = ids_RK, weights_RK, batch.rows
        if rows < x_RH.shape[0]:
            ids_TK, weights_TK = ids_RK[:rows], weights_RK[:rows]
        loss = None if batch.invariant else balance_loss(config, scores_RE, ids_TK, batch.shape, self.ops)
        return ids_TK, weights_TK, loss

    def _mix(
        self,
        xs_RH: Sequence[Tensor],
        ids_TK: Tensor,
        weights_TK: Tensor,
        batch: Batch,
        experts: Experts,
    ) -> Tensor:
        """Return the sum of the chosen experts and the shared ones, [R, H].

        Args:
            xs_RH: the rows for the former, and for the latter.
            ids_TK, weights_TK: of `_route`.
        """
        x_RH, shared = xs_RH[0], self.shared
        padding = x_RH.shape[0] - batch.rows
        if shared is not None and isinstance(experts, ExpertsBeside) and not padding:
            return experts.beside(self.layer, x_RH, ids_TK, weights_TK, lambda: shared(xs_RH[1], batch))
        y_TH = experts(self.layer, x_RH[: batch.rows] if padding else x_RH, ids_TK, weights_TK)
        if padding:
            y_TH = torch.nn.functional.pad(y_TH, (0, 0, 0, padding))
        if self.shared is not None:
            y_TH = self.shared.add_to(y_TH, xs_RH[1], batch)
        return y_TH

    def _infer(self, x_RH: Tensor, batch: Batch, experts: Experts) -> Tensor:
        """The same in inference, [R, H], the shared ones beside the routing and the chosen ones."""
        shared = self.shared
        if shared is None:
            return self._mix((x_RH,), *self._route(x_RH, batch)[:2], batch, experts)

        def routed() -> Tensor:
            ids_TK, weights_TK, _ = self._route(x_RH, batch)
            return experts(self.layer, x_RH[: batch.rows], ids_TK, weights_TK)

        y_TH, shared_RH = self.ops.side_by_side(len(x_RH), routed, lambda: shared(x_RH, batch))
        # Nobody reads what the rows of padding get.
        shared_RH[: batch.rows] += y_TH
        return shared_RH

    def forward(
        self, xs_RH: Sequence[Tensor], batch: Batch, experts: Experts, run: Run = at_once
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Apply the layer.

        Args:
            xs_RH: the rows, `num_readers` times.
            run: calls what may be recomputed. Routing is not: a second one could choose other experts.

        Returns:
            (y_RH, balance loss, tokens per expert int64 [E]); the last two are None in inference.
        """
        if batch.invariant:
            return self._infer(xs_RH[0], batch, experts), None, None
        ids_TK, weights_TK, loss = self._route(xs_RH[0], batch)
        y_RH = run(self._mix, xs_RH[1:], ids_TK, weights_TK, batch, experts)
        return y_RH, loss, self.ops.expert_counts(ids_TK, self.config.num_experts)


class LocalExperts(nn.Module):
    """All routed experts in this process; a layer's are two slabs, `tensors` has their logical names.

    Args:
        config: of the model.
        seed: of the initial weights.
        ops: what computes them.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.ops = ops
        experts, inner = config.moe.num_experts, config.moe.expert_dim
        self.gate_up_E2IH, self.down_EHI = nn.ParameterDict(), nn.ParameterDict()
        for layer in config.moe_layers:
            self.gate_up_E2IH[str(layer)] = nn.Parameter(torch.empty(experts, 2 * inner, config.hidden))
            self.down_EHI[str(layer)] = nn.Parameter(torch.empty(experts, config.hidden, inner))
        tensors = self.tensors()
        for layer in config.moe_layers:
            for expert in range(experts):
                for part, drawn in initial_expert(config, layer, expert, seed=seed).items():
                    tensors[expert_name(layer, expert, part)].copy_(drawn)

    def _views(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer, gate_up in self.gate_up_E2IH.items():
            found |= expert_views(int(layer), of(gate_up), of(self.down_EHI[layer]))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Weights by logical name, as views of the slabs."""
        return self._views(lambda slab: slab.detach())

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by logical name, as views of those of the slabs; zero before a backward pass."""
        return self._views(lambda slab: torch.zeros_like(slab) if slab.grad is None else slab.grad)

    def forward(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Apply the experts, as `Experts` asks."""
        gate_up, down = self.gate_up_E2IH[str(layer)], self.down_EHI[str(layer)]
        return self.ops.experts(x_TH, topk_ids_TK, topk_weights_TK, gate_up, down)
