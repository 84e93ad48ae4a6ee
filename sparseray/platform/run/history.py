"""What the journal knows of a job: where a new scheduler goes on when the one before has died."""

from dataclasses import dataclass, field, fields
from typing import Any

from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.codec import from_plain
from sparseray.platform.planning.inventory import Roles
from sparseray.platform.planning.lending import Lent
from sparseray.platform.run.journal import Journal

COMMITS_READ = 64
"""Averages of loads look back that far; what is older weighs a thousandth."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted of a job's next plans, by users and by the policy.

    Args:
        roles: slots of each role.
        packed_by: loads by which experts are packed, [moe layers][experts]; None for equal numbers.
        lent: what of the roles is lent for now.
    """

    roles: Roles
    packed_by: tuple[tuple[float, ...], ...] | None = None
    lent: Lent = field(default_factory=Lent)


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A step that was decided: what `Commit` says of it, and the step's record."""

    step: int
    lr: float
    memory_lr: float
    scale: float
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class JobHistory:
    """Decisions since a job began.

    Args:
        has_begun: whether there are any.
        slots: ids that were ever used.
        generation: the last one that was tried.
        plan: the last one that all slots had taken; None if there is none.
        step: that the slots hold by then.
        commit: the last one, if `step` is its step and it is to be applied still.
        wish: the last one, if there is any.
        counts: tokens of every expert in the last committed steps, oldest first.
    """

    has_begun: bool
    slots: tuple[int, ...] = ()
    generation: int = 0
    plan: Plan | None = None
    step: int = 0
    commit: Committed | None = None
    wish: Wish | None = None
    counts: tuple[list[list[int]], ...] = ()


def read_job(journal: Journal, job: str) -> JobHistory:
    """Read what was decided for a job.

    Args:
        journal: of the run.
        job: identifier of the job; what others decided in the same run before it does not count.
    """
    begun = journal.last("begin")
    if begun is None or begun["job"] != job:
        return JobHistory(has_begun=False)

    def entries(kind: str, limit: int = 1 << 30) -> list[dict[str, Any]]:
        return [entry for entry in journal.read(kind, limit=limit) if entry["id"] > begun["id"]]

    plans = {entry["generation"]: entry["plan"] for entry in entries("plan")}
    active, wishes = entries("active", 1), entries("wish", 1)
    commits, restores = entries("commit", COMMITS_READ), entries("restore", 1)
    step, commit = 0, None
    if active:
        newest = [*commits[:1], *restores]
        last = max([*newest, *active], key=lambda entry: entry["id"])
        step = last["step"]
        if commits and commits[0]["step"] == step:
            commit = Committed(**{one.name: commits[0][one.name] for one in fields(Committed)})
    return JobHistory(
        has_begun=True,
        slots=tuple(entry["slot"] for entry in entries("slot")),
        generation=max(plans, default=0),
        plan=from_plain(Plan, plans[active[0]["generation"]]) if active else None,
        step=step,
        commit=commit,
        wish=from_plain(Wish, wishes[0]["wish"]) if wishes else None,
        counts=tuple(entry["record"]["expert_load"] for entry in reversed(commits)),
    )
