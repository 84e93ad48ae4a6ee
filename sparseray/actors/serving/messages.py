"""What an ingress, its engines and their scheduler say to each other.

None of it belongs to a generation: a request outlives the plans that change while it is computed. What comes from an
engine that has no part in it any more is told by its sender and by the index of its token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.wire.envelope import Body


@dataclass(frozen=True, kw_only=True)
class Generate(Body):
    """Continue a text."""

    is_of_any_generation: ClassVar[bool] = True

    request: GenerationRequest


@dataclass(frozen=True, kw_only=True)
class Tokens(Body):
    """What one engine step gave, for one or several requests; without any, the sign that steps go on.

    Most events are a token, perhaps the last: these travel as columns, which costs a tenth.

    Args:
        request_ids, indices, token_ids, finish_reasons: of the events that are no more than these, in order; "" where
            the request goes on.
        others: the other events, and the place of each among all.
        version: of the weights that gave them.
    """

    is_of_any_generation: ClassVar[bool] = True

    request_ids: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    others: tuple[tuple[int, TokenEvent], ...] = ()
    version: int = -1

    @classmethod
    def of(cls, events: Sequence[TokenEvent], version: int = -1) -> "Tokens":
        """The message that tells some events.

        Args:
            events: in order.
            version: of the weights that gave them.
        """
        plain = [
            (e.request_id, e.index, e.token_id, e.finish_reason or "")
            for e in events
            if e.token_id is not None and e.is_plain
        ]
        request_ids, indices, token_ids, finish_reasons = zip(*plain) if plain else ((), (), (), ())
        return cls(
            request_ids=request_ids,
            indices=indices,
            token_ids=token_ids,
            finish_reasons=finish_reasons,
            others=tuple((i, e) for i, e in enumerate(events) if e.token_id is None or not e.is_plain),
            version=version,
        )

    def events(self) -> list[TokenEvent]:
        """All events, in order."""
        found = [
            TokenEvent(request_id=name, index=index, token_id=token, finish_reason=reason or None)
            for name, index, token, reason in zip(
                self.request_ids, self.indices, self.token_ids, self.finish_reasons
            )
        ]
        for place, event in self.others:
            found.insert(place, event)
        return found


@dataclass(frozen=True, kw_only=True)
class Cancel(Body):
    """Forget a request."""

    is_of_any_generation: ClassVar[bool] = True

    request_id: str


@dataclass(frozen=True, kw_only=True)
class Moved(Body):
    """These requests are computed here no longer: another engine must go on with them.

    Args:
        request_ids: of them.
        stays: whether the sender goes on being an engine, with other weights.
    """

    is_of_any_generation: ClassVar[bool] = True

    request_ids: tuple[str, ...]
    stays: bool = False


@dataclass(frozen=True, kw_only=True)
class Routes(Body):
    """Where requests go from now on.

    Args:
        generation: of the plan.
        engines: address of every engine, by slot; none while there is none.
        reason: why there is none, for people.
        draining: engines that finish what they have and get no new request.
        versions: name of each version of the weights that may still answer, by its number; the last is in force.
    """

    is_of_any_generation: ClassVar[bool] = True

    generation: int
    engines: dict[int, str]
    reason: str = ""
    draining: tuple[int, ...] = ()
    versions: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Drain(Body):
    """Say how much you have still to finish; answered by Draining."""

    is_of_any_generation: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Draining(Body):
    """How many requests an engine has."""

    is_of_any_generation: ClassVar[bool] = True

    num_requests: int


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """What an engine did since it last said so; latencies are counts by bucket, as serving/pace.py numbers them.

    Args:
        is_cold: whether its first steps are among them: these tell nothing of its speed.
        waiting, running: requests that it has now.
        cache_usage: of the cache, 0 to 1, now.
        arrived: requests that came, not those that another engine had begun.
        finished, finished_tokens: requests that ended, and tokens added to them here.
        tokens: added to all requests.
        steps, rows, busy_s: calls of the model, the sum of their batches, and the seconds that they took.
        ttft: from a request's arrival to its first token.
        itl: between two tokens of a request.
    """

    is_cold: bool
    waiting: int
    running: int
    cache_usage: float
    arrived: int
    finished: int
    finished_tokens: int
    tokens: int
    steps: int
    rows: int
    busy_s: float
    ttft: dict[int, int]
    itl: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Load(Body):
    """What a slot of a server did since it last said so, twice a second, to the scheduler.

    Args:
        seconds: since then.
        answered_s: seconds of them that it took to answer its peers, by role (experts, memory).
        engine: of the engine that it plays; None for none.
        version: of the weights that it serves.
        num_earlier: requests that it has still to finish with the version before.
    """

    is_of_any_generation: ClassVar[bool] = True

    seconds: float
    answered_s: dict[str, float]
    engine: EngineLoad | None
    version: int
    num_earlier: int


@dataclass(frozen=True, kw_only=True)
class Stage(Body):
    """Read another version of the weights beside the one that is served; answered by Staged.

    Args:
        checkpoint: its folder.
        version: its number.
    """

    checkpoint: str
    version: int


@dataclass(frozen=True, kw_only=True)
class Staged(Body):
    """A version has been read, or cannot be and why."""

    is_of_any_generation: ClassVar[bool] = True

    version: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Retire(Body):
    """Forget the version before this one.

    Args:
        version: that is in force.
        engines_only: give its requests up and go on answering for it: others may ask still.
    """

    version: int
    engines_only: bool
