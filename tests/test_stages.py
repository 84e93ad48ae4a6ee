"""A change that moves much state, in several generations: what each of them moves, and that it ends where it was wished for."""

import random
from dataclasses import replace

import pytest
from test_plan import LAYERS, addresses, change, fresh, roles_of, size

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.platform.planning import stages as module
from sparseray.platform.planning.inventory import Roles
from sparseray.platform.planning.replan import holdings, moves, replan
from sparseray.platform.planning.stages import LEAST_BYTES, PAUSE_S, REST, Pace, after_loss, next_stage

BUDGET = 3500


def held_in(plan: Plan) -> dict[Piece, set[int]]:
    return {piece: set(slots) for piece, slots in holdings(plan).items()}


def num_bytes(old: Plan, new: Plan) -> int:
    return moves(held_in(old), new, size).num_bytes(size)


def walk(old: Plan, roles: Roles, *, replication: int, slots: int, **options: object) -> list[Plan]:
    """Plans of every stage, the wish made anew from each as the scheduler does."""
    found, now = list[Plan](), old
    wished: Plan | None = None
    while not found or found[-1] != wished:
        wished = replan(
            now,
            generation=now.generation + 1,
            addresses=addresses(range(slots)),
            roles=roles,
            replication=replication,
            **options,  # type: ignore[arg-type]
        )
        now = next_stage(now, wished, held_in(now), size, BUDGET)
        found.append(now)
        assert len(found) < 200
    return found


def check(old: Plan, stages: list[Plan]) -> None:
    for before, after in zip([old, *stages], stages):
        assert num_bytes(before, after) <= BUDGET
    for before, after in zip([old, *stages], stages[:-1]):
        assert num_bytes(before, after) > 0, "every stage gets on"
        kept, now = holdings(before), holdings(after)
        # Whoever held a piece holds it, in the same place: nobody's role changes.
        assert all(now[piece][: len(holders)] == holders for piece, holders in kept.items())
        assert after.part_owners == before.part_owners and after.spread == before.spread


@pytest.mark.parametrize("replication", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_every_stage_moves_little_and_the_last_plan_is_the_one_that_was_wished_for(
    replication: int, seed: int
) -> None:
    draw = random.Random(seed)
    old = fresh(*(draw.randint(1, 3) for _ in range(3)), replication=replication, spare=4)
    if seed % 2:
        loads = [[draw.expovariate(1.0) for _ in old.experts[0]] for _ in range(LAYERS)]
        old = change(old, replication=replication, loads=loads)
    wanted = Roles(attention=draw.randint(1, 4), experts=draw.randint(1, 5), memory=draw.randint(1, 4))
    stages = walk(old, wanted, replication=replication, slots=len(old.addresses))
    direct = change(old, roles=wanted, replication=replication)
    check(old, stages)
    assert roles_of(stages[-1]) == roles_of(direct)
    # What was moved ahead is what is used, and nothing is left over.
    moved, least = sum(num_bytes(a, b) for a, b in zip([old, *stages], stages)), num_bytes(old, direct)
    # Where backups even out whom they stand by, the search may come to another plan of the same worth half way.
    assert moved == least if replication == 1 else least <= moved <= 1.15 * least
    assert all(len(h) == replication for piece, h in holdings(stages[-1]).items() if piece != DENSE)


def test_slots_that_are_to_leave_give_what_they_have_in_stages() -> None:
    old = fresh(2, 3, 3)
    stages = walk(old, roles_of(old), replication=2, slots=8, avoid=(3, 6))
    check(old, stages)
    assert len(stages) > 3 and not stages[-1].holders & {3, 6}


def test_experts_that_are_packed_anew_move_in_stages() -> None:
    draw, old = random.Random(1), fresh(1, 4, 1)
    loads = [[draw.expovariate(1.0) ** 2 for _ in old.experts[0]] for _ in range(LAYERS)]
    stages = walk(old, roles_of(old), replication=2, slots=6, loads=loads)
    check(old, stages)
    assert len(stages) > 1 and stages[-1].spread and not stages[-2].spread


def test_a_piece_that_is_larger_than_a_stage_moves_alone() -> None:
    old = fresh(1, 2, 1, replication=1, spare=1)
    wished = change(old, roles=Roles(attention=2, experts=2, memory=1), replication=1)
    held = held_in(old)

    def large(piece: Piece) -> int:
        return 10**6 if piece == DENSE else size(piece)

    assert moves(held, wished, large).num_bytes(large) > BUDGET
    assert next_stage(old, wished, held, large, BUDGET) == wished, "there is nothing else to go"
    grown = change(old, roles=Roles(attention=2, experts=3, memory=1), joined=[5], replication=1)
    stage = next_stage(old, grown, held, large, BUDGET)
    assert stage.dense == (*old.dense, *(slot for slot in grown.dense if slot not in old.dense))
    assert stage.experts == old.experts and stage.buckets == old.buckets


def test_what_nobody_holds_or_whose_slots_are_gone_is_no_stage() -> None:
    old = fresh(1, 2, 2, spare=1)
    wished = change(old, roles=Roles(attention=1, experts=3, memory=2))
    lost = {piece: slots for piece, slots in held_in(old).items() if piece != ("expert", 0, 0)}
    assert next_stage(old, wished, lost, size, BUDGET) == wished
    left = {slot: address for slot, address in wished.addresses.items() if slot != 1}
    assert (
        next_stage(old, replace(wished, addresses=left), held_in(old), size, BUDGET).experts == wished.experts
    )


@pytest.mark.parametrize("dead", range(8))
def test_after_a_loss_those_who_are_left_go_on_and_nothing_moves(
    dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two attention workers, three expert shards and three memory shards; the replicas come in stages."""
    monkeypatch.setattr(module, "LEAST_BYTES", BUDGET)
    old = fresh(2, 3, 3, spare=1)
    wished = change(old, dead=[dead])
    held = {piece: slots - {dead} for piece, slots in held_in(old).items()}
    found = after_loss(old, wished, held, size)
    if moves(held, wished, size).num_bytes(size) <= BUDGET:
        assert found == wished
        return
    assert dead not in found.holders and moves(held, found, size).num_bytes(size) == 0
    assert len(found.part_owners) == len(old.part_owners) and found.dense[0] == found.attention[0]
    mended = walk(found, roles_of(old), replication=2, slots=9, avoid=[dead])
    check(found, mended)
    assert all(len(h) == 2 for piece, h in holdings(mended[-1]).items() if piece != DENSE)
    assert len(mended) > 1


def test_after_the_loss_of_every_holder_the_plan_is_what_is_wished_for() -> None:
    old = fresh(1, 2, 2, replication=1)
    wished = change(old, dead=[1], replication=1)
    held = {piece: slots - {1} for piece, slots in held_in(old).items()}
    assert after_loss(old, wished, held, size) == wished


def test_stages_are_as_large_as_a_short_pause_allows_and_come_apart() -> None:
    pace = Pace()
    assert pace.budget == LEAST_BYTES and pace.is_due(0.0)
    pace.count(4 * 10**9, 2.0, 10.0)
    assert pace.budget == int(PAUSE_S * 2 * 10**9)
    assert not pace.is_due(10.0 + REST * 2.0 - 0.1) and pace.is_due(10.0 + REST * 2.0)
    pace.count(10, 1.0, 20.0)
    assert pace.budget == LEAST_BYTES and pace.seconds(2 * LEAST_BYTES) == 2.0
