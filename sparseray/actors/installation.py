"""How a slot enters a generation: the message of a plan, and where the state comes from that it asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from sparseray.actors.exchange.by_message import Caller
from sparseray.actors.exchange.pulls import pull
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import DENSE, Piece
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
        weights_only: moments begin at zero, whatever the checkpoint has.
    """

    checkpoint: str
    everything: bool = True
    weights_only: bool = False


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
        weights: folder that a server's pieces of `step` can be read from; empty in training.
        earlier: version of a server's weights that requests may still be finished with; -1 for none.
        by_collectives: slots that train in step exchange by these, not through each other's memory.
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
    weights: str = ""
    earlier: int = -1
    by_collectives: bool = False

    @property
    def source(self) -> Restore | None:
        """Where the pieces come from that no peer gives; None where peers give all."""
        if self.restore is not None or not self.weights:
            return self.restore
        return Restore(checkpoint=self.weights, everything=False)


@dataclass(frozen=True, kw_only=True)
class Gather(Body):
    """Read what a plan that is to come gives you, beside what you do; answered by Gathered.

    Args:
        pieces: that are not held yet.
        job: what to build.
        scheduler: address of the scheduler's inbox.
        step: version of a server's weights.
        weights: folder that they are read from.
    """

    is_of_any_generation: ClassVar[bool] = True

    pieces: tuple[Piece, ...]
    job: JobSpec
    scheduler: str
    step: int
    weights: str


@dataclass(frozen=True, kw_only=True)
class Gathered(Body):
    """What was to be read is here, or cannot be read: the plan may come."""

    is_of_any_generation: ClassVar[bool] = True

    pieces: tuple[Piece, ...]


class Reads(Protocol):
    """Reads tensors of a checkpoint by name."""

    def __call__(self, directory: str, names: Sequence[str]) -> dict[str, Tensor]: ...


def restore(
    holdings: Holdings, pieces: Sequence[Piece], message: InstallPlan, read: Reads, *, with_optimizer: bool
) -> None:
    """Take from a checkpoint, or draw from the seed where there is none, what is not held.

    Args:
        holdings: of the slot.
        pieces: that the plan gives the slot.
        message: names checkpoint and step.
        read: reads tensors.
        with_optimizer: whether the state will be updated.
    """
    assert message.source is not None
    lacking = [piece for piece in pieces if piece not in holdings.held]
    directory = message.source.checkpoint
    if not directory:
        holdings.initialize(lacking)
    elif lacking:
        begins = with_optimizer and message.source.weights_only
        found = read(directory, holdings.names(lacking, with_optimizer=with_optimizer and not begins))
        if begins or _has_further_tokens(holdings, lacking, found):
            holdings.initialize(lacking, message.step)
            found = _grown(holdings.tensors(lacking), found)
        holdings.load(lacking, found, message.step, with_optimizer=with_optimizer)


def _has_further_tokens(holdings: Holdings, pieces: Sequence[Piece], read: dict[str, Tensor]) -> bool:
    """Whether the model has rows of tokens that what was read has not.

    Args:
        holdings: of the slot.
        pieces: that were read.
        read: tensors of them.
    """
    if DENSE not in pieces:
        return False
    own = (holdings.dense or holdings.spare()).tensors(with_optimizer=False)
    return own["embedding"].shape != read["embedding"].shape


def _grown(own: dict[str, Tensor], read: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was read, over what was drawn: rows of added tokens stay as drawn, and moments that were not read at zero.

    Args:
        own: all tensors of the pieces.
        read: some of them, perhaps of fewer rows.
    """
    found = dict(own)
    for name, tensor in read.items():
        if tensor.shape != own[name].shape:
            grown = own[name].clone()
            grown[: tensor.shape[0]] = tensor
            tensor = grown
        found[name] = tensor
    return found


def pull_missing(
    holdings: Holdings, pieces: Sequence[Piece], message: InstallPlan, call: Caller, *, with_optimizer: bool
) -> None:
    """Copy from peers the pieces that are not held here.

    Args:
        holdings, pieces, message, with_optimizer: as in `restore`; the message names the peers.
        call: asks them.
    """
    lacking = set(pieces) - holdings.held
    wanted = {pull.source: tuple(p for p in pull.pieces if p in lacking) for pull in message.pulls}
    wanted = {slot: own for slot, own in wanted.items() if own}
    if not wanted:
        return
    call.step, call.part = message.step + 1, -1
    every = [piece for own in wanted.values() for piece in own]
    of_sources = list(wanted.values())
    with holdings.arriving(every, message.step, with_optimizer=with_optimizer, runs_of=of_sources) as tensors:
        pull(call, wanted, tensors, holdings.experts.device)
