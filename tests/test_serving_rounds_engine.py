"""An engine in rounds of which some come to no end: caches stay, and every token is as undisturbed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from serving_parts import MAX_MODEL_LEN, Parts, finish, make_parts, request_of, run
from test_serving_paged import prompt_of
from torch import Tensor

from sparseray.actors.serving.rounds_engine import InRounds, RoundsEngine
from sparseray.actors.serving.text_request import TokenEvent
from sparseray.errors import SlotLostError, SupersededError
from sparseray.kernels.ops import REFERENCE
from sparseray.model.config import DSEConfig

REQUESTS = [
    request_of("long", prompt_of(40, 1), seed=1, temperature=1.0),
    request_of("short", prompt_of(3, 2), temperature=0.0),
    request_of("shares", prompt_of(40, 1), seed=7, temperature=1.0),
]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts(REFERENCE, dse=DSEConfig(layers=()))


class Place:
    """Where the engine stands: alone, with calls that fail.

    Args:
        parts: has all experts.
        fails: by the number of the call, what it raises.
    """

    step_open = 1

    def __init__(self, parts: Parts, fails: dict[int, Exception]) -> None:
        self.parts, self.fails, self.calls = parts, fails, 0

    def current(self) -> Any:
        return SimpleNamespace(experts=self.experts)

    def experts(self, *arguments: Any) -> Tensor:
        self.calls += 1
        if (error := self.fails.get(self.calls)) is not None:
            raise error
        return cast(Tensor, self.parts.experts(*arguments))


def answers(
    parts: Parts, fails: dict[int, Exception], *, resumed: int = 0
) -> tuple[dict[str, list[int]], Place]:
    """Tokens of all requests; of the first, some were given by another engine."""
    place, sizes = Place(parts, fails), {"max_batch": 8, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 16}
    engine = RoundsEngine(parts.model, InRounds(cast(Any, place)), **sizes)
    place.calls = 0
    before = run(RoundsEngine(parts.model, InRounds(cast(Any, Place(parts, {}))), **sizes), REQUESTS[:1])[
        "long"
    ]
    known = [event.token_id for event in before if event.token_id is not None][:resumed]
    engine.add(replace(REQUESTS[0], resume_tokens=tuple(known)))
    for request in REQUESTS[1:]:
        engine.add(request)
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        try:
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
        except (SupersededError, SlotLostError):
            assert engine.stats.failed_steps == 0
    assert engine.cache_usage == 0.0
    found = {name: [e.token_id for e in of if e.token_id is not None] for name, of in events.items()}
    found["long"] = known + found["long"]
    return found, place


@pytest.mark.one_in(2)
@pytest.mark.parametrize("resumed", [0, 6])
def test_a_round_that_ends_anywhere_changes_no_token(resumed: int, parts: Parts) -> None:
    wanted, undisturbed = answers(parts, {})
    assert [len(tokens) for tokens in wanted.values()] == [12, 12, 12]
    for call in range(1, undisturbed.calls, 3):
        fails: dict[int, Exception] = {call: SupersededError(), call + 2: SlotLostError("one is gone", [1])}
        found, _ = answers(parts, fails, resumed=resumed)
        assert found == wanted, call


def test_a_failed_step_is_still_a_failure(parts: Parts) -> None:
    place = Place(parts, {9: ConnectionError("something else")})
    engine = RoundsEngine(parts.model, InRounds(cast(Any, place)), max_batch=8, max_model_len=MAX_MODEL_LEN)
    place.calls = 0
    for request in REQUESTS:
        engine.add(request)
    with pytest.raises(ConnectionError):
        finish(engine)
    assert engine.stats.failed_steps == 1
