"""The sampler: what may be drawn, and what is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from serving_parts import request_of

from sparseray.actors.serving.sampler import (
    Float64,
    adjusted,
    log_probabilities,
    sample,
    token_logprobs,
    uniform,
)

P_V = np.array([0.1, 0.5, 0.15, 0.25])


def drawn(scores_V: Float64, count: int = 4000, **options: Any) -> Float64:
    """Shares of the tokens in many draws."""
    request = request_of("a", (1,), **{"seed": 7, **options})
    tokens = [sample(scores_V, request, position=i) for i in range(count)]
    return np.bincount(tokens, minlength=scores_V.size) / count


def scores(
    logits: list[float], tokens: tuple[int, ...] = (0,), prompt: int = 1, **options: Any
) -> list[float]:
    """Logits after the rules of a request whose prompt is the first of its tokens."""
    request = request_of("a", tokens[:prompt], **options)
    return adjusted(np.array(logits, dtype=np.float32), request, tokens, None).tolist()


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    request = request_of("a", (1,), temperature=0.0)
    assert sample(np.array([0.0, 2.0, 2.0, 1.0]), request, position=0) == 1


def test_samples_follow_the_tempered_distribution_and_top_p_cuts_its_tail() -> None:
    np.testing.assert_allclose(drawn(np.log(P_V)), P_V, atol=0.03)
    cold_V = P_V**2 / (P_V**2).sum()
    np.testing.assert_allclose(drawn(np.log(P_V), temperature=0.5), cold_V, atol=0.03)
    assert set(np.flatnonzero(drawn(np.log(P_V), 500, top_p=0.7))) == {1, 3}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"min_p": 0.4}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        # min_p is of the tempered probabilities: 0.25/0.5 squared is below it.
        ({"min_p": 0.4, "temperature": 0.5}, {1}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),
        # What top_k leaves is the whole for top_p: 0.5 of 0.75 is less than 0.7.
        ({"top_k": 2, "top_p": 0.7}, {1, 3}),
    ],
)
def test_top_k_and_min_p_cut_the_tail(options: dict[str, Any], kept: set[int]) -> None:
    shares_V = drawn(np.log(P_V), 600, **options)
    assert set(np.flatnonzero(shares_V)) == kept
    expected_V = np.where(np.isin(np.arange(4), list(kept)), P_V, 0.0) ** (
        1 / options.get("temperature", 1.0)
    )
    np.testing.assert_allclose(shares_V, expected_V / expected_V.sum(), atol=0.08)


def test_a_draw_does_not_change_when_nothing_is_cut() -> None:
    plain, request = request_of("a", (1,), seed=3), request_of("a", (1,), seed=3, top_k=4)
    rng = np.random.default_rng(0)
    for position in range(50):
        scores_V = rng.normal(size=4)
        assert np.argmax(scores_V) == sample(scores_V, request_of("a", (1,), top_k=1), position=position)
        assert sample(scores_V, plain, position=position) in range(4)
        assert sample(scores_V, request, position=position) in range(4)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer() -> None:
    found = scores([2.0, -2.0, 3.0, 1.0], tokens=(0, 1, 1), prompt=2, repetition_penalty=2.0)
    assert found == [1.0, -4.0, 3.0, 1.0]


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    options = {"tokens": (0, 1, 1, 2), "prompt": 1}
    assert scores([1.0, 1.0, 1.0, 1.0], **options, presence_penalty=0.5) == [1.0, 0.5, 0.5, 1.0]
    assert scores([1.0, 1.0, 1.0, 1.0], **options, frequency_penalty=0.5) == [1.0, 0.0, 0.5, 1.0]
    assert scores([1.0] * 4, **options, frequency_penalty=-1.0, presence_penalty=1.0) == [1.0, 2.0, 1.0, 1.0]


def test_biases_and_bars() -> None:
    inf = float("inf")
    assert scores([1.0, 2.0], logit_bias=((0, 4.0), (1, -100.0))) == [5.0, -98.0]
    assert scores([1.0, 2.0, 3.0], allowed_token_ids=(0, 2)) == [1.0, -inf, 3.0]
    assert scores([1.0, 2.0], stop_token_ids=(1,), min_tokens=1) == [1.0, -inf]
    assert scores([1.0, 2.0], tokens=(0, 0), stop_token_ids=(1,), min_tokens=1) == [1.0, 2.0]
    mask_V = np.array([True, False])
    request = request_of("a", (0,))
    assert adjusted(np.array([1.0, 2.0]), request, (0,), mask_V).tolist() == [1.0, -inf]
    # A bias does not open what is barred.
    assert scores([1.0, 2.0], allowed_token_ids=(0,), logit_bias=((1, 100.0),)) == [1.0, -inf]


def test_a_bad_word_of_several_tokens_is_barred_at_its_last_one_only() -> None:
    inf = float("inf")
    words = ((1, 2), (3,))
    assert scores([1.0] * 4, tokens=(0,), bad_words=words) == [1.0, 1.0, 1.0, -inf]
    assert scores([1.0] * 4, tokens=(0, 1), bad_words=words) == [1.0, 1.0, -inf, -inf]
    # Of the prompt's tokens none counts, as in vLLM.
    assert scores([1.0] * 4, tokens=(0, 1), prompt=2, bad_words=words) == [1.0, 1.0, 1.0, -inf]


def test_nothing_is_drawn_where_everything_is_barred() -> None:
    assert sample(np.full(3, -np.inf), request_of("a", (1,)), position=0) is None
    assert sample(np.full(3, -np.inf), request_of("a", (1,), temperature=0.0), position=0) is None


def test_random_numbers_depend_on_seed_and_position_only() -> None:
    assert uniform(5, 9) == uniform(5 + 2**64, 9)
    assert len({uniform(seed, position) for seed in range(20) for position in range(20)}) == 400


def test_damaged_logits_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        log_probabilities(np.array([0.0, np.nan]))
    with pytest.raises(FloatingPointError, match="not finite"):
        scores([0.0, float("inf")])


def test_top_logprobs_are_the_best_tokens_in_order() -> None:
    logprobs_V = log_probabilities(np.array([1.0, 3.0, 3.0, 2.0]))
    found = token_logprobs(logprobs_V, 0, 3)
    assert [token for token, _ in found.top] == [1, 2, 3]
    assert found.rank == 4
    assert found.logprob == pytest.approx(1.0 - np.log(np.exp([1.0, 3.0, 3.0, 2.0]).sum()))
