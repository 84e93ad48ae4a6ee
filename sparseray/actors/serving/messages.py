"""What an ingress and an engine say to each other; Cancel, which carries no value of this folder, is in wire/."""

from dataclasses import dataclass

from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.wire.envelope import Body


@dataclass(frozen=True, kw_only=True)
class Generate(Body):
    """Continue a text."""

    request: GenerationRequest


@dataclass(frozen=True, kw_only=True)
class Tokens(Body):
    """What one engine step gave, for one or several requests."""

    events: tuple[TokenEvent, ...]
