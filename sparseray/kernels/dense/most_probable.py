"""The most probable token of each row, and whether its logits are numbers, in one pass over them.

Of equal logits the first counts, as `torch.max` has it. Plain form: `PagedPlainOps.most_probable`.

Shapes: R rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel


@triton.jit
def first_best(p_row, V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr):
    """The first of a row's largest values, and NO_TOKEN (-1) where one is no number or infinite."""
    o_v = tl.arange(0, BV)
    best = tl.full([BV], float("-inf"), tl.float32)
    where = o_v
    wrong = tl.zeros([BV], tl.int32)
    for start in tl.range(0, V, BV, num_stages=STAGES):
        x = tl.load(p_row + start + o_v, mask=o_v < V - start, other=float("-inf")).to(tl.float32)
        wrong += (x != x).to(tl.int32)
        where = tl.where(x > best, start + o_v, where)
        best = tl.where(x > best, x, best)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, where, V), 0)
    is_finite = (tl.sum(wrong, 0) == 0) & (top < float("inf")) & (top > float("-inf"))
    return tl.where(is_finite, first, -1)


@triton.jit
def _rows_kernel(p_logits, p_out, V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr):
    """One program a row."""
    i_r = tl.program_id(0).to(tl.int64)
    tl.store(p_out + i_r, first_best(p_logits + i_r * V, V, BV, STAGES).to(tl.int64))


def row_tile(vocab: int) -> dict[str, int]:
    """Compile-time arguments and warps of a kernel that reads whole rows of logits."""
    return {"V": vocab, "BV": min(4096, triton.next_power_of_2(vocab)), "STAGES": 3, "num_warps": 8}


def most_probable(logits_RV: Tensor) -> Tensor:
    """Tokens, int64 [R]; `NO_TOKEN` where a logit is no number, or the largest is infinite."""
    out_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    launch_kernel(
        _rows_kernel, (len(logits_RV),), logits_RV.contiguous(), out_R, **row_tile(logits_RV.shape[1])
    )
    return out_R
