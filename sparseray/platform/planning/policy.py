"""What the scheduler should do next, as a function of what it sees; pure: no Ray, no time, no randomness.

The order is: leave nodes that are to be drained, once there are slots elsewhere; repair or fit the roles with what is
ready; start what is missing; even out loads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from sparseray.actors.state.assignment import Plan
from sparseray.platform.planning.inventory import Roles
from sparseray.platform.planning.replan import fitting, loads_when_packed, role_slots
from sparseray.platform.planning.spread import slot_loads

HURRY_S = 10.0
"""Before a node is gone: what it has goes to the slots that there are then, whether or not others are starting."""
LEAST_GAIN = 0.1
"""Part of the imbalance that a rebalancing must take away to be worth its transfers."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What the policy may look at.

    Args:
        plan: the plan in force.
        roles: wanted slots of each role.
        ready: prepared slots without a role.
        starting: slots on their way.
        waiting: those of them that were asked for and not given yet.
        free_slots: how many more could be started.
        standby: wanted number of spare slots.
        expert_load: moving average of tokens, [moe layers][experts]; empty when there is none yet.
        steps_since_change: optimizer steps since the plan came into force.
        rebalance_above: `imbalance` from which loads are evened out; 0 for never.
        rebalance_every: least steps between two changes for the sake of loads.
        colocated: roles share slots on purpose. False: a slot that took over a second role in need gives it up
            again, as soon as there is a slot for it.
        parts: what attention workers share; None for as many as in the plan.
        draining: slots on nodes that are to be drained, and seconds until these are gone; none of them is `ready`.
    """

    plan: Plan
    roles: Roles
    ready: tuple[int, ...]
    starting: int
    free_slots: int
    standby: int
    expert_load: Sequence[Sequence[float]]
    steps_since_change: int
    rebalance_above: float
    rebalance_every: int
    colocated: bool = True
    parts: int | None = None
    waiting: int = 0
    draining: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Noop:
    """Leave everything as it is."""


@dataclass(frozen=True)
class Start:
    """Start slots; they become ready, not part of the plan.

    Args:
        count: how many.
    """

    count: int


@dataclass(frozen=True)
class Withdraw:
    """Ask no longer for slots that have not been given yet.

    Args:
        count: how many.
    """

    count: int


@dataclass(frozen=True)
class Resize:
    """Make a new plan with these roles from the slots that are there.

    Args:
        roles: wanted slots of each role.
        without: slots that shall have none, as their node is to be drained.
    """

    roles: Roles
    without: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rebalance:
    """Make a new plan with the same roles and evened out loads.

    Args:
        loads: tokens, [moe layers][experts].
    """

    loads: Sequence[Sequence[float]]


Decision = Noop | Start | Withdraw | Resize | Rebalance


def decide(view: View) -> Decision:
    """Decide on one thing to do; once it is done, the next call decides on the next or on `Noop`."""
    slots, leaving = role_slots(view.plan), leaving_slots(view.plan, view.draining)
    lacking, misplaced = _difference(view, slots)
    staying = {role: tuple(slot for slot in own if slot not in leaving) for role, own in slots.items()}
    needed, _ = _difference(view, staying)
    if leaving and _may_leave(view, leaving, needed):
        return Resize(view.roles, leaving)
    if misplaced or (lacking and view.ready):
        return Resize(view.roles)
    short = needed + view.standby - len(view.ready) - view.starting
    if short > 0 and view.free_slots > 0:
        return Start(min(short, view.free_slots))
    if short < 0 and view.waiting > 0:
        return Withdraw(min(-short, view.waiting))
    if _is_worth_rebalancing(view):
        return Rebalance(view.expert_load)
    return Noop()


def imbalance(plan: Plan, loads: Sequence[Sequence[float]]) -> float:
    """Time that a step spends in experts over the time it would with even loads, at least 1.

    A layer waits for its most loaded slot, and layers run one after another: so it is the sum over layers
    of the maximum over slots, over the sum over layers of the mean over slots, of the tokens they compute.

    Args:
        plan: who computes which expert.
        loads: tokens, [moe layers][experts].
    """
    slots = plan.expert_primaries
    spread = plan.spread or tuple((1,) * len(row) for row in plan.experts)
    return _imbalance(
        [
            dict.fromkeys(slots, 0.0) | slot_loads(row, counts, load)
            for row, counts, load in zip(plan.experts, spread, loads)
        ]
    )


def _imbalance(layers: Sequence[dict[int, float]]) -> float:
    peaks = sum(max(sums.values()) for sums in layers)
    means = sum(sum(sums.values()) / len(sums) for sums in layers)
    return peaks / means if means else 1.0


def leaving_slots(plan: Plan, draining: Mapping[int, float]) -> tuple[int, ...]:
    """Slots that play or hold something and are on nodes that are to be drained.

    Args:
        plan: in force.
        draining: slots there, and seconds until their nodes are gone.
    """
    return tuple(sorted(plan.holders & set(draining)))


def _may_leave(view: View, leaving: Sequence[int], needed: int) -> bool:
    """Whether slots leave now: others are ready in their place, none will be, or there is no time left to wait."""
    if not (view.plan.holders | set(view.ready)) - set(view.draining):
        return False
    is_coming = view.free_slots > 0 or view.starting > view.waiting
    is_late = min(view.draining[slot] for slot in leaving) < HURRY_S
    return needed <= len(view.ready) or not is_coming or is_late


def _difference(view: View, slots: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Slots that are lacking, and how often a slot plays a role too many or could play one more of those it shares.

    Args:
        view: what is wanted.
        slots: that play each role.
    """
    wanted: dict[str, int] = asdict(fitting(view.plan, view.roles, view.parts))
    playing = [slot for own in slots.values() for slot in own]
    there = len(set(playing))
    surplus = sum(max(0, len(slots[role]) - count) for role, count in wanted.items())
    if view.colocated:
        idle = sum(max(0, min(count, there) - len(slots[role])) for role, count in wanted.items())
        return max(0, max(wanted.values()) - there), surplus + idle
    # Slots would be needed more if none had two roles.
    lacking = sum(max(0, count - len(slots[role])) for role, count in wanted.items())
    return lacking + len(playing) - there, surplus


def _is_worth_rebalancing(view: View) -> bool:
    if not view.rebalance_above or not view.expert_load or view.steps_since_change < view.rebalance_every:
        return False
    now = imbalance(view.plan, view.expert_load)
    if now <= view.rebalance_above:
        return False
    return _imbalance(loads_when_packed(view.plan, view.expert_load)) <= now * (1 - LEAST_GAIN)
