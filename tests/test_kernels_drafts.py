"""What a step with drafts computes between two passes of the network: kernels against their plain twins."""

from __future__ import annotations

import copy

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)

from sparseray.kernels.ops import REFERENCE, Pages
from sparseray.kernels.paged import NO_TOKEN, DraftState
from sparseray.kernels.triton_ops import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS, WIDTH, PAGE = 6, 5, 16


def state_of() -> DraftState:
    values = torch.randint(0, 40, (2, SLOTS), dtype=torch.int32)
    length_S = torch.tensor([0, 31, 15, 16, 60, 3], dtype=torch.int32)
    latest_S, draft_S, length_S = (x.to(DEVICE) for x in (*values, length_S))
    return DraftState(latest_S=latest_S.clone(), draft_S=draft_S.clone(), length_S=length_S)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_of_equal_logits_is_the_most_probable_token(dtype: torch.dtype) -> None:
    logits_RV = torch.randint(-3, 4, (6, 5000)).to(DEVICE, dtype)
    logits_RV[1, 7], logits_RV[2, 9], logits_RV[3, 4], logits_RV[4] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    found_R = TRITON.most_probable(logits_RV)
    assert torch.equal(found_R, REFERENCE.most_probable(logits_RV))
    assert [int(token) == NO_TOKEN for token in found_R] == [False, True, True, False, True, False]


@pytest.mark.parametrize("vocab", [40, 5000])
def test_a_step_with_drafts_equals_its_plain_twin(vocab: int) -> None:
    torch.manual_seed(0)
    slots_B = torch.tensor([4, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    table_SW = torch.randint(1, 99, (SLOTS, WIDTH), dtype=torch.int32).to(DEVICE)
    # Few different values: the first of the largest counts.
    logits_RV, further_RV = torch.randint(-3, 4, (2, 8, vocab)).to(DEVICE, torch.bfloat16)
    logits_RV[2, 7], logits_RV[5, 9] = torch.nan, torch.inf
    state = state_of()
    # The first sequence's draft stands, and so does the last one's.
    for row, slot in ((0, 4), (6, 0)):
        state.draft_S[slot] = logits_RV[row].float().argmax()
    found = []
    for ops in (REFERENCE, TRITON):
        own = copy.deepcopy(state)
        tokens_R, positions_R, places_R = (
            torch.zeros(10, dtype=torch.int32, device=DEVICE) for _ in range(3)
        )
        pages = Pages(
            page=PAGE,
            table_BW=table_SW.new_zeros(4, WIDTH),
            context_lens_B=torch.zeros_like(slots_B),
            places_R=places_R,
            num_new=2,
        )
        ops.draft_rows(own, slots_B, table_SW, pages, tokens_R, positions_R)
        rows = [tokens_R.clone(), positions_R, places_R, pages.table_BW, pages.context_lens_B]
        outcome_B3 = torch.zeros(4, 3, dtype=torch.int32, device=DEVICE)
        ops.judge_drafts(logits_RV, own, slots_B, outcome_B3, tokens_R)
        ops.next_drafts(further_RV, outcome_B3, own, slots_B)
        found.append([*rows, tokens_R, outcome_B3, own.latest_S, own.draft_S, own.length_S])
    for plain, fast in zip(*found):
        assert torch.equal(plain, fast)
    outcome_B3, length_S = found[1][6], found[1][9]
    assert outcome_B3[:, 2].tolist() == [1, *outcome_B3[1:3, 2].tolist(), 1]
    assert outcome_B3[1, 0] == NO_TOKEN and outcome_B3[2, 1] == NO_TOKEN
    assert length_S.tolist()[4] == 62 and length_S.tolist()[0] == 0
