"""What a slot shows of its engine: an idle one shows nothing at hand, however its requests ended."""

from typing import Any

import pytest
from serving_parts import Parts, request_of

from sparseray.actors.engine_role import EngineRole
from sparseray.actors.exchange.patience import Patience
from sparseray.actors.serving.messages import Cancel, Generate
from sparseray.actors.wire.envelope import Message

GAUGES = ("requests_running", "requests_waiting", "cache_usage_ratio")


class Shown:
    """A job that makes the test's engine and keeps the last value of each gauge; and a mailbox that keeps nothing."""

    is_serving = True
    is_in_rounds = False

    def __init__(self, parts: Parts) -> None:
        self.made, self.last = parts.engine(max_batch=2), dict[str, float]()

    def engine(self, *_: Any) -> Any:
        return self.made

    def observe(self, name: str, value: float, **_: str) -> None:
        self.last[name] = value

    def post(self, *_: Any) -> None:
        """Nobody listens."""

    def gauges(self) -> list[float]:
        return [self.last[name] for name in GAUGES]


def message_of(body: Any) -> Message[Any]:
    return Message(source=0, generation=0, sequence=0, body=body)


@pytest.mark.parametrize("end", ["cancelled", "dropped"])
def test_an_engine_without_requests_shows_nothing_at_hand(parts: Parts, end: str) -> None:
    shown = Shown(parts)
    role = EngineRole(shown, lambda message: None, Patience())  # type: ignore[arg-type]
    role.take(shown, parts.model, None, 0)
    for name in "abc":
        role.handlers[Generate](message_of(Generate(request=request_of(name, (1, 2, 3), max_tokens=99))))
    role.step()
    running, waiting, usage = shown.gauges()
    assert (running, waiting) == (2, 1) and usage > 0
    if end == "dropped":
        role.drop()
    else:
        for name in "abc":
            role.handlers[Cancel](message_of(Cancel(request_id=name)))
    assert shown.gauges() == [0, 0, 0]
