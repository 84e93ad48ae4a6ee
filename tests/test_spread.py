"""Hot experts are computed by several holders, just as many as it takes; pure."""

import pytest

from sparseray.platform.planning.spread import slot_loads, spread_hot

SLOTS = [10, 11, 12, 13]


def one_layer(*primaries: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return (tuple((slot, SLOTS[(SLOTS.index(slot) + 1) % 4]) for slot in primaries),)


def test_an_even_layer_is_left_alone() -> None:
    experts = one_layer(10, 11, 12, 13)
    assert spread_hot(experts, SLOTS, [[5.0, 5.0, 5.0, 5.2]], 8) == (experts, ((1, 1, 1, 1),))


def test_a_hot_expert_gets_as_many_holders_as_it_takes() -> None:
    (holders,), (spread,) = spread_hot(one_layer(10, 11, 12, 13), SLOTS, [[97.0, 1.0, 1.0, 1.0]], 8)
    assert spread == (4, 1, 1, 1) and set(holders[0]) == set(SLOTS) and holders[0][0] == 10
    loads = slot_loads(holders, spread, [97.0, 1.0, 1.0, 1.0])
    assert max(loads.values()) < 1.1 * min(loads.values())


def test_backups_compute_before_anything_is_copied() -> None:
    (holders,), (spread,) = spread_hot(one_layer(10, 11, 12, 13), SLOTS, [[12.0, 3.0, 4.0, 4.0]], 2)
    assert spread[0] == 2 and holders[0] == (10, 11)


def test_parts_are_equal_so_their_number_divides_the_shards() -> None:
    (_,), (spread,) = spread_hot(one_layer(10, 11, 12, 13), SLOTS, [[97.0, 1.0, 1.0, 1.0]], 2)
    assert spread[0] == 2
    (_,), (spread,) = spread_hot(one_layer(10, 11, 12, 13), SLOTS, [[97.0, 1.0, 1.0, 1.0]], 1)
    assert spread[0] == 1


@pytest.mark.parametrize("seed", range(20))
def test_it_never_makes_the_peak_higher_and_keeps_the_primary(seed: int) -> None:
    import random

    source = random.Random(seed)
    experts = one_layer(*(source.choice(SLOTS) for _ in range(16)))
    loads = [[source.lognormvariate(0, 1.5) for _ in range(16)]]
    (holders,), (spread,) = spread_hot(experts, SLOTS, loads, 8)
    before = slot_loads(experts[0], (1,) * 16, loads[0])
    after = slot_loads(holders, spread, loads[0])
    assert max(after.values()) <= max(before.values())
    assert sum(after.values()) == pytest.approx(sum(loads[0]))
    for old, new, count in zip(experts[0], holders, spread):
        assert new[0] == old[0] and set(old) <= set(new) and len(set(new)) == len(new) and count <= len(new)
