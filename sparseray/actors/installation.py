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
    """Where state comes from when no peer has it.

    Args:
        checkpoint: its folder; empty for the seed.
        everything: throw away what is held and load all; otherwise only pieces that no peer gives.
    """

    checkpoint: str
    everything: bool = True


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
        restore: where to load state from; None where peers have all.
        commit: the last one, for a slot that has not received it.
        pulls: what to copy from peers, for pieces that are not held.
        ingress: address that tokens go to, empty in training.
    """

    opens_generation: ClassVar[bool] = True

    plan: Plan
    job: JobSpec
    scheduler: str
    step: int
    restore: Restore | None = None
    commit: Commit | None = None
    pulls: tuple[PullFrom, ...] = ()
    ingress: str = ""
