"""What a slot must know to enter a generation: the message of a plan, with the job and where state comes from."""

from dataclasses import dataclass
from typing import ClassVar

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.envelope import Body
from sparseray.actors.wire.messages import Commit


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a slot builds its states from.

    Args:
        config: the run's configuration, as JSON of its plain values.
        layout: folder with the DSE layout, empty for a model without memory.
        layout_sha256: of that layout.
        serving: whether tokens are generated; otherwise the slot trains.
        tokenizer: file of the tokenizer, for serving.
    """

    config: str
    layout: str = ""
    layout_sha256: str = ""
    serving: bool = False
    tokenizer: str = ""


@dataclass(frozen=True, kw_only=True)
class Restore:
    """Where state comes from when no peer has it: a checkpoint's folder, or the seed where it is empty."""

    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class PullFrom:
    """Pieces to copy from a peer."""

    source: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class InstallPlan(Body):
    """Enter a generation.

    Args:
        plan: who holds what.
        job: what to build.
        scheduler: address of the scheduler's inbox.
        step: last committed one; all state is to be of it.
        restore: throw away what is held and load this; None to keep it.
        commit: the last one, for a slot that has not received it.
        pulls: what to copy from peers, for pieces that are not held.
    """

    opens_generation: ClassVar[bool] = True

    plan: Plan
    job: JobSpec
    scheduler: str
    step: int
    restore: Restore | None = None
    commit: Commit | None = None
    pulls: tuple[PullFrom, ...] = ()
