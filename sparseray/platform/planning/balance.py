"""Pure search behind the plan: things on slots, as even as asked, with as few of them moved as possible.

`even` is a minimum-cost flow found by successive shortest paths over slots; `pack` evens out summed
loads as EPLB does (github.com/deepseek-ai/EPLB), but starts from the present owners.

Shapes: L layers, P things in a layer, S slots.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

INFINITE = 1 << 40
FORBIDDEN = 1 << 20
"""Costs from here on are paid at the start, where nothing cheaper exists, but never for evenness."""
EQUAL_ENOUGH = 0.02
"""Loads that differ by less, over the mean of the slots, are worth no move."""


class _Search:
    """Things on slots, and paths along which one thing after another moves by one slot.

    Args:
        cost_LPS: int64, what it costs to have a thing on a slot.
        at_LP: int64, where the things are; each must be where it costs least. Changed in place.
        group: consecutive things of a layer that must be on different slots.
        fixed_LGS: bool, slots that a group must not use besides its own; None for none.
    """

    def __init__(self, cost_LPS: Array, at_LP: Array, group: int, fixed_LGS: Array | None) -> None:
        self.cost: Array = cost_LPS
        self.at: Array = at_LP
        self.group = group
        layers, things, slots = cost_LPS.shape
        self.taken = (
            np.zeros((layers, things // group, slots), bool) if fixed_LGS is None else fixed_LGS.copy()
        )
        self.count = np.zeros((layers, slots), np.int64)
        for layer in range(layers):
            self.taken[layer, np.arange(things) // group, at_LP[layer]] = True
            self.count[layer] = np.bincount(at_LP[layer], minlength=slots)
        self.step = np.empty((layers, slots, slots), np.int64)
        self.pick = np.zeros((layers, slots, slots), np.int64)
        for layer in range(layers):
            self._price(layer)

    def _price(self, layer: int) -> None:
        """Find what it costs, and which thing is best, to move one from slot to slot."""
        cost, at = self.cost[layer], self.at[layer]
        slots = cost.shape[1]
        change = cost + INFINITE * np.repeat(self.taken[layer], self.group, axis=0)
        change -= cost[np.arange(len(at)), at][:, None]
        self.step[layer] = INFINITE
        for slot in range(slots):
            here = np.flatnonzero(at == slot)
            if len(here):
                self.pick[layer, slot] = here[change[here].argmin(0)]
                self.step[layer, slot] = change[here].min(0)
        self.step[layer, range(slots), range(slots)] = INFINITE

    def shift(self, sources_LS: Array, sinks_LS: Array, low: int, high: int | None) -> bool:
        """Make one source hold one thing less and one sink one more, at least cost; False if nothing can.

        A path may change the layer at a slot where it leaves a layer with fewer than `high` things
        for one with more than `low`; with `high` None it may not.
        """
        distance = np.where(sources_LS, 0, INFINITE)
        back: list[tuple[Array, Array]] = []
        for _ in range(2 * distance.size):
            through = distance[:, :, None] + self.step
            origin, best = through.argmin(1), through.min(1)
            moved = best < distance
            nearer = np.where(moved, best, distance)
            layer_from = np.full(distance.shape, -1)
            if high is not None:
                arrived = np.where(self.count < high, nearer, INFINITE)
                changed = (arrived.min(0)[None] < nearer) & (self.count > low)
                layer_from = np.where(changed, arrived.argmin(0)[None], -1)
                nearer = np.where(changed, arrived.min(0)[None], nearer)
            if (nearer == distance).all():
                break
            back.append((np.where(moved, origin, -1), layer_from))
            distance = nearer
        ends = np.where(sinks_LS, distance, INFINITE)
        end = int(ends.argmin())
        if ends.flat[end] >= FORBIDDEN // 2:
            return False
        self._move(back, *divmod(end, distance.shape[1]))
        return True

    def _move(self, back: list[tuple[Array, Array]], layer: int, slot: int) -> None:
        moves = []
        for origin, layer_from in reversed(back):
            if layer_from[layer, slot] >= 0:
                layer = int(layer_from[layer, slot])
            if origin[layer, slot] >= 0:
                source = int(origin[layer, slot])
                moves.append((layer, int(self.pick[layer, source, slot]), source, slot))
                slot = source
        for layer, thing, source, target in moves:
            self.at[layer, thing] = target
            self.taken[layer, thing // self.group, source] = False
            self.taken[layer, thing // self.group, target] = True
            self.count[layer, source] -= 1
            self.count[layer, target] += 1
        for layer in {move[0] for move in moves}:
            self._price(layer)


def even(cost_LPS: Array, at_LP: Array) -> Array:
    """Even out things over slots, in every layer and over all layers, to counts that differ by at most one.

    Args:
        cost_LPS: int64, what it costs to have a thing on a slot.
        at_LP: int64, a cheapest slot of every thing.

    Returns:
        int64 [L, P], the slots of a cheapest even placement.
    """
    found = _Search(cost_LPS, at_LP.copy(), 1, None)
    things, slots = cost_LPS.shape[1:]
    low, high = things // slots, -(-things // slots)
    while found.shift(found.count > high, found.count < high, low, None):
        pass
    while found.shift(found.count > low, found.count < low, low, None):
        pass
    least, most = at_LP.size // slots, -(-at_LP.size // slots)

    def total() -> Array:
        return np.asarray(found.count.sum(0)[None])

    while found.shift(
        (total() > most) & (found.count > low), (total() < most) & (found.count < high), low, high
    ):
        pass
    while found.shift(
        (total() > least) & (found.count > low), (total() < least) & (found.count < high), low, high
    ):
        pass
    return found.at


def even_backups(cost_LPS: Array, at_LP: Array, group: int, fixed_LGS: Array) -> Array:
    """Even out backups so that all that slots hold, backups and fixed things, differs by as little as possible.

    Args:
        cost_LPS: int64, what it costs to have a backup on a slot; `FORBIDDEN` or more: never for evenness.
        at_LP: int64, cheapest slots; the `group` backups of one thing follow each other.
        group: backups of each thing, on different slots.
        fixed_LGS: bool, the slot of each thing itself, which its backups must not use.

    Returns:
        int64 [L, P], the slots of the backups.
    """
    found = _Search(cost_LPS, at_LP.copy(), group, fixed_LGS)
    own = fixed_LGS.sum((0, 1))
    slots, everything = len(own), at_LP.size + int(fixed_LGS.sum())
    most, least, any_ = -(-everything // slots), everything // slots, at_LP.size + 1

    def held() -> Array:
        return np.broadcast_to(found.count.sum(0) + own, found.count.shape)

    while found.shift((held() > most) & (found.count > 0), held() < most, 0, any_):
        pass
    while found.shift((held() > least) & (found.count > 0), held() < least, 0, any_):
        pass
    # Where a slot must hold more or can hold less than its part, the others still share evenly.
    for level in range(int(held().max()), least, -1):
        while found.shift((held() >= level) & (found.count > 0), held() <= level - 2, 0, any_):
            pass
    return found.at


def pack(cost_PS: Array, at_P: Array, load_P: Array) -> Array:
    """Even out the slots' summed loads in one layer, starting from where the things are.

    Things move, or change places, from the most loaded slot until it is as good as longest-processing-
    time packing of everything anew; if that cannot be reached, the new packing is taken, its parts
    named so that as much as possible stays.

    Args:
        cost_PS: int64, what it costs to have a thing on a slot; decides between moves that are equal enough.
        at_P: int64, where the things are.
        load_P: float64, not negative.

    Returns:
        int64 [P], new slots; every slot gets something where there are as many things as slots.
    """
    slots = cost_PS.shape[1]
    # A thing without load still costs its call, and a slot without things would lose its role.
    load_P = load_P + (0.001 * load_P.mean() or 1.0)
    new = _longest_first(load_P, slots)
    goal = float(np.bincount(new, load_P, slots).max()) + EQUAL_ENOUGH * float(load_P.sum()) / slots
    found = at_P.copy()
    for _ in range(4 * len(found)):
        if np.bincount(found, load_P, slots).max() <= goal:
            break
        if not _improve(cost_PS, found, load_P):
            break
    is_good = np.bincount(found, load_P, slots).max() <= goal
    if is_good and len(np.unique(found)) == min(slots, len(found)):
        return found
    return _renamed(new, cost_PS)


def _longest_first(load_P: Array, slots: int) -> Array:
    found, sums, counts = np.zeros(len(load_P), np.int64), np.zeros(slots), np.zeros(slots, np.int64)
    for thing in np.argsort(-load_P, kind="stable"):
        slot = np.lexsort((counts, sums))[0]
        found[thing] = slot
        sums[slot] += load_P[thing]
        counts[slot] += 1
    return found


def _improve(cost_PS: Array, at_P: Array, load_P: Array) -> bool:
    """Move one thing off the most loaded slot, or let it change places with another; False if neither helps."""
    slots = cost_PS.shape[1]
    sums = np.bincount(at_P, load_P, slots)
    hot = int(sums.argmax())
    mine, others = np.flatnonzero(at_P == hot), np.flatnonzero(at_P != hot)
    worth = EQUAL_ENOUGH * float(sums.mean()) / max(1, int(cost_PS.max()))
    now = cost_PS[np.arange(len(at_P)), at_P]
    # Rows: things of the hot slot. Columns: every slot to move to, then every thing to swap with.
    target = np.concatenate([np.arange(slots), at_P[others]])
    returned = np.concatenate([np.zeros(slots), load_P[others]])
    back_cost = np.concatenate([np.zeros(slots), cost_PS[others, hot] - now[others]])
    change = load_P[mine][:, None] - returned[None]
    peak = np.maximum(sums[hot] - change, sums[target][None] + change)
    score = peak + worth * (cost_PS[mine][:, target] - now[mine][:, None] + back_cost[None])
    score[:, target == hot] = np.inf
    score[peak >= sums[hot] * (1 - 1e-9)] = np.inf
    row, column = divmod(int(score.argmin()), score.shape[1])
    if not np.isfinite(score[row, column]):
        return False
    at_P[mine[row]] = target[column]
    if column >= slots:
        at_P[others[column - slots]] = hot
    return True


def _renamed(new_P: Array, cost_PS: Array) -> Array:
    """Give the parts of a packing to slots, the cheapest pair first."""
    slots = cost_PS.shape[1]
    price = np.stack([cost_PS[new_P == part].sum(0) for part in range(slots)]).astype(np.float64)
    price -= price.max(1, keepdims=True)
    name = np.zeros(slots, np.int64)
    for _ in range(slots):
        part, slot = divmod(int(price.argmin()), slots)
        name[part] = slot
        price[part], price[:, slot] = np.inf, np.inf
    return name[new_P]
