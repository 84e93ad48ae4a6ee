"""Decoding with drafts on the device: where a step's rows lie, which drafts stand, and what the next step begins with.

A step of a sequence has two rows: its newest token and the draft after it. Newest token, draft and length of every slot
stay on the device (actors/serving/drafting_model.py); what a step computes of them in between is three launches here,
where single operations of torch would be fifty. The plain twins are in paged_plain_ops.py.

Shapes: S slots, B sequences, R rows, W pages of a sequence, V vocabulary.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.dense.draw import drawn_token
from sparseray.kernels.dense.most_probable import row_tile
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.paged import DraftDraws, DraftState, Pages


@triton.jit
def _rows_kernel(
    p_slots, p_latest, p_draft, p_length, p_table, p_tokens, p_positions, p_places, p_lens, p_own, width,
    PAGE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One program a sequence."""
    i_b = tl.program_id(0)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    length = tl.load(p_length + slot)
    p_table += slot * width
    for start in range(0, width, BW):
        o_w = start + tl.arange(0, BW)
        tl.store(p_own + i_b * width + o_w, tl.load(p_table + o_w, mask=o_w < width), mask=o_w < width)
    o_n = tl.arange(0, 2)
    position = length + o_n
    page = tl.load(p_table + position // PAGE)
    o_row = 2 * i_b + o_n
    tl.store(p_tokens + o_row, tl.where(o_n == 0, tl.load(p_latest + slot), tl.load(p_draft + slot)))
    tl.store(p_positions + o_row, position)
    tl.store(p_places + o_row, page * PAGE + position % PAGE)
    tl.store(p_lens + i_b, length + 2)


@triton.jit
def _token_at(
    p_logits, i_b, i_n, at, p_temperature, p_min_p, p_numbers, V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The token of a sequence's row, by one of its numbers."""
    temperature, min_p = tl.load(p_temperature + i_b), tl.load(p_min_p + i_b)
    number = tl.load(p_numbers + 4 * i_b + at)
    return drawn_token(p_logits + (2 * i_b + i_n).to(tl.int64) * V, temperature, min_p, number, V, BV, STAGES)


@triton.jit
def _judge_kernel(
    p_logits, p_least, p_temperature, p_min_p, p_numbers, p_slots, p_draft, p_length, p_outcome, p_tokens,
    V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    i_b, i_n = tl.program_id(0), tl.program_id(1)
    slot = tl.load(p_slots + i_b)
    at = tl.load(p_length + slot) - tl.load(p_least + i_b) + i_n
    token = _token_at(p_logits, i_b, i_n, at, p_temperature, p_min_p, p_numbers, V, BV, STAGES)
    tl.store(p_outcome + 3 * i_b + i_n, token)
    tl.store(p_tokens + 2 * i_b + i_n, tl.maximum(token, 0))
    if i_n == 0:
        tl.store(p_outcome + 3 * i_b + 2, (token == tl.load(p_draft + slot)).to(tl.int32))


@triton.jit
def _next_kernel(
    p_logits, p_least, p_temperature, p_min_p, p_numbers, p_slots, p_outcome, p_latest, p_draft, p_length,
    V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a sequence."""
    i_b = tl.program_id(0)
    slot = tl.load(p_slots + i_b)
    accepted = tl.load(p_outcome + 3 * i_b + 2)
    length = tl.load(p_length + slot) + 1 + accepted
    at = length - tl.load(p_least + i_b)
    draft = _token_at(p_logits, i_b, accepted, at, p_temperature, p_min_p, p_numbers, V, BV, STAGES)
    tl.store(p_draft + slot, tl.maximum(draft, 0))
    tl.store(p_latest + slot, tl.maximum(tl.load(p_outcome + 3 * i_b + accepted), 0))
    tl.store(p_length + slot, tl.where(slot > 0, length, 0))


def draft_rows(
    state: DraftState, slots_B: Tensor, table_SW: Tensor, pages: Pages, tokens_R: Tensor, positions_R: Tensor
) -> None:
    """As `PagedOps.draft_rows`, in one launch; the arguments as there, all int32 and contiguous."""
    launch_kernel(
        _rows_kernel, (len(slots_B),), slots_B, state.latest_S, state.draft_S, state.length_S, table_SW, tokens_R,
        positions_R, pages.places_R, pages.context_lens_B, pages.table_BW, table_SW.shape[1],
        PAGE=pages.page, BW=min(1024, triton.next_power_of_2(table_SW.shape[1])), num_warps=1,
    )  # fmt: skip


def judge_drafts(
    logits_RV: Tensor,
    draws: DraftDraws,
    state: DraftState,
    slots_B: Tensor,
    outcome_B3: Tensor,
    tokens_R: Tensor,
) -> None:
    """As `PagedOps.judge_drafts`, in one launch; the arguments as there, contiguous."""
    launch_kernel(
        _judge_kernel, (len(slots_B), 2), logits_RV, draws.least_B, draws.temperature_B, draws.min_p_B,
        draws.numbers_B4, slots_B, state.draft_S, state.length_S, outcome_B3, tokens_R, **row_tile(logits_RV.shape[1]),
    )  # fmt: skip


def next_drafts(
    logits_RV: Tensor, draws: DraftDraws, outcome_B3: Tensor, state: DraftState, slots_B: Tensor
) -> None:
    """As `PagedOps.next_drafts`, in one launch; the arguments as there, contiguous."""
    launch_kernel(
        _next_kernel, (len(slots_B),), logits_RV, draws.least_B, draws.temperature_B, draws.min_p_B, draws.numbers_B4,
        slots_B, outcome_B3, state.latest_S, state.draft_S, state.length_S, **row_tile(logits_RV.shape[1]),
    )  # fmt: skip
