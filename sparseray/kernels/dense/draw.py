"""A token of each row of logits: drawn by a number in [0, 1), or the most probable one, without sorting them.

Tokens share [0, 1) in the order of their ids, as `sampler.sample` has it where nothing cuts the tail. A row is read three
times by one program: for its best token, for the sum of all weights, and up to where the sum passes the number. Weights are
float64, as on the host. Plain form: `PagedPlainOps.draw`.

Shapes: R rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.dense.most_probable import first_best, row_tile
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.paged import Draws


@triton.jit
def _weights(p_row, start, best, temperature, min_p, V: tl.constexpr, BV: tl.constexpr):
    """exp of a block's logits below the best one, 0 beyond the row, NaN for a logit that is no finite number."""
    o_v = tl.arange(0, BV)
    m_v = o_v < V - start
    x = tl.load(p_row + start + o_v, mask=m_v, other=float("-inf")).to(tl.float64)
    weights = tl.exp((x - best) / temperature)
    weights = tl.where(weights < min_p, 0.0, weights)
    return tl.where(m_v & (x == float("-inf")), float("nan"), weights)


@triton.jit
def drawn_token(
    p_row, temperature, min_p, number, V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The token of a row: see `PagedOps.draw`."""
    token = first_best(p_row, V, BV, STAGES)
    if (temperature > 0.0) & (token >= 0):
        best = tl.load(p_row + token).to(tl.float64)
        total = best * 0.0
        for start in range(0, V, BV):
            total += tl.sum(_weights(p_row, start, best, temperature, min_p, V, BV), 0)
        wanted = number * total
        # The sums grow as above, so the last one is the total, which is more than what is wanted.
        stop, before, upto = 0, total * 0.0, total * 0.0
        while (upto <= wanted) & (stop < V):
            before = upto
            upto += tl.sum(_weights(p_row, stop, best, temperature, min_p, V, BV), 0)
            stop += BV
        weights = _weights(p_row, stop - BV, best, temperature, min_p, V, BV)
        o_v = stop - BV + tl.arange(0, BV)
        passed = tl.min(tl.where(before + tl.cumsum(weights, 0) > wanted, o_v, V), 0)
        # By rounding, the sum of a block may pass what its last partial sum does not.
        passed = tl.minimum(passed, tl.max(tl.where(weights > 0.0, o_v, -1), 0))
        token = tl.where(total == total, passed, -1)
    return token


@triton.jit(do_not_specialize_on_alignment=["p_temperature", "p_min_p", "p_number"])
def _draw_kernel(
    p_logits, p_temperature, p_min_p, p_number, p_out, V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """One program a row."""
    i_r = tl.program_id(0).to(tl.int64)
    temperature, min_p = tl.load(p_temperature + i_r), tl.load(p_min_p + i_r)
    token = drawn_token(p_logits + i_r * V, temperature, min_p, tl.load(p_number + i_r), V, BV, STAGES)
    tl.store(p_out + i_r, token.to(tl.int64))


def draw(logits_RV: Tensor, draws: Draws) -> Tensor:
    """As `PagedOps.draw`, in one launch."""
    out_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    launch_kernel(
        _draw_kernel, (len(logits_RV),), logits_RV.contiguous(), draws.temperature_R, draws.min_p_R, draws.number_R,
        out_R, **row_tile(logits_RV.shape[1]),
    )  # fmt: skip
    return out_R
