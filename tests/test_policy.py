"""The policy's decisions on made-up views, and that carrying one out ends the reason for it."""

from dataclasses import replace
from typing import Any

import pytest

from sparseray.actors.state.assignment import Plan
from sparseray.errors import ConfigError
from sparseray.platform.config import ClusterConfig
from sparseray.platform.planning.inventory import Inventory, Roles
from sparseray.platform.planning.policy import (
    Noop,
    Rebalance,
    Resize,
    Start,
    View,
    Withdraw,
    decide,
    imbalance,
)
from sparseray.platform.planning.replan import make_plan, replan
from sparseray.platform.planning.requests import check_request

ROLES = Roles(attention=2, experts=2, memory=2)
EVEN = [[10.0] * 8] * 2
SKEWED = [[70.0, 60.0, 50.0, 40.0, 1.0, 1.0, 1.0, 1.0]] * 2


def fresh(roles: Roles = ROLES, slots: int = 6) -> Plan:
    return make_plan(
        generation=1,
        addresses={slot: f"ipc://{slot}" for slot in range(slots)},
        inventory=Inventory(parts=4, moe_layers=2, experts=8, dse_layers=1, buckets=8),
        roles=roles,
        replication=2,
    )


def view(**changes: Any) -> View:
    values: dict[str, Any] = {
        "plan": fresh(),
        "roles": ROLES,
        "ready": (),
        "starting": 0,
        "free_slots": 0,
        "standby": 0,
        "expert_load": EVEN,
        "steps_since_change": 100,
        "rebalance_above": 1.3,
        "rebalance_every": 10,
        "colocated": False,
    }
    return View(**{**values, **changes})


def without(plan: Plan, *dead: int, spare: tuple[int, ...] = ()) -> Plan:
    left = {slot: address for slot, address in plan.addresses.items() if slot not in dead}
    added = {slot: f"ipc://{slot}" for slot in spare}
    return replan(plan, generation=2, addresses=left | added, roles=ROLES, replication=2)


def carry_out(seen: View) -> View:
    """What the policy would see after the scheduler did as it decided."""
    decision, plan = decide(seen), seen.plan
    if isinstance(decision, Start):
        return replace(
            seen, starting=seen.starting + decision.count, free_slots=seen.free_slots - decision.count
        )
    if isinstance(decision, Withdraw):
        left = seen.starting - decision.count
        return replace(seen, starting=left, waiting=seen.waiting - decision.count)
    if isinstance(decision, Noop):
        return seen
    loads = decision.loads if isinstance(decision, Rebalance) else None
    roles = decision.roles if isinstance(decision, Resize) else seen.roles
    new = replan(
        plan,
        generation=plan.generation + 1,
        addresses=plan.addresses | {slot: f"ipc://{slot}" for slot in seen.ready},
        roles=roles,
        replication=2,
        colocated=seen.colocated,
        loads=loads,
        avoid=decision.without if isinstance(decision, Resize) else (),
    )
    used = {*new.attention, *new.expert_primaries, *new.memory_primaries}
    return replace(seen, plan=new, ready=tuple(s for s in seen.ready if s not in used), steps_since_change=0)


def test_nothing_to_do_is_noop() -> None:
    assert decide(view()) == Noop()
    assert decide(view(standby=1, ready=(6,))) == Noop()
    assert decide(view(standby=1, starting=1)) == Noop()


def test_slots_that_are_wanted_no_more_are_asked_for_no_more() -> None:
    """A wish that falls while its slots wait takes back what was not given, and leaves what starts already."""
    seen = view(starting=3, waiting=2)
    assert decide(seen) == Withdraw(2)
    assert decide(carry_out(seen)) == Noop()
    assert decide(view(starting=3, waiting=3, standby=1)) == Withdraw(2)
    assert decide(view(starting=2, waiting=2, standby=2)) == Noop()


def test_a_missing_role_slot_is_filled_from_the_ready_ones() -> None:
    broken = without(fresh(), 3)
    assert broken.expert_primaries == (2,)
    assert decide(view(plan=broken, ready=(6,))) == Resize(ROLES)
    after = carry_out(view(plan=broken, ready=(6,)))
    assert after.plan.expert_primaries == (2, 6)
    assert decide(after) == Noop()


def test_a_missing_role_slot_is_started_when_none_is_ready() -> None:
    broken = without(fresh(), 3)
    assert decide(view(plan=broken)) == Noop()
    assert decide(view(plan=broken, free_slots=5)) == Start(1)
    assert decide(view(plan=broken, free_slots=5, standby=2)) == Start(3)
    assert decide(view(plan=broken, free_slots=5, standby=2, starting=2)) == Start(1)
    assert decide(view(plan=broken, free_slots=5, starting=1)) == Noop()


def test_a_shared_slot_counts_as_a_missing_one_only_where_roles_are_apart() -> None:
    roles = Roles(attention=2, experts=2, memory=1)
    plan = fresh(roles, slots=5)
    left = {slot: address for slot, address in plan.addresses.items() if slot != 4}
    shared = replan(plan, generation=2, addresses=left, roles=roles, replication=2)
    assert len(shared.memory_primaries) == 1
    together = replan(plan, generation=2, addresses=left, roles=roles, replication=2, colocated=True)
    assert decide(view(plan=together, roles=roles, ready=(6,), colocated=True)) == Noop()
    seen = view(plan=shared, roles=roles, ready=(6,))
    assert decide(seen) == Resize(roles)
    assert carry_out(seen).plan.memory_primaries == (6,)
    assert decide(carry_out(seen)) == Noop()
    assert decide(replace(seen, ready=(), free_slots=3)) == Start(1)


