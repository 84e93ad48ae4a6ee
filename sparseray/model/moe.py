"""The mixture-of-experts layer: routing, balance, the shared experts, and the seam to the routed ones.

Routing is `kernels/moe/reference.py`; the routed experts are whatever satisfies `Experts`: `LocalExperts`
here, or expert shards in other processes. Follows arXiv 2401.06066 (DeepSeekMoE), 2405.04434 (V2) and
2412.19437 section 2.1.2 (V3); GShard, Switch and a dense MLP are settings of the same layer.

Shapes: R rows, T tokens, K experts per token, E experts, H hidden, I inner.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sparseray.kernels.moe.reference import (
    group_by_expert,
    route,
    stable_topk,
    swiglu_backward,
    swiglu_forward,
)
from sparseray.model.config import ModelConfig, MoEConfig
from sparseray.model.init import EXPERT_PARTS, initial_expert
from sparseray.model.layers import Batch, Linear, SwiGLU


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


def balance_loss(config: MoEConfig, scores_TE: Tensor, topk_ids_TK: Tensor, shape: tuple[int, int]) -> Tensor:
    """The router's balance loss, coefficient included, as a scalar fp32.

    v2: over all tokens of the call, alpha * sum f_i P_i. v3: for each sequence, from the top-k of the
    unbiased scores, with scores divided by their sum; the mean over sequences. gshard and switch: from first
    choices.

    Args:
        config: of the router.
        scores_TE: fp32 scores.
        topk_ids_TK: the chosen experts.
        shape: (B, T) of the call.

    Source: arXiv 2401.06066 eq. 12-14; 2412.19437 eq. 17-20; GShard algorithm 1; Switch eq. 4-6.
    """
    E = scores_TE.shape[1]
    ids_TK, groups = topk_ids_TK, 1
    if config.router == "v3":
        ids_TK, groups = stable_topk(scores_TE.detach(), config.top_k), shape[0]
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    elif config.router in ("gshard", "switch"):
        ids_TK = topk_ids_TK[:, :1]
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, ids_TK, 1.0)
    tokens = scores_TE.shape[0] // groups
    f_BE = chosen_TE.reshape(groups, tokens, E).sum(1) * (E / (ids_TK.shape[1] * tokens))
    p_BE = scores_TE.reshape(groups, tokens, E).mean(1)
    return config.balance_loss * (f_BE * p_BE).sum() / groups


class MoE(nn.Module):
    """Shared experts here, routed experts through the seam."""

    router_bias: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config.moe
        self.router = Linear(config.hidden, config.moe.num_experts)
        self.register_buffer("router_bias", torch.zeros(config.moe.num_experts, dtype=torch.float32))
        inner = config.moe.num_shared * config.moe.expert_dim
        self.shared = SwiGLU(config.hidden, inner) if inner else None

    def forward(self, x_RH: Tensor, batch: Batch, experts: Experts) -> tuple[Tensor, Tensor | None, Tensor]:
        """Apply the layer.

        Returns:
            (y_RH, balance loss or None in inference, tokens per expert int64 [E]).
        """
        config = self.config
        logits_RE = self.router(x_RH.float(), batch)
        ids_RK, weights_RK, scores_RE = route(
            logits_RE,
            top_k=config.top_k,
            router=config.router,
            bias_E=self.router_bias if config.router == "v3" else None,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            normalize=config.normalize,
            scaling=config.scaling,
        )
        rows = batch.rows
        ids_TK, weights_TK = ids_RK[:rows], weights_RK[:rows]
        y_TH = experts(self.layer, x_RH[:rows], ids_TK, weights_TK)
        counts_E = torch.bincount(ids_TK.reshape(-1), minlength=config.num_experts)
        loss = None if batch.invariant else balance_loss(config, scores_RE, ids_TK, batch.shape)
        if y_TH.shape[0] < x_RH.shape[0]:
            y_TH = torch.nn.functional.pad(y_TH, (0, 0, 0, x_RH.shape[0] - y_TH.shape[0]))
        if self.shared is not None:
            y_TH = y_TH + self.shared(x_RH, batch)
        return y_TH, loss, counts_E


class _ExpertSum(torch.autograd.Function):
    """All experts of a layer on grouped rows; the combination runs in slot order in fp32."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        T, K = topk_ids_TK.shape
        order_R, counts_E = group_by_expert(topk_ids_TK, len(weights) // 3)
        rows_RH = x_TH[order_R // K]
        saved: list[Tensor] = []
        y_RH, start = torch.empty_like(rows_RH), 0
        counts = counts_E.tolist()
        for expert, count in enumerate(counts):
            if count:
                y, kept = swiglu_forward(
                    rows_RH[start : start + count], *weights[3 * expert : 3 * expert + 3]
                )
                y_RH[start : start + count] = y
                saved += kept
            start += count
        y_TKH = torch.empty_like(y_RH)
        y_TKH[order_R] = y_RH
        y_TKH = y_TKH.view(T, K, -1)
        out_TH = topk_weights_TK[:, 0, None] * y_TKH[:, 0]
        for k in range(1, K):
            out_TH = out_TH + topk_weights_TK[:, k, None] * y_TKH[:, k]
        ctx.save_for_backward(order_R, topk_weights_TK, y_TKH, rows_RH, *weights, *saved)
        ctx.counts = counts  # type: ignore[attr-defined]
        return out_TH.to(x_TH.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        order_R, weights_TK, y_TKH, rows_RH, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
        counts: list[int] = ctx.counts  # type: ignore[attr-defined]
        (T, K), E = weights_TK.shape, len(counts)
        matrices, saved = rest[: 3 * E], rest[3 * E :]
        dweights_TK = (y_TKH.float() * dout_TH[:, None, :].float()).sum(-1)
        dy_RH = (dout_TH[:, None, :] * weights_TK[..., None]).reshape(T * K, -1)[order_R].to(rows_RH.dtype)
        dx_RH, gradients, start, used = torch.empty_like(rows_RH), [], 0, 0
        for expert, count in enumerate(counts):
            three = matrices[3 * expert : 3 * expert + 3]
            if not count:
                gradients += [torch.zeros_like(matrix) for matrix in three]
                continue
            rows = slice(start, start + count)
            dx, *dthree = swiglu_backward(dy_RH[rows], rows_RH[rows], (saved[used], saved[used + 1]), *three)
            dx_RH[rows] = dx
            gradients += dthree
            start, used = start + count, used + 2
        dx_TKH = torch.empty_like(dx_RH)
        dx_TKH[order_R] = dx_RH
        return dx_TKH.view(T, K, -1).sum(1), None, dweights_TK, *gradients


class LocalExperts(nn.Module):
    """All routed experts in this process, as parameters with their logical names.

    Args:
        config: of the model.
        seed: of the initial weights.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self._weights: dict[int, list[nn.Parameter]] = {}
        for layer in config.moe_layers:
            experts = nn.ModuleList()
            for expert in range(config.moe.num_experts):
                one = nn.Module()
                for part, tensor in initial_expert(config, layer, expert, seed=seed).items():
                    one.register_parameter(part, nn.Parameter(tensor))
                experts.append(one)
            holder = nn.Module()
            holder.moe = nn.Module()
            holder.moe.experts = experts
            self.layers[str(layer)] = holder

    def weights(self, layer: int) -> list[Tensor]:
        """gate, up and down of every expert of a layer, one expert after the other."""
        prefix = f"layers.{layer}.moe.experts."
        count = len(self.get_submodule(prefix[:-1]).__dict__["_modules"])
        return [self.get_parameter(f"{prefix}{e}.{part}") for e in range(count) for part in EXPERT_PARTS]

    def forward(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Apply the experts, as `Experts` asks."""
        if layer not in self._weights:
            self._weights[layer] = self.weights(layer)  # type: ignore[assignment]
        out: Tensor = _ExpertSum.apply(x_TH, topk_ids_TK, topk_weights_TK, *self._weights[layer])
        return out
