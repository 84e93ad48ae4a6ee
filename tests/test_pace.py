"""What a slot of a server tells of its load: every request, token and step once, and nothing of cold engines."""

from sparseray.actors.serving.engine import EngineStats
from sparseray.actors.serving.messages import EngineLoad, Load
from sparseray.actors.serving.pace import COLD_STEPS, EVERY_S, Pace, bucket, bucket_s
from sparseray.actors.serving.text_request import TokenEvent
from sparseray.actors.wire.envelope import Message, decode, encode

STATS = EngineStats(waiting=1, running=2)


def token(name: str, index: int, finish: str | None = None) -> TokenEvent:
    return TokenEvent(request_id=name, index=index, token_id=7, finish_reason=finish)


def engine_of(load: Load) -> EngineLoad:
    assert load.engine is not None
    return load.engine


def test_latencies_are_told_once_and_a_request_that_goes_on_is_no_new_load() -> None:
    pace = Pace(0.0)
    pace.arrived("a", 0.0, is_resumed=False)
    pace.arrived("b", 0.1, is_resumed=True)
    pace.stepped(0.2, 2, [token("a", 0), token("b", 5)], 0.2)
    pace.stepped(0.1, 2, [token("a", 1), token("b", 6, "length")], 0.3)
    pace.left("a")
    pace.stepped(0.1, 1, [token("a", 2)], 0.4)
    assert not pace.is_due(EVERY_S - 0.01) and pace.is_due(EVERY_S)
    load = engine_of(pace.take(0.5, STATS, 0.25))
    assert (load.arrived, load.finished, load.finished_tokens, load.tokens) == (1, 1, 2, 4)
    assert (load.steps, load.rows, load.waiting, load.running, load.cache_usage) == (3, 5, 1, 2, 0.25)
    assert load.ttft == {bucket(0.2): 1}
    assert load.itl == {bucket(0.1): 3}
    after = engine_of(pace.take(1.0, STATS, 0.0))
    assert (after.steps, after.tokens, after.arrived, after.itl) == (0, 0, 0, {})


def test_an_engine_is_cold_in_its_first_steps_and_another_one_is_cold_again() -> None:
    pace = Pace(0.0)
    for step in range(COLD_STEPS):
        pace.stepped(0.1, 1, [], step * 0.1)
    assert engine_of(pace.take(2.0, STATS, 0.0)).is_cold
    pace.stepped(0.1, 1, [], 2.1)
    assert not engine_of(pace.take(2.5, STATS, 0.0)).is_cold
    pace.new_engine()
    assert engine_of(pace.take(3.0, STATS, 0.0)).is_cold
    assert pace.take(3.5, None, 0.0).engine is None


def test_buckets_are_a_tenth_apart() -> None:
    for seconds in (0.0004, 0.02, 1.0, 30.0):
        assert abs(bucket_s(bucket(seconds)) / seconds - 1) < 0.05


def test_a_load_travels_as_it_is() -> None:
    pace = Pace(0.0)
    pace.answered("experts", 0.25)
    pace.arrived("a", 0.0, is_resumed=False)
    pace.stepped(0.2, 1, [token("a", 0)], 0.2)
    load = pace.take(0.5, STATS, 0.25)
    found = decode(encode(Message(body=load, source=3, generation=1, sequence=1), "job"), "job")
    assert found is not None and found.body == load
    assert load.answered_s == {"experts": 0.25}
