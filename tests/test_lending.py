"""Lending: who gives how many slots, when they come back; a clock made of numbers."""

from dataclasses import replace

import pytest

from sparseray.platform.planning.inventory import Roles
from sparseray.platform.planning.lending import Lender, Lent, Loan, View, decide, to_spare

LEAST = Roles(attention=1, experts=1, memory=1)


def lender(attention: int = 2, experts: int = 2, memory: int = 2, **more: object) -> Lender:
    made = Lender(
        job="run",
        roles=Roles(attention=attention, experts=experts, memory=memory),
        standby=0,
        least=LEAST,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def view(*lenders: Lender, lacking: int = 0, room: int = 0, idle_s: float = 0.0) -> View:
    return View(lenders=lenders, lacking=lacking, room=room, idle_s=idle_s)


def test_nothing_is_lent_that_nobody_lacks() -> None:
    assert decide(view(lender()), 5.0) is None
    assert decide(view(lacking=3), 5.0) is None


def test_as_much_is_lent_as_is_lacking_in_one_change() -> None:
    assert decide(view(lender(), lacking=1), 5.0) == Loan(job="run", lent=Lent(attention=1), count=1)
    assert decide(view(lender(), lacking=2), 5.0) == Loan(
        job="run", lent=Lent(attention=1, experts=1), count=2
    )
    everything = Lent(attention=1, experts=1, memory=1)
    assert decide(view(lender(), lacking=9), 5.0) == Loan(job="run", lent=everything, count=3)


def test_spare_slots_go_first_and_come_back_last() -> None:
    spare = lender(standby=1)
    first = decide(view(spare, lacking=2), 5.0)
    assert first == Loan(job="run", lent=Lent(attention=1, standby=1), count=2)
    back = decide(view(replace(spare, lent=first.lent), room=1, idle_s=6.0), 5.0)
    assert back == Loan(job="run", lent=Lent(standby=1), count=-1)


def test_the_role_with_the_most_beyond_its_least_gives() -> None:
    steps = to_spare(lender(2, 4, 3))
    assert [(s.attention, s.experts, s.memory) for s in steps] == [
        (0, 1, 0),
        (0, 2, 0),
        (0, 2, 1),
        (1, 2, 1),
        (1, 3, 1),
        (1, 3, 2),
    ]


@pytest.mark.parametrize(
    ("least", "count"),
    [(LEAST, 3), (Roles(attention=2, experts=2, memory=2), 0), (Roles(attention=1, experts=2, memory=2), 1)],
)
def test_no_role_goes_below_its_least(least: Roles, count: int) -> None:
    assert len(to_spare(lender(least=least))) == count


def test_there_stay_as_many_slots_as_replicas() -> None:
    assert len(to_spare(lender(replication=5))) == 1
    assert to_spare(lender(replication=6)) == []


def test_slots_that_play_all_roles_are_lent_whole() -> None:
    shared = lender(3, 2, 3, colocated=True)
    steps = to_spare(shared)
    assert [s.slots(colocated=True) for s in steps] == [1, 2]
    assert steps[-1].left_of(shared.roles) == Roles(attention=1, experts=1, memory=1)
    back = decide(view(replace(shared, lent=steps[-1]), room=2, idle_s=6.0), 5.0)
    assert back == Loan(job="run", lent=Lent(), count=-2)


def test_a_run_whose_plan_changes_is_left_alone() -> None:
    busy = lender(is_settled=False)
    assert decide(view(busy, lacking=1), 5.0) is None
    other = replace(lender(2, 1, 1), job="other")
    assert decide(view(busy, other, lacking=1), 5.0) == Loan(job="other", lent=Lent(attention=1), count=1)


def test_the_run_with_the_most_to_spare_lends() -> None:
    rich = replace(lender(2, 6, 2), job="rich")
    found = decide(view(lender(), rich, lacking=1), 5.0)
    assert found is not None and found.job == "rich"


def test_slots_come_back_once_they_were_idle_for_a_while_and_nobody_lacks_any() -> None:
    lent = lender(lent=Lent(attention=1, experts=1))
    assert decide(view(lent, room=2, idle_s=4.9), 5.0) is None
    assert decide(view(lent, room=0, idle_s=9.0), 5.0) is None
    assert decide(view(lent, room=1, idle_s=5.0), 5.0) == Loan(job="run", lent=Lent(experts=1), count=-1)
    assert decide(view(lent, room=7, idle_s=5.0), 5.0) == Loan(job="run", lent=Lent(), count=-2)
    lacking = decide(view(lent, room=2, lacking=1, idle_s=9.0), 5.0)
    assert lacking is not None and lacking.count == 1


def test_a_loan_and_its_return_come_to_rest() -> None:
    """From lack to lack's end: one loan, then nothing; one return, then nothing."""
    run, changes = lender(), []
    for now in range(40):
        lacks = 2 if 5 <= now < 20 else 0
        held = run.lent.slots(colocated=False)
        lacking, idle = max(0, lacks - held), held - min(lacks, held)
        since = now - 20 if idle else 0
        loan = decide(view(run, lacking=lacking, room=idle, idle_s=float(since)), 10.0)
        if loan is not None:
            changes.append((now, loan.count))
            run = replace(run, lent=loan.lent)
    assert changes == [(5, 2), (30, -2)]
    assert run.lent == Lent()
