"""Who is asked, and how long, when holders are silent: a pure value, stepped by hand."""

from sparseray.actors.exchange.patience import LEAST_S, TIMES, Patience


def test_the_first_holder_is_asked_until_it_is_silent_and_again_once_it_is_heard() -> None:
    patience = Patience(20.0)
    assert patience.choose((3, 4)) == 3
    patience.missed([3])
    assert patience.choose((3, 4)) == 4
    assert patience.choose((5, 3)) == 5
    patience.heard(3)
    assert patience.choose((3, 4)) == 3


def test_where_nobody_answers_the_longest_silent_holder_is_asked() -> None:
    patience = Patience(20.0)
    patience.missed([3])
    patience.missed([4])
    assert patience.choose((3, 4)) == patience.choose((4, 3)) == 3
    patience.missed([3])
    assert patience.choose((3, 4)) == 4


def test_a_call_may_take_some_times_what_calls_took_and_twice_as_long_after_each_miss() -> None:
    patience = Patience(20.0)
    for seconds in (0.001, 0.002):
        patience.answered([3], seconds)
    assert patience.within_s == LEAST_S
    patience.answered([3], 0.1)
    assert patience.within_s == 0.1 * TIMES
    patience.missed([3])
    patience.missed([4])
    assert patience.within_s == 0.4 * TIMES
    patience.answered([3], 0.001)
    assert patience.within_s == 0.1 * TIMES
    for _ in range(20):
        patience.missed([3])
    assert patience.within_s == 20.0
