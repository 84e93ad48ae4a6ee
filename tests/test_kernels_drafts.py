"""What a step with drafts computes between two passes of the network: kernels against their plain twins."""

from __future__ import annotations

import copy

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from torch import Tensor

from sparseray.kernels import paged
from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.ops import REFERENCE, Pages
from sparseray.kernels.paged import NO_TOKEN, DraftDraws, DraftState, Draws, History
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 37, 4096, 9001])
def test_a_token_is_drawn_where_the_sum_of_weights_passes_its_number(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    rows = 24
    logits_RV = (3 * torch.randn(rows, vocab)).to(DEVICE, dtype)
    # At both ends of [0, 1), and in between.
    number_R = torch.rand(rows, dtype=torch.float64)
    number_R[:4] = torch.tensor([0.0, 1.0 - 2.0**-53, 2.0**-53, 0.5], dtype=torch.float64)
    temperature_R = torch.tensor([0.7, 1.0, 1.5, 0.0, 40.0, 1e-3], dtype=torch.float64).repeat(4)
    min_p_R = torch.tensor([0.0, 0.0, 0.05, 1.0], dtype=torch.float64).repeat_interleave(6)
    draws = Draws(
        temperature_R=temperature_R.to(DEVICE), min_p_R=min_p_R.to(DEVICE), number_R=number_R.to(DEVICE)
    )
    found_R = TRITON.draw(logits_RV, draws)
    assert torch.equal(found_R, REFERENCE.draw(logits_RV, draws))
    assert int(found_R.min()) >= 0 and int(found_R.max()) < vocab
    greedy_R = temperature_R == 0.0
    assert torch.equal(found_R[greedy_R], logits_RV[greedy_R].argmax(-1))


def test_nothing_is_drawn_from_damaged_logits() -> None:
    logits_RV = torch.randn(6, 5000, device=DEVICE)
    logits_RV[1, 4999], logits_RV[2, 9], logits_RV[3, 4998], logits_RV[4] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    one_R = torch.ones(6, dtype=torch.float64, device=DEVICE)
    for temperature, damaged in ((1.0, [1, 2, 3, 4]), (0.0, [1, 2, 4])):
        draws = Draws(temperature_R=temperature * one_R, min_p_R=0 * one_R, number_R=0.3 * one_R)
        found_R = TRITON.draw(logits_RV, draws)
        assert torch.equal(found_R, REFERENCE.draw(logits_RV, draws))
        assert [i for i, token in enumerate(found_R.tolist()) if token == NO_TOKEN] == damaged


def draws_of(least_B: list[int]) -> DraftDraws:
    """Some that draw and some that do not; slot 0 draws nothing."""
    return DraftDraws(
        least_B=torch.tensor(least_B, dtype=torch.int32, device=DEVICE),
        temperature_B=torch.tensor([0.0, 1.0, 0.7, 0.0], dtype=torch.float64, device=DEVICE),
        min_p_B=torch.tensor([0.0, 0.0, 0.1, 0.0], dtype=torch.float64, device=DEVICE),
        numbers_B4=torch.rand(4, 4, dtype=torch.float64).to(DEVICE),
    )


# Slots 1 and 2 have 31 and 15 tokens: as many as the host knows of, or one more.
@pytest.mark.parametrize("least", [[60, 31, 15, 0], [59, 30, 14, 0]], ids=["known", "one more"])
@pytest.mark.parametrize("vocab", [40, 5000])
def test_a_step_with_drafts_equals_its_plain_twin(vocab: int, least: list[int]) -> None:
    torch.manual_seed(0)
    slots_B = torch.tensor([4, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    table_SW = torch.randint(1, 99, (SLOTS, WIDTH), dtype=torch.int32).to(DEVICE)
    # Few different values: the first of the largest counts.
    logits_RV, further_RV = torch.randint(-3, 4, (2, 8, vocab)).to(DEVICE, torch.bfloat16)
    logits_RV[2, 7], logits_RV[5, 9] = torch.nan, torch.inf
    state, draws = state_of(), draws_of(least)
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
        ops.judge_drafts(logits_RV, draws, own, slots_B, outcome_B3, tokens_R)
        ops.next_drafts(further_RV, draws, outcome_B3, own, slots_B)
        found.append([*rows, tokens_R, outcome_B3, own.latest_S, own.draft_S, own.length_S])
    for plain, fast in zip(*found):
        assert torch.equal(plain, fast)
    outcome_B3, length_S = found[1][6], found[1][9]
    assert outcome_B3[:, 2].tolist() == [1, *outcome_B3[1:3, 2].tolist(), 1]
    assert outcome_B3[1, 0] == NO_TOKEN and outcome_B3[2, 1] == NO_TOKEN
    assert length_S.tolist()[4] == 62 and length_S.tolist()[0] == 0


def number_at(draws: DraftDraws, row: int, at: int, logits_V: Tensor) -> int:
    """What is drawn by one of a sequence's numbers."""
    own = Draws(
        temperature_R=draws.temperature_B[row : row + 1],
        min_p_R=draws.min_p_B[row : row + 1],
        number_R=draws.numbers_B4[row, at : at + 1],
    )
    return int(REFERENCE.draw(logits_V[None], own))


@pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["plain", "kernels"])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("stands", [False, True])
def test_every_place_has_the_number_of_its_own(ops: type[REFERENCE], ahead: int, stands: bool) -> None:
    torch.manual_seed(7)
    slots_B = torch.tensor([1, 3, 2, 0], dtype=torch.int32, device=DEVICE)
    state, draws = state_of(), draws_of([31 - ahead, 16 - ahead, 15 - ahead, 0])
    logits_RV, further_RV = torch.randn(2, 8, 300).to(DEVICE)
    tokens_R, outcome_B3 = (
        slots_B.new_zeros(8),
        slots_B.new_zeros(4, 3),
    )
    wanted = [
        [number_at(draws, b, ahead * (b < 3) + n, logits_RV[2 * b + n]) for n in range(2)] for b in range(4)
    ]
    for b, slot in enumerate((1, 3, 2)):
        state.draft_S[slot] = wanted[b][0] if stands else (wanted[b][0] + 1) % 300
    ops.judge_drafts(logits_RV, draws, state, slots_B, outcome_B3, tokens_R)
    ops.next_drafts(further_RV, draws, outcome_B3, state, slots_B)
    assert outcome_B3[:3].tolist() == [[*wanted[b], int(stands)] for b in range(3)]
    for b, slot in enumerate((1, 3, 2)):
        draft = number_at(draws, b, ahead + 1 + stands, further_RV[2 * b + stands])
        assert int(state.draft_S[slot]) == draft
        assert int(state.latest_S[slot]) == wanted[b][int(stands)]


@pytest.mark.parametrize("is_cut", [False, True], ids=["one document", "documents"])
def test_a_convolution_goes_on_from_the_tokens_that_stand(is_cut: bool) -> None:
    """Two tokens at once, of which the second may not stand, and then one: as one after another."""
    torch.manual_seed(1)
    H, L, taps = 8, 9, 4
    fusion = Fusion(
        query_norm_C=torch.ones(H), key_norm_C=torch.ones(H), value_norm_C=torch.ones(H), conv_CK=torch.randn(H, taps),
        dilation=3, gate_eps=1e-6, conv_eps=1e-5,
    )  # fmt: skip
    begun_SLH, x_BNH, next_BH = torch.randn(4, L, H), torch.randn(3, 2, H), torch.randn(3, H)
    slots_B, accepted_B = torch.tensor([2, 1, 3]), torch.tensor([1, 0, 1])
    starts_BN = torch.tensor([[0, 1], [0, 1], [1, 0]]).bool() if is_cut else None

    def pages(num_new: int) -> Pages:
        places_R = torch.zeros(3 * num_new)
        return Pages(page=16, table_BW=torch.zeros(3, 1), context_lens_B=slots_B, places_R=places_R, num_new=num_new)  # fmt: skip

    def one(history: History, x_BH: Tensor, starts_B: Tensor | None) -> Tensor:
        return paged.convolve(REFERENCE.memory_conv, x_BH, fusion, history, pages(1), starts_B)

    slow = History(begun_SLH.clone(), slots_B, ())
    wanted = [one(slow, x_BNH[:, 0], None if starts_BN is None else starts_BN[:, 0])]
    after_SLH = slow.rows_SLH.clone()
    wanted.append(one(slow, x_BNH[:, 1], None if starts_BN is None else starts_BN[:, 1]))
    kept_S111 = torch.tensor([1, 0, 1, 1]).bool()[:, None, None]
    slow.rows_SLH.copy_(torch.where(kept_S111, slow.rows_SLH, after_SLH))
    wanted.append(one(slow, next_BH, None))

    fast, both = History(begun_SLH.clone(), slots_B, ()), pages(2)
    starts_R = None if starts_BN is None else starts_BN.flatten()
    found_RH = paged.convolve(REFERENCE.memory_conv, x_BNH.flatten(0, 1), fusion, fast, both, starts_R)
    assert torch.equal(fast.rows_SLH, begun_SLH), "nothing stands yet"
    paged.settle(fast, both, starts_R, accepted_B)
    assert torch.allclose(found_RH.view(3, 2, H), torch.stack(wanted[:2], 1), atol=1e-6)
    assert torch.allclose(one(fast, next_BH, None), wanted[2], atol=1e-6)
    assert torch.equal(fast.rows_SLH, slow.rows_SLH)
