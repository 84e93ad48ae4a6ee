"""The fused expert layer with its backward: five grouped products, two combines, no copies of tokens.

Forward: `up_kernel` gathers tokens as it loads them and applies SwiGLU as it stores; `rows_kernel`
projects down; `combine_kernel` sums each token's rows. Backward keeps the input, the two
pre-activations and the routing only, and recomputes SwiGLU. Oracle: `reference.moe_ffn_reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.moe import gemm
from sparseray.kernels.moe.expert_map import ExpertPlan, plan_experts


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Tile of one grouped product: columns, depth, row tiles that share the cache, warps, stages; `registers` of a thread
    at most, so that more programs share a multiprocessor."""

    n: int
    k: int
    group: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class GradientTile(TileConfig):
    """Tile of a weight gradient: `rows` columns of what lies sorted by expert, `n` of what is gathered."""

    rows: int


_SMALL_GRADIENT = GradientTile(rows=32, n=32, k=32, group=4, warps=4, stages=2)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Tiles of the six products; `m` is the rows of a tile and `tma` whether descriptors may be used."""

    m: int
    up: TileConfig
    down: TileConfig
    act_grad: TileConfig
    input_grad: TileConfig
    up_weights: GradientTile = _SMALL_GRADIENT
    down_weights: GradientTile = _SMALL_GRADIENT
    tma: bool = True


@dataclass(frozen=True, kw_only=True)
class GradientSlabs:
    """Where the backward pass puts the gradients of the experts' weights, in fp32, instead of returning them.

    Attributes:
        gate_up_E2IH, down_EHI: fp32, contiguous, in the weights' shapes.
        accumulate: add to what is there (an expert without rows is not touched); otherwise all is written.
    """

    gate_up_E2IH: Tensor
    down_EHI: Tensor
    accumulate: bool = True


HOPPER = LayerConfig(
    m=128,
    up=TileConfig(n=128, k=64, group=8, warps=8, stages=4),
    down=TileConfig(n=256, k=64, group=8, warps=8, stages=4),
    act_grad=TileConfig(n=256, k=64, group=8, warps=8, stages=4),
    input_grad=TileConfig(n=256, k=64, group=8, warps=8, stages=3),
    up_weights=GradientTile(rows=256, n=128, k=64, group=8, warps=8, stages=3),
    down_weights=GradientTile(rows=256, n=128, k=64, group=8, warps=8, stages=3),
)
"""bf16 and fp16 on compute capability 9.0; measured in benchmarks/results."""

_SMALL = TileConfig(n=32, k=32, group=4, warps=4, stages=2)
SMALL = LayerConfig(
    m=32,
    up=_SMALL,
    down=_SMALL,
    act_grad=_SMALL,
    input_grad=_SMALL,
)
"""fp32, and anything that runs in the interpreter."""


def default_config(x: Tensor) -> LayerConfig:
    """The tiles for this dtype and device."""
    return HOPPER if x.is_cuda and x.element_size() == 2 else SMALL


def _operand(matrix: Tensor, block: tuple[int, ...], tma: bool) -> Tensor | TensorDescriptor:
    """The matrix as a descriptor of the given block, or itself."""
    return TensorDescriptor.from_tensor(matrix, list(block)) if tma else matrix


def _may_use_tma(config: LayerConfig, *matrices: Tensor) -> bool:
    aligned = (m.shape[-1] * m.element_size() % 16 == 0 and m.data_ptr() % 16 == 0 for m in matrices)
    return config.tma and all(aligned) and all(m.numel() for m in matrices)


def _tiles(plan: ExpertPlan) -> tuple[Tensor, Tensor, Tensor, int]:
    return plan.tile_expert_M, plan.tile_row_M, plan.tile_end_M, plan.tile_expert_M.shape[0]


def up_project(
    x_TH: Tensor, w_E2IH: Tensor, plan: ExpertPlan, config: LayerConfig, *, save: bool
) -> tuple[Tensor, Tensor]:
    """Return (activations [R, I], pre-activations [R, 2I], or the former twice without `save`)."""
    H, I, R = x_TH.shape[1], w_E2IH.shape[1] // 2, plan.order_R.shape[0]
    act_RI = x_TH.new_empty(R, I)
    pre_RP = x_TH.new_empty(R, 2 * I) if save else act_RI
    tile, halves = config.up, w_E2IH.view(-1, I, H)
    tma = _may_use_tma(config, halves)
    launch_kernel(
        gemm.up_kernel,
        (plan.tile_expert_M.shape[0] * triton.cdiv(I, tile.n),),
        x_TH,
        plan.order_R,
        _operand(halves, (2, tile.n, tile.k), tma),
        act_RI,
        pre_RP,
        *_tiles(plan),
        H=H,
        I=I,
        K=plan.top_k,
        SAVE=save,
        TMA=tma,
        BM=config.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return act_RI, pre_RP


def project_rows(
    a_RK: Tensor, w: Tensor, plan: ExpertPlan, config: LayerConfig, tile: TileConfig, *, transposed: bool
) -> Tensor:
    """Multiply each sorted row by its expert's matrix: [E, N, K] if transposed, else [E, K, N]."""
    depth = a_RK.shape[1]
    N = w.shape[1] if transposed else w.shape[2]
    flat = w.view(-1, w.shape[2])
    out_RN = a_RK.new_empty(a_RK.shape[0], N)
    # A partial last step of the depth would read the next expert's rows: pointers mask it.
    tma = _may_use_tma(config, flat, a_RK) and (transposed or depth % tile.k == 0)
    block = (tile.n, tile.k) if transposed else (tile.k, tile.n)
    launch_kernel(
        gemm.rows_kernel,
        (plan.tile_expert_M.shape[0] * triton.cdiv(N, tile.n),),
        _operand(a_RK, (config.m, tile.k), tma),
        _operand(flat, block, tma),
        out_RN,
        *_tiles(plan),
        KDIM=depth,
        N=N,
        TRANSPOSED=transposed,
        TMA=tma,
        BM=config.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return out_RN


def combine(rows_RH: Tensor, plan: ExpertPlan, weights_TK: Tensor | None) -> Tensor:
    """Sum each token's K rows in slot order, weighted if weights are given."""
    return combine_rows(rows_RH, plan.inverse_R, plan.top_k, weights_TK)


def combine_rows(rows_RH: Tensor, places_R: Tensor, top_k: int, weights_TK: Tensor | None) -> Tensor:
    """The same where places_R (int32) says where each (token, slot) pair's row lies."""
    H, T = rows_RH.shape[1], places_R.shape[0] // top_k
    out_TH = rows_RH.new_empty(T, H)
    bh = min(2048, triton.next_power_of_2(H))
    launch_kernel(
        gemm.combine_kernel,
        (T, triton.cdiv(H, bh)),
        rows_RH,
        places_R,
        weights_TK if weights_TK is not None else rows_RH,
        out_TH,
        H=H,
        K=top_k,
        WEIGHTED=weights_TK is not None,
        BH=bh,
        num_warps=4,
    )
    return out_TH


def activation_grad(
    dy_TH: Tensor,
    pre_RP: Tensor,
    w_EHI: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    config: LayerConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (gradient of the pre-activations, weighted activations, gradient of each row's routing weight)."""
    R, H, I = pre_RP.shape[0], w_EHI.shape[1], w_EHI.shape[2]
    tile, flat = config.act_grad, w_EHI.view(-1, I)
    num_n = triton.cdiv(I, tile.n)
    dpre_RP, weighted_RI = torch.empty_like(pre_RP), pre_RP.new_empty(R, I)
    partial_RN = torch.empty(R, num_n, dtype=torch.float32, device=pre_RP.device)
    tma = _may_use_tma(config, flat) and H % tile.k == 0
    launch_kernel(
        gemm.act_grad_kernel,
        (plan.tile_expert_M.shape[0] * num_n,),
        dy_TH,
        plan.order_R,
        weights_TK,
        _operand(flat, (tile.k, tile.n), tma),
        pre_RP,
        dpre_RP,
        weighted_RI,
        partial_RN,
        *_tiles(plan),
        H=H,
        I=I,
        K=plan.top_k,
        TMA=tma,
        BM=config.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return dpre_RP, weighted_RI, partial_RN.sum(1)


def clear_behind(rows_RN: Tensor, held: Tensor, tile: GradientTile) -> None:
    """Write zeros where `weight_grad` reads behind the last expert's rows, in a tensor that has room for more of them.

    Args:
        rows_RN: contiguous.
        held: int32 scalar, the rows of all experts.
        tile: of the product.
    """
    R, N = rows_RN.shape
    block = min(1024, triton.next_power_of_2(N))
    launch_kernel(gemm.clear_kernel, (tile.k,), rows_RN, held, R, N=N, BN=block, num_warps=4)


def weight_grad(
    rows_RN: Tensor,
    tokens_TH: Tensor,
    plan: ExpertPlan,
    config: LayerConfig,
    *,
    rows_first: bool,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Sum over each expert's rows of rows (x) tokens: [E, N, H] if rows_first, else [E, H, N].

    Args:
        rows_RN: sorted by expert; after `clear_behind` where it has rows of no expert at its end.
        tokens_TH: what is gathered.
        plan: the map of rows.
        config: tiles.
        rows_first: which way round.
        out: contiguous, of any floating dtype; None makes one of the rows' dtype.
        accumulate: add to `out`.
    """
    N, H, E = rows_RN.shape[1], tokens_TH.shape[1], plan.counts_E.shape[0]
    tile = config.up_weights if rows_first else config.down_weights
    shape = (E, N, H) if rows_first else (E, H, N)
    out = rows_RN.new_empty(shape) if out is None else out
    assert out.shape == shape and out.is_contiguous()
    tma = _may_use_tma(config, rows_RN)
    launch_kernel(
        gemm.weight_grad_kernel,
        (triton.cdiv(N, tile.rows) * triton.cdiv(H, tile.n), E),
        _operand(rows_RN, (tile.k, tile.rows), tma),
        tokens_TH,
        plan.order_R,
        plan.offsets_E,
        plan.counts_E,
        out,
        ROWS=N,
        TOKENS=H,
        K=plan.top_k,
        ROWS_FIRST=rows_first,
        ACCUMULATE=accumulate,
        TMA=tma,
        BR=tile.rows,
        BT=tile.n,
        BK=tile.k,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return out


class _MoeFfn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weights_TK: Tensor,
        w_E2IH: Tensor,
        w_EHI: Tensor,
        plan: ExpertPlan,
        config: LayerConfig,
        slabs: GradientSlabs | None,
    ) -> Tensor:
        save = any(ctx.needs_input_grad)
        act_RI, pre_RP = up_project(x_TH, w_E2IH, plan, config, save=save)
        y_RH = project_rows(act_RI, w_EHI, plan, config, config.down, transposed=True)
        if save:
            ctx.save_for_backward(x_TH, weights_TK, w_E2IH, w_EHI, pre_RP)
            ctx.plan, ctx.config, ctx.slabs = plan, config, slabs
        return combine(y_RH, plan, weights_TK)

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> Any:
        x_TH, weights_TK, w_E2IH, w_EHI, pre_RP = ctx.saved_tensors
        plan, config, dy_TH = ctx.plan, ctx.config, dy_TH.contiguous()
        need_x, need_weights, need_up, need_down = ctx.needs_input_grad[:4]
        dpre_RP, weighted_RI, dweights_R = activation_grad(dy_TH, pre_RP, w_EHI, weights_TK, plan, config)
        dweights_TK = dweights_R.index_select(0, plan.inverse_R).view_as(weights_TK)
        slabs: GradientSlabs | None = ctx.slabs
        to_down: dict[str, Any] = (
            {} if slabs is None else {"out": slabs.down_EHI, "accumulate": slabs.accumulate}
        )
        to_up = {} if slabs is None else to_down | {"out": slabs.gate_up_E2IH}
        dw_EHI = dw_E2IH = None
        if need_down or slabs:
            dw_EHI = weight_grad(weighted_RI, dy_TH, plan, config, rows_first=False, **to_down)
        del weighted_RI
        if need_up or slabs:
            dw_E2IH = weight_grad(dpre_RP, x_TH, plan, config, rows_first=True, **to_up)
        if slabs is not None:
            dw_EHI = dw_E2IH = None
        dx_TH = None
        if need_x:
            dx_RH = project_rows(dpre_RP, w_E2IH, plan, config, config.input_grad, transposed=False)
            dx_TH = combine(dx_RH, plan, None)
        return dx_TH, dweights_TK if need_weights else None, dw_E2IH, dw_EHI, None, None, None


def moe_ffn(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w_gate_up_E2IH: Tensor,
    w_down_EHI: Tensor,
    *,
    plan: ExpertPlan | None = None,
    config: LayerConfig | None = None,
    slabs: GradientSlabs | None = None,
) -> Tensor:
    """Weighted sum over each token's experts of down(silu(gate x) * (up x)), differentiable.

    Args:
        x_TH: bf16, fp16 or fp32 tokens on the GPU; T may be 0.
        topk_ids_TK: integer expert ids.
        topk_weights_TK: fp32 routing weights.
        w_gate_up_E2IH: x's dtype, gate rows first, then up rows.
        w_down_EHI: x's dtype.
        plan: the map of these ids from `route_and_plan` or `plan_experts`, if at hand; its tile rows
            must be the configuration's.
        config: tiles; None chooses by dtype.
        slabs: where the backward pass puts the weights' gradients (which are then none); some input must
            require a gradient, or there is no backward pass.

    Returns:
        y_TH in x's dtype, summed over k in slot order in fp32; the same bits in every run.
    """
    config = config or default_config(x_TH)
    if plan is None:
        plan = plan_experts(topk_ids_TK, w_down_EHI.shape[0], tile_rows=config.m)
    if plan.tile_rows != config.m:
        raise ValueError(f"the plan has tiles of {plan.tile_rows} rows, the configuration {config.m}")
    y: Tensor = _MoeFfn.apply(
        x_TH.contiguous(),
        topk_weights_TK.contiguous(),
        w_gate_up_E2IH.contiguous(),
        w_down_EHI.contiguous(),
        plan,
        config,
        slabs,
    )
    return y
