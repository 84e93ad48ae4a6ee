"""When a training run lends slots to servers and gets them back; pure: no Ray, no clock.

A server's lease that finds no free slot and no room in the cluster is what asks for a loan. The run with the most to
spare gives as much as is lacking in one change of plan, never below its own minimum. Once slots are idle again for a
while and no server lacks any, they go back, and the run's own wish holds again.
"""

from dataclasses import dataclass, replace

from sparseray.platform.planning.inventory import Roles, num_slots

ROLES = ("attention", "experts", "memory")


@dataclass(frozen=True, kw_only=True)
class Lent:
    """What a run does without for now, of its own wish.

    Args:
        attention, experts, memory: slots of each role.
        standby: spare slots.
    """

    attention: int = 0
    experts: int = 0
    memory: int = 0
    standby: int = 0

    def slots(self, *, colocated: bool) -> int:
        """How many slots that is.

        Args:
            colocated: whether roles share slots.
        """
        counts = (self.attention, self.experts, self.memory)
        return self.standby + (max(counts) if colocated else sum(counts))

    def left_of(self, roles: Roles) -> Roles:
        """The roles that stay."""
        return Roles(
            attention=roles.attention - self.attention,
            experts=roles.experts - self.experts,
            memory=roles.memory - self.memory,
        )


@dataclass(frozen=True, kw_only=True)
class Lender:
    """A training run that lends.

    Args:
        job: its identifier.
        roles, standby: its own wish.
        least: slots of each role that it keeps.
        lent: what it does without already.
        replication: least number of slots in all.
        colocated: whether roles share slots.
        is_settled: whether no change of its plan is under way.
    """

    job: str
    roles: Roles
    standby: int
    least: Roles
    lent: Lent = Lent()
    replication: int = 1
    colocated: bool = False
    is_settled: bool = True


@dataclass(frozen=True, kw_only=True)
class View:
    """What the policy may look at; all slots are of one kind.

    Args:
        lenders: training runs that lend.
        lacking: slots that servers have asked for, for which there is none and no room.
        room: slots that are free or could be started.
        idle_s: seconds for which there has been such room and no server lacked any.
    """

    lenders: tuple[Lender, ...]
    lacking: int
    room: int
    idle_s: float


@dataclass(frozen=True, kw_only=True)
class Loan:
    """What a run shall do without from now on, more than before or less.

    Args:
        job: identifier of the run.
        lent: all that it does without.
        count: slots that change hands; below zero for a return.
    """

    job: str
    lent: Lent
    count: int


def decide(view: View, return_s: float) -> Loan | None:
    """Decide on one loan or return, or none.

    Args:
        view: what there is.
        return_s: seconds for which slots must have been idle before they go back.
    """
    lenders = [lender for lender in view.lenders if lender.is_settled]
    if view.lacking > 0:
        ready = [(len(to_spare(lender)), lender) for lender in lenders]
        most, lender = max(ready, key=lambda found: found[0], default=(0, None))
        if lender is None or not most:
            return None
        count = min(most, view.lacking)
        return Loan(job=lender.job, lent=to_spare(lender)[count - 1], count=count)
    if view.room > 0 and view.idle_s >= return_s:
        for lender in lenders:
            count = min(view.room, lender.lent.slots(colocated=lender.colocated))
            if count > 0:
                return Loan(job=lender.job, lent=_returned(lender, count), count=-count)
    return None


def to_spare(lender: Lender) -> list[Lent]:
    """What the lender would do without after lending one slot more, two more, and so on."""
    found, lent = [], lender.lent
    while (more := _one_more(lender, lent)) is not None:
        found.append(more)
        lent = more
    return found


def _one_more(lender: Lender, lent: Lent) -> Lent | None:
    """Spare slots go first, which no step notices; then one of the role with the most beyond its least."""
    if lent.standby < lender.standby:
        return replace(lent, standby=lent.standby + 1)
    now = lent.left_of(lender.roles)
    if num_slots(now, colocated=lender.colocated) - 1 < lender.replication:
        return None
    beyond = {role: getattr(now, role) - getattr(lender.least, role) for role in ROLES}
    if lender.colocated:
        most = max(getattr(now, role) for role in ROLES)
        giving = [role for role in ROLES if getattr(now, role) == most]
        if any(beyond[role] < 1 for role in giving):
            return None
    else:
        giving = [max(ROLES, key=lambda role: beyond[role])]
        if beyond[giving[0]] < 1:
            return None
    return replace(lent, **{role: getattr(lent, role) + 1 for role in giving})


def _returned(lender: Lender, count: int) -> Lent:
    """The loan that is left when some slots come back: roles are made whole before spare slots are."""
    lent = lender.lent
    for _ in range(count):
        counts = {role: getattr(lent, role) for role in ROLES}
        most = max(counts.values())
        if not most:
            lent = replace(lent, standby=lent.standby - 1)
            continue
        giving = [role for role in ROLES if counts[role] == most]
        giving = giving if lender.colocated else giving[:1]
        lent = replace(lent, **{role: counts[role] - 1 for role in giving})
    return lent
