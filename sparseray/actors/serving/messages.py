"""What an ingress, its engines and their scheduler say to each other.

None of it belongs to a generation: a request outlives the plans that change while it is computed. What comes from an
engine that has no part in it any more is told by its sender and by the index of its token.
"""

from dataclasses import dataclass
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
    """What one engine step gave, for one or several requests; without any, the sign that steps go on."""

    is_of_any_generation: ClassVar[bool] = True

    events: tuple[TokenEvent, ...]


@dataclass(frozen=True, kw_only=True)
class Cancel(Body):
    """Forget a request."""

    is_of_any_generation: ClassVar[bool] = True

    request_id: str


@dataclass(frozen=True, kw_only=True)
class Moved(Body):
    """These requests are computed here no longer: another engine must go on with them."""

    is_of_any_generation: ClassVar[bool] = True

    request_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Routes(Body):
    """Where requests go from now on.

    Args:
        generation: of the plan.
        engines: address of every engine, by slot; none while there is none.
        reason: why there is none, for people.
        draining: engines that finish what they have and get no new request.
    """

    is_of_any_generation: ClassVar[bool] = True

    generation: int
    engines: dict[int, str]
    reason: str = ""
    draining: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Drain(Body):
    """Say how much you have still to finish; answered by Draining."""

    is_of_any_generation: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Draining(Body):
    """How many requests an engine has."""

    is_of_any_generation: ClassVar[bool] = True

    num_requests: int