def test_roles_that_share_slots_are_asked_for_one_after_another_and_no_slot_is_started_for_nothing() -> None:
    one, two = Roles(attention=1, experts=1, memory=1), Roles(attention=2, experts=2, memory=2)
    plan = make_plan(
        generation=1,
        addresses={0: "ipc://0"},
        inventory=Inventory(parts=4, moe_layers=2, experts=8, dse_layers=1, buckets=8),
        roles=one,
        replication=1,
        colocated=True,
    )
    seen = view(plan=plan, roles=replace(one, attention=2), colocated=True, free_slots=1)
    assert decide(seen) == Start(1)
    seen = carry_out(replace(seen, starting=0, free_slots=0, ready=(1,)))
    assert (seen.plan.attention, seen.plan.expert_primaries) == ((0, 1), (0,))
    for roles in (replace(two, memory=1), two):
        seen = replace(seen, roles=roles, free_slots=3)
        assert decide(seen) == Resize(roles)
        seen = carry_out(seen)
        assert decide(seen) == Noop()
    assert seen.plan.memory_primaries == (0, 1)


def test_spares_are_started_up_to_what_is_free() -> None:
    assert decide(view(standby=3, free_slots=2)) == Start(2)
    assert decide(view(standby=3, ready=(6,), starting=1, free_slots=2)) == Start(1)


def test_fewer_wanted_slots_resize_without_any_ready() -> None:
    smaller = Roles(attention=1, experts=2, memory=1)
    assert decide(view(roles=smaller)) == Resize(smaller)
    after = carry_out(view(roles=smaller))
    assert (after.plan.attention, after.plan.memory_primaries) == ((0,), (4,))
    assert decide(after) == Noop()


def test_roles_beyond_what_there_is_to_share_are_not_missing() -> None:
    assert decide(view(roles=Roles(attention=4, experts=2, memory=2), ready=(6, 7), plan=fresh())) != Noop()
    most = Roles(attention=9, experts=2, memory=2)
    after = carry_out(view(roles=most, ready=(6, 7, 8, 9)))
    assert len(after.plan.attention) == 4
    assert decide(after) == Noop()


def test_imbalance_is_the_time_over_that_of_even_loads() -> None:
    plan = fresh()
    assert imbalance(plan, EVEN) == 1.0
    assert imbalance(plan, [[0.0] * 8] * 2) == 1.0
    primaries = [holders[0] for holders in plan.experts[0]]
    assert primaries == [2, 2, 2, 2, 3, 3, 3, 3]
    assert imbalance(plan, SKEWED) == pytest.approx(2 * 220 / 224)
    # Layers that lean to different slots do not make up for each other: each waits for its slowest.
    assert imbalance(plan, [SKEWED[0], SKEWED[0][::-1]]) == pytest.approx(2 * 220 / 224)


def test_skewed_loads_are_evened_out_once() -> None:
    seen = view(expert_load=SKEWED)
    assert decide(seen) == Rebalance(SKEWED)
    after = carry_out(seen)
    assert imbalance(after.plan, SKEWED) < 1.05
    assert decide(after) == Noop()
    assert decide(replace(after, steps_since_change=1000)) == Noop()


def test_rebalancing_waits_and_can_be_switched_off() -> None:
    assert decide(view(expert_load=SKEWED, steps_since_change=9)) == Noop()
    assert decide(view(expert_load=SKEWED, rebalance_above=0.0)) == Noop()
    assert decide(view(expert_load=SKEWED, rebalance_above=1.99)) == Noop()
    assert decide(view(expert_load=[])) == Noop()


def test_a_hot_expert_that_no_placement_mends_is_computed_by_several_holders() -> None:
    one_hot = [[100.0, 1, 1, 1, 1, 1, 1, 1]] * 2
    after = carry_out(view(expert_load=one_hot))
    assert imbalance(after.plan, one_hot) < 1.1
    assert len(after.plan.computing(0, 0)) == 2
    assert decide(replace(after, steps_since_change=1000)) == Noop()


def test_every_decision_ends_its_reason() -> None:
    seen = view(plan=without(fresh(), 0, 3), standby=1, free_slots=9, expert_load=SKEWED)
    for _ in range(20):
        if decide(seen) == Noop():
            break
        if isinstance(decide(seen), Start):
            seen = carry_out(seen)
            seen = replace(seen, ready=tuple(range(10, 10 + seen.starting)), starting=0)
        else:
            seen = replace(carry_out(seen), steps_since_change=1000)
    assert decide(seen) == Noop()
    assert (len(seen.plan.attention), len(seen.plan.expert_primaries), len(seen.ready)) == (2, 2, 1)


def test_fewer_slots_than_replicas_are_refused_with_the_number_that_can_be() -> None:
    inventory = Inventory(parts=0, moe_layers=2, experts=8, dse_layers=1, buckets=8)
    cluster = ClusterConfig(colocated=True, replication=2, attention_workers=2)
    wanted = Roles(attention=2, experts=1, memory=1)

    def ask(count: int) -> Roles:
        return check_request("attention", count, wanted, inventory, cluster, slots=2, room=1)

    with pytest.raises(ConfigError, match=r"1 slots cannot hold 2 replicas.*ask for at least 2"):
        ask(1)
    assert ask(2) == wanted and ask(3).attention == 3
    with pytest.raises(ConfigError, match="has room for 1"):
        ask(4)
