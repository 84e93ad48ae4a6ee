"""Sends a plan to its slots and waits until every one of them has its roles and its state."""

import time
from collections.abc import Callable, Collection

from sparseray.actors.installation import InstallPlan, PullFrom, Restore
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.messages import Installed, Stale
from sparseray.errors import SlotsLostError
from sparseray.platform.fleet.control import Control, Loss, Member, StalledError
from sparseray.platform.planning.moves import Moves
from sparseray.platform.workload import Workload

RESEND_S = 1.0
INSTALL_DEADLINE_S = 120.0
SLOW_DISK = 1e8
"""Bytes per second that a slot reads or writes of a checkpoint at the very least."""


def disk_seconds(plan: Plan, size: Callable[[Piece], int]) -> float:
    """How long a slot of a plan may take at most to read, or write, all that it holds.

    Args:
        plan: whose slots they are.
        size: bytes of a piece.
    """
    return max(sum(map(size, plan.pieces_of(slot))) for slot in plan.addresses) / SLOW_DISK


def install(
    control: Control,
    workload: Workload,
    new: Plan,
    step: int,
    *,
    restore: Restore | None,
    pulls: Moves | None,
    exchange: str,
    size: Callable[[Piece], int],
) -> None:
    """Have all slots of a plan install it.

    Args:
        control: conversation with the slots.
        workload: what runs.
        new: the plan.
        step: that is committed.
        restore: where state comes from that no slot has.
        pulls: where the rest comes from.
        exchange: `cluster.exchange`.
        size: bytes of a piece.

    Raises:
        SlotsLostError, StalledError: on the way.
    """
    earlier = workload.earlier_in(new)
    by_collectives = is_by_collectives(exchange, new, control.fleet.members())

    def send(slots: Collection[int]) -> None:
        for slot in slots:
            own = pulls.pulls.get(slot, {}) if pulls else {}
            body = InstallPlan(
                plan=new,
                job=workload.spec,
                scheduler=control.mailbox.transport.address,
                step=step,
                restore=restore,
                commit=workload.commit,
                pulls=tuple(PullFrom(source=source, pieces=tuple(p)) for source, p in own.items()),
                ingress=workload.ingress,
                weights=workload.weights,
                earlier=earlier,
                by_collectives=by_collectives,
            )
            control.post([slot], body, step=step)

    limit_s = INSTALL_DEADLINE_S + (disk_seconds(new, size) if restore is not None else 0.0)
    _until_installed(control, set(new.addresses), send, step, limit_s)


def is_by_collectives(exchange: str, plan: Plan, members: dict[int, Member]) -> bool:
    """Whether slots that exchange in step do so by collectives.

    Args:
        exchange: `cluster.exchange`.
        plan: whose slots they are.
        members: slots that are there.
    """
    hosts = {members[slot].namespace for slot in plan.peers if slot in members}
    return exchange == "collective" or (exchange == "auto" and len(hosts) > 1)


def _until_installed(
    control: Control, waiting: set[int], send: Callable[[Collection[int]], None], step: int, limit_s: float
) -> None:
    send(waiting)
    deadline, sent = time.monotonic() + limit_s, time.monotonic()
    while waiting:
        try:
            message = next(control.messages(Installed, Stale, deadline_s=RESEND_S))
        except StalledError:
            if time.monotonic() > deadline:
                raise
            send(waiting)
            continue
        if isinstance(message.body, Stale):
            # It lives, but what it holds is of another step: it starts empty in the next generation.
            cause = f"its state is not of step {step}"
            raise SlotsLostError([Loss(slot=message.source, cause=cause, noticed=time.monotonic())])
        waiting.discard(message.source)
        waiting &= set(control.fleet.members())
        if time.monotonic() - sent > RESEND_S:
            send(waiting)
            sent = time.monotonic()
