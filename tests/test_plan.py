"""Placement from change to change: what every plan must hold, what stays where it is, and what moves."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from sparseray.actors.state.assignment import Plan
from sparseray.errors import ConfigError
from sparseray.platform.planning.inventory import Inventory, Roles
from sparseray.platform.planning.policy import imbalance
from sparseray.platform.planning.replan import (
    Moves,
    Piece,
    holdings,
    least_bytes,
    loads_when_packed,
    make_plan,
    moves,
    replan,
)
from sparseray.platform.planning.spread import slot_loads

Table = Sequence[Sequence[tuple[int, ...]]]
SHARDS, LAYERS, EXPERTS, BUCKETS = 8, 3, 16, 12
INVENTORY = Inventory(parts=SHARDS, moe_layers=LAYERS, experts=EXPERTS, dse_layers=2, buckets=BUCKETS)


def fresh(
    attention: int, experts: int, memory: int, *, replication: int = 2, spare: int = 0, **options: object
) -> Plan:
    slots = attention + experts + memory + spare
    return make_plan(
        generation=1,
        addresses=addresses(range(slots)),
        inventory=INVENTORY,
        roles=Roles(attention=attention, experts=experts, memory=memory),
        replication=replication,
        **options,  # type: ignore[arg-type]
    )


def addresses(slots: Sequence[int]) -> dict[int, str]:
    return {slot: f"ipc://{slot}" for slot in slots}


def size(piece: Piece) -> int:
    """Experts and buckets only: dense weights are so many bytes that they would hide what else moves."""
    return {"dense": 0, "expert": 1000, "bucket": 300}[piece[0]]


def spread(values: Sequence[int]) -> int:
    return max(values) - min(values)


def check(plan: Plan, *, replication: int, avoid: Sequence[int] = (), is_by_count: bool = True) -> None:
    """What every plan must hold."""
    usable = set(plan.addresses) - set(avoid)
    wanted = min(replication, len(usable))
    assert set(plan.part_owners) <= usable and len(plan.part_owners) == SHARDS
    assert spread([len(plan.parts_of(slot)) for slot in plan.attention]) <= 1
    assert plan.dense[: len(plan.attention)] == plan.attention
    assert len(plan.dense) >= wanted
    for piece, holders in holdings(plan).items():
        assert len(set(holders)) == len(holders), piece
        assert set(holders) <= usable, piece
        assert piece[0] == "dense" or len(holders) == wanted, piece
    if is_by_count:
        for table in (plan.experts, plan.buckets):
            slots = {holders[0] for row in table for holders in row}
            per_layer = [Counter(holders[0] for holders in row) for row in table]
            assert all(spread([count[slot] for slot in slots]) <= 1 for count in per_layer)
            assert spread([sum(count[slot] for count in per_layer) for slot in slots]) <= 1


def totals(table: Table) -> dict[int, int]:
    return Counter(slot for row in table for holders in row for slot in holders)


def change(
    plan: Plan,
    *,
    dead: Sequence[int] = (),
    joined: Sequence[int] = (),
    roles: Roles | None = None,
    replication: int = 2,
    **options: object,
) -> Plan:
    there = {slot: address for slot, address in plan.addresses.items() if slot not in dead}
    return replan(
        plan,
        generation=plan.generation + 1,
        addresses=there | addresses(joined),
        roles=roles or roles_of(plan),
        replication=replication,
        **options,  # type: ignore[arg-type]
    )


def roles_of(plan: Plan) -> Roles:
    return Roles(
        attention=len(plan.attention), experts=len(plan.expert_primaries), memory=len(plan.memory_primaries)
    )


def travelling(old: Plan, new: Plan) -> Moves:
    """What moves; what nobody has any more must come from a checkpoint, to as many slots as hold it."""
    return moves(holdings(old), new, size)


def moved_bytes(old: Plan, new: Plan) -> int:
    found = travelling(old, new)
    return found.num_bytes(size) + sum(size(piece) * len(holdings(new)[piece]) for piece in found.missing)


# -- fresh plans -----------------------------------------------------------------------------------


def test_a_fresh_plan_has_contiguous_ranges_in_the_order_of_the_roles() -> None:
    plan = fresh(2, 3, 2)
    assert (plan.attention, plan.expert_primaries, plan.memory_primaries) == ((0, 1), (2, 3, 4), (5, 6))
    for table in (plan.experts, plan.buckets):
        for row in table:
            primaries = [holders[0] for holders in row]
            assert primaries == sorted(primaries)
    check(plan, replication=2)
    assert spread(list(totals(plan.experts).values())) <= 1


def test_colocated_roles_share_slots() -> None:
    plan = make_plan(
        generation=1,
        addresses=addresses(range(3)),
        inventory=INVENTORY,
        roles=Roles(attention=3, experts=3, memory=3),
        replication=2,
        colocated=True,
    )
    assert plan.attention == plan.expert_primaries == plan.memory_primaries == (0, 1, 2)
    smaller = change(plan, dead=[1], colocated=True)
    assert smaller.attention == smaller.expert_primaries == smaller.memory_primaries == (0, 2)
    back = change(smaller, joined=[5], roles=roles_of(plan), colocated=True)
    assert back.attention == back.expert_primaries == back.memory_primaries == (0, 2, 5)
    check(back, replication=2)


# -- changes ---------------------------------------------------------------------------------------


def test_nothing_moves_when_nothing_changes() -> None:
    plan = fresh(2, 3, 3, spare=2)
    assert replace(change(plan), generation=1) == plan
    assert not travelling(plan, change(plan)).pulls
    assert replace(change(plan, dead=[9]), generation=1, addresses=plan.addresses) == plan


def test_the_same_input_gives_the_same_plan() -> None:
    assert change(fresh(2, 4, 3), dead=[3, 7]) == change(fresh(2, 4, 3), dead=[3, 7])


@pytest.mark.parametrize("seed", range(24))
def test_random_changes_move_little_more_than_they_must(seed: int) -> None:
    source = random.Random(seed)
    replication = source.choice([1, 2, 2, 3])
    plan = fresh(2, source.randint(1, 5), source.randint(1, 4), replication=replication, spare=2)
    roles = roles_of(plan)
    for _ in range(8):
        kind = source.choice(["die", "grow", "shrink", "leave"])
        there, avoid = dict(plan.addresses), []
        if kind == "die" and len(there) > 2:
            del there[source.choice(sorted(there))]
        if kind == "leave" and len(there) > 2:
            avoid = [source.choice(sorted(there))]
        if kind == "grow":
            there |= addresses([100 * plan.generation])
        if kind in ("grow", "shrink"):
            sign = 1 if kind == "grow" else -1
            roles = Roles(
                attention=min(SHARDS, max(1, roles.attention + sign * source.randint(0, 1))),
                experts=min(EXPERTS, max(1, roles.experts + sign * source.randint(0, 1))),
                memory=min(BUCKETS, max(1, roles.memory + sign * source.randint(0, 1))),
            )
        new = replan(
            plan,
            generation=plan.generation + 1,
            addresses=there,
            roles=roles,
            replication=replication,
            avoid=avoid,
        )
        check(new, replication=replication, avoid=avoid)
        assert all(spread(list(totals(table).values())) <= 1 for table in (new.experts, new.buckets))
        assert moved_bytes(plan, new) <= 1.1 * least_bytes(plan, new, size), (kind, plan, new)
        again = change(new, roles=roles, replication=replication, avoid=avoid)
        assert replace(again, generation=new.generation) == new
        plan = replace(new, addresses={s: a for s, a in there.items() if s not in avoid})


def test_growing_moves_to_the_newcomer_only() -> None:
    plan = fresh(2, 3, 2, replication=1, spare=1)
    new = change(plan, roles=Roles(attention=2, experts=4, memory=2), replication=1)
    found = travelling(plan, new)
    assert set(found.pulls) == {7}
    assert sum(len(pieces) for pieces in found.pulls[7].values()) == LAYERS * EXPERTS // 4
    sent = [len(pieces) for pieces in found.pulls[7].values()]
    assert spread(sent) <= 1 and len(sent) == 3


@pytest.mark.parametrize("replication", [2, 3])
def test_fewer_deaths_than_replicas_lose_nothing(replication: int) -> None:
    plan = fresh(2, 3, 2, replication=replication)
    for number in range(1, replication):
        for dead in combinations(plan.addresses, number):
            new = change(plan, dead=dead, replication=replication)
            check(new, replication=replication)
            alive = {piece: set(holders) - set(dead) for piece, holders in holdings(plan).items()}
            found = moves(alive, new, size)
            assert found.missing == ()
            assert moved_bytes(plan, new) <= 1.1 * least_bytes(plan, new, size)
            for slots, before in (
                (new.expert_primaries, plan.expert_primaries),
                (new.attention, plan.attention),
            ):
                assert set(slots) == set(before) - set(dead) or not set(before) - set(dead)


def test_deaths_of_all_holders_are_reported_as_missing() -> None:
    plan = fresh(1, 3, 1, replication=1)
    dead = plan.expert_primaries[1]
    new = change(plan, dead=[dead], replication=1)
    lost = [piece for piece, holders in holdings(plan).items() if holders == (dead,)]
    assert sorted(travelling(plan, new).missing) == sorted(lost) and len(lost) == LAYERS * EXPERTS // 3


def test_a_spare_slot_takes_the_place_of_a_dead_one() -> None:
    plan = fresh(2, 2, 2, spare=2)
    new = change(plan, dead=[3])
    assert (new.attention, new.expert_primaries, new.memory_primaries) == ((0, 1), (2, 6), (4, 5))
    both = change(plan, dead=[0, 5])
    assert (both.attention, both.memory_primaries) == ((1, 6), (4, 7))
    assert both.dense[0] == 1


def test_a_role_without_any_slot_goes_to_the_slot_with_the_fewest_roles() -> None:
    plan = fresh(2, 1, 1)
    backup = plan.experts[0][0][1]
    new = change(plan, dead=[2])
    check(new, replication=2)
    assert new.expert_primaries == (backup,)
    assert travelling(plan, new).missing == ()
    alone = change(new, dead=[s for s in new.addresses if s != new.attention[0]])
    assert alone.attention == alone.expert_primaries == alone.memory_primaries == (new.attention[0],)
    check(alone, replication=2)
    assert all(len(holders) == 1 for holders in holdings(alone).values())


def test_a_slot_that_took_a_second_role_in_need_gives_it_up_to_a_newcomer() -> None:
    plan = fresh(2, 1, 1)
    new = change(plan, dead=[3])
    shared = new.memory_primaries[0]
    assert shared in new.attention + new.expert_primaries
    back = change(new, joined=[9])
    assert (back.attention, back.expert_primaries, back.memory_primaries) == ((0, 1), (2,), (9,))
    check(back, replication=2)


def test_no_slot_left_is_an_error() -> None:
    plan = fresh(1, 1, 1)
    with pytest.raises(ConfigError, match="no slot is left"):
        change(plan, dead=[0, 1], avoid=[2])


def test_avoided_slots_end_without_anything_and_serve_as_sources() -> None:
    plan = fresh(2, 2, 2, replication=1, spare=2)
    new = change(plan, replication=1, avoid=[3, 4])
    check(new, replication=1, avoid=[3, 4])
    assert set(new.addresses) == set(plan.addresses)
    assert (new.expert_primaries, new.memory_primaries) == ((2, 6), (5, 7))
    found = travelling(plan, new)
    assert found.missing == () and set(found.pulls[6]) == {3} and set(found.pulls[7]) == {4}


def test_shrinking_drops_the_highest_slots_and_keeps_the_reducer() -> None:
    plan = fresh(3, 3, 1)
    new = change(plan, roles=Roles(attention=2, experts=2, memory=1))
    assert (new.attention, new.expert_primaries, new.dense[0]) == ((0, 1), (3, 4), 0)
    grown = change(change(plan, dead=[0]), joined=[9], roles=roles_of(plan))
    assert grown.attention == (1, 2, 9) and grown.dense[0] == 1


# -- nodes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("replication", [2, 3])
@pytest.mark.parametrize(
    "layout", ["abababab", "aaaabbbb", "aaaaaaab", "abcabcab", "aabbccdd"], ids=lambda text: text
)
def test_primary_and_backup_are_on_different_nodes(layout: str, replication: int) -> None:
    nodes = dict(enumerate(layout))

    def check_nodes(plan: Plan) -> None:
        check(plan, replication=replication)
        if len({nodes[slot] for slot in plan.addresses}) > 1:
            for piece, holders in holdings(plan).items():
                assert len({nodes[slot] for slot in holders}) > 1, (piece, holders)

    plan = fresh(2, 3, 2, replication=replication, spare=1, nodes=nodes)
    check_nodes(plan)
    for dead in plan.addresses:
        check_nodes(change(plan, dead=[dead], replication=replication, nodes=nodes))
    for node in sorted(set(layout)):
        dead = [slot for slot in plan.addresses if nodes[slot] == node]
        new = change(plan, dead=dead, replication=replication, nodes=nodes)
        check_nodes(new)
        assert travelling(plan, new).missing == (), "a whole node died and took something with it"


def test_a_new_slot_of_a_role_is_taken_from_another_node() -> None:
    plan = fresh(1, 1, 1, replication=1, spare=3)
    nodes = {0: "a", 1: "a", 2: "a", 3: "a", 4: "a", 5: "b"}
    new = change(plan, roles=Roles(attention=1, experts=2, memory=1), replication=1, nodes=nodes)
    assert new.expert_primaries == (1, 5)


# -- loads -----------------------------------------------------------------------------------------


def zipf(seed: int) -> list[list[float]]:
    generator = np.random.default_rng(seed)
    return [
        list(map(float, generator.permutation(1000.0 / np.arange(1, EXPERTS + 1)))) for _ in range(LAYERS)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_loads_are_evened_out_with_few_moves(seed: int) -> None:
    plan, loads = fresh(1, 3, 1), zipf(seed)
    new = change(plan, loads=loads)
    check(new, replication=2, is_by_count=False)
    mean = sum(map(sum, loads)) / LAYERS / 3
    best = max(max(max(row) for row in loads) / mean, 1.0)
    assert imbalance(new, loads) <= best + 0.06
    assert spread(list(totals(new.experts).values())) <= 1
    assert moved_bytes(plan, new) < 0.5 * LAYERS * EXPERTS * 1000
    peaks = loads_when_packed(plan, loads)
    sums = [slot_loads(row, counts, load) for row, counts, load in zip(new.experts, new.spread, loads)]
    assert [max(a.values()) for a in peaks] == pytest.approx([max(a.values()) for a in sums])
    assert replace(change(new, loads=loads), generation=2) == new


def test_even_loads_move_nothing() -> None:
    plan = fresh(1, 4, 1)
    assert change(plan, loads=[[5.0] * EXPERTS] * LAYERS).experts == plan.experts
    assert change(plan, loads=[[0.0] * EXPERTS] * LAYERS).experts == plan.experts


def test_every_expert_slot_keeps_an_expert_whatever_the_loads() -> None:
    plan = fresh(1, 3, 1, spare=1)
    one_hot = [[1.0] + [0.0] * (EXPERTS - 1)] * LAYERS
    new = change(plan, roles=Roles(attention=1, experts=4, memory=1), loads=one_hot)
    assert all(len({holders[0] for holders in row}) == 4 for row in new.experts)
    check(change(new, dead=[1], loads=one_hot), replication=2, is_by_count=False)
