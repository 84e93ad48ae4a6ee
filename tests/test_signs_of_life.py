"""Who answers, and who may go: both are pure values, stepped by hand."""

from sparseray.jobs.http.signs_of_life import PING_S, SILENT_S, STALL_S, SignsOfLife
from sparseray.platform.planning.drains import ASK_S, Drains
from sparseray.platform.planning.gathers import Gathers

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


def test_what_a_plan_gives_is_asked_for_until_it_was_read_or_took_too_long() -> None:
    gathers, two = Gathers(), (("expert", 0, 1), ("expert", 0, 2))
    gathers.begin({3: two, 4: two[:1], 5: ()}, 10.0)
    assert gathers.due(10.0) == {3: two, 4: two[:1]} and gathers.due(10.2) == {}
    gathers.told(3, two)
    # Of another wish, and of nobody.
    gathers.told(4, two)
    gathers.told(9, two)
    assert gathers.due(10.6) == {4: two[:1]} and not gathers.is_over(10.6)
    # The same once more changes nothing; another wish begins anew.
    gathers.begin({3: two, 4: two[:1]}, 11.0)
    assert not gathers.is_over(69.0) and gathers.is_over(70.0)
    gathers.told(4, two[:1])
    assert gathers.is_over(12.0)
    gathers.begin({4: two}, 12.0)
    assert gathers.due(12.0) == {4: two} and not gathers.is_over(71.0)
    gathers.begin({}, 13.0)
    assert gathers.is_over(13.0)
