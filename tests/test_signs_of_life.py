"""Who answers, and who may go: both are pure values, stepped by hand."""

from sparseray.jobs.http.signs_of_life import PING_S, SILENT_S, STALL_S, SignsOfLife
from sparseray.platform.planning.drains import ASK_S, Drains

TICK_S = 0.1


def test_an_engine_is_silent_until_it_answers_and_again_once_a_ping_is_unanswered() -> None:
    life, now = SignsOfLife(), 100.0
    assert life.look([0, 1], now) == [0, 1]
    assert life.silent == {0, 1}
    life.heard(0, now)
    life.heard(1, now)
    assert life.silent == set()
    pinged = []
    for _ in range(round((PING_S + SILENT_S) / TICK_S) + 2):
        now += TICK_S
        due = life.look([0, 1], now)
        pinged += due
        if 0 in due:
            life.heard(0, now)
    assert life.silent == {1}
    # It is asked on, so that it is found when it comes back.
    assert pinged.count(1) >= 3
    life.heard(1, now)
    assert life.silent == set()


def test_silence_while_this_process_stood_still_says_nothing() -> None:
    life, now = SignsOfLife(), 100.0
    life.look([0], now)
    life.heard(0, now)
    now += PING_S + TICK_S
    assert life.look([0], now) == [0]
    now += 10.0
    life.look([0], now)
    assert life.silent == set()
    for _ in range(round(SILENT_S / STALL_S * 4)):
        now += STALL_S / 2
        life.look([0], now)
    assert life.silent == {0}


def test_engines_that_are_gone_are_forgotten() -> None:
    life = SignsOfLife()
    life.look([0, 1], 100.0)
    life.look([1], 100.1)
    assert life.silent == {1}
    assert life.look([0, 1], 100.2) == [0]


def test_a_drain_is_over_once_all_have_finished_or_had_their_time() -> None:
    drains = Drains(5.0)
    assert drains.is_over(0.0)
    assert drains.begin({2, 1}, 10.0) and not drains.begin([1, 2], 10.5)
    assert drains.leaving == (1, 2)
    assert drains.is_due(10.0) and not drains.is_due(10.0 + ASK_S / 2) and drains.is_due(10.0 + ASK_S)
    drains.told(1, 0)
    assert not drains.is_over(11.0)
    drains.told(2, 3)
    assert not drains.is_over(14.9) and drains.is_over(15.0)
    drains.told(2, 0)
    assert drains.is_over(11.0)
    # Whoever else is to leave gets all the time again.
    assert drains.begin({3}, 20.0) and not drains.is_over(20.0)
