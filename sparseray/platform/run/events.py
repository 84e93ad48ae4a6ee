"""What is told of a run's changes: a line for people and programs, metrics, and the phases of a recovery."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.run.folder import RunFolder


@dataclass(kw_only=True)
class Change:
    """One change of generation, from its cause to the first commit after it.

    Args:
        kind: event that it becomes.
        text: cause, for people.
        noticed: when it was, `time.monotonic`.
        silent_s: seconds that a lost slot had been silent by then.
        phases: seconds by phase: detect, decide, move, first_step, total.
        installed: when all slots had their state.
    """

    kind: str
    text: str
    noticed: float
    silent_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    installed: float = 0.0

    def end(self, now: float) -> None:
        """Take note of the first commit."""
        self.phases["first_step"] = now - self.installed
        self.phases["total"] = now - self.noticed + self.silent_s

    def parts(self) -> str:
        """The phases, for people."""
        found = [
            (name.replace("_", " "), seconds) for name, seconds in self.phases.items() if name != "total"
        ]
        return ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in found)


class Events:
    """Tells of changes in the run folder, in metrics and to the scheduler.

    Args:
        folder: whose `events.jsonl` gets a line for each.
        metrics: of the scheduler.
        replication: wanted number of holders.
        on_event: told of each as well.
    """

    def __init__(
        self,
        folder: RunFolder,
        metrics: Metrics,
        replication: int,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self.folder, self.metrics, self.replication, self.on_event = folder, metrics, replication, on_event
        self._peers: set[str] = set()
        self._dropped: dict[str, int] = {}

    def tell(
        self, kind: str, step: int, text: str, *, generation: int, plan: Plan, members: set[int], **more: Any
    ) -> None:
        """Tell of one event after a step.

        Args:
            kind: of the event.
            step: after which it came.
            text: for people.
            generation: of the plan in force.
            plan: in force.
            members: living slots.
            more: further values of the record.
        """
        event = {
            "time": time.time(),
            "step": step,
            "generation": generation,
            "kind": kind,
            "text": text,
            **slots_by_role(plan, members),
            **more,
        }
        self.folder.append_event(event)
        self.metrics.record("elastic_events_total", 1, kind=kind)
        self.on_event({"event": kind, **event})

    def gauges(self, plan: Plan, members: set[int], replicas: int) -> None:
        """Show the plan in force.

        Args:
            plan: in force.
            members: living slots.
            replicas: fewest living holders of a piece.
        """
        self.metrics.record("elastic_generation", plan.generation)
        for role, count in slots_by_role(plan, members).items():
            self.metrics.record("elastic_slots", count, role=role)
        self.metrics.record("elastic_replicas", self.replication, state="target")
        self.metrics.record("elastic_replicas", replicas, state="actual")

    def watch(self, ages: dict[int, float], dropped: dict[str, int]) -> None:
        """Show how long ago each slot was heard of, and messages that were refused.

        Args:
            ages: seconds since each slot was heard of.
            dropped: refused messages by reason.
        """
        for slot, age in ages.items():
            self.metrics.record("elastic_heartbeat_age_seconds", age, peer=str(slot))
        peers = {str(slot) for slot in ages}
        for gone in self._peers - peers:
            self.metrics.forget("elastic_heartbeat_age_seconds", peer=gone)
        self._peers = peers
        for reason, count in dropped.items():
            self.metrics.record("messages_dropped_total", count - self._dropped.get(reason, 0), reason=reason)
        self._dropped = dict(dropped)


def role_holders(plan: Plan) -> set[int]:
    """Slots that have a role or hold some state."""
    return plan.holders


def slots_by_role(plan: Plan, members: set[int]) -> dict[str, int]:
    """Living slots of each role, and those without.

    Args:
        plan: in force.
        members: living slots.
    """
    return {
        "attention": len(set(plan.attention) & members),
        "experts": len(set(plan.expert_primaries) & members),
        "memory": len(set(plan.memory_primaries) & members),
        "standby": len(members - role_holders(plan)),
    }


def describe_pieces(pieces: Collection[Piece]) -> str:
    """Name pieces of state for people."""
    names = {"dense": "the dense weights", "expert": "expert", "bucket": "memory bucket"}
    listed = [names[kind] if kind == "dense" else f"{names[kind]} {layer}.{i}" for kind, layer, i in pieces]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more pieces" if len(listed) > 4 else "")
