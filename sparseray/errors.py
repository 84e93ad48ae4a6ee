"""The exceptions a user may see; a leaf that every part may import.

Each message says what is wrong, where, the value, and what to do. The command line turns
a `UserError` into one line on stderr and exit code 2; anything else is a defect of ours.
"""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave; the message names the place and the cure."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot be used."""


class DataError(UserError):
    """Token shards, sources or tokenizers that are missing, empty or changed."""


class CheckpointError(UserError):
    """A checkpoint that is truncated, tampered with, or of another model."""


class IdentityError(UserError):
    """A DSE layout that differs from the one that addressed the table rows."""


class ClusterError(UserError):
    """Ray is missing, refuses the token, or has too few free slots."""


class RunFailedError(RuntimeError):
    """A run that stopped by itself; its checkpoints are whole and it can be resumed."""


class SlotLostError(RuntimeError):
    """A slot did not answer within its deadline, or its process is gone; `slots` says which, where that is known."""

    def __init__(self, text: str, slots: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.slots = tuple(slots)


class SupersededError(Exception):
    """A newer plan came while a slot waited for replies of an older one; args[0] is its message."""


class SlotsLostError(RuntimeError):
    """Slots of the running plan are gone; `losses` says which, why, and when it was noticed."""

    def __init__(self, losses: list[Any]) -> None:
        super().__init__("; ".join(f"slot {loss.slot}: {loss.cause}" for loss in losses))
        self.losses = losses


class StateLostError(UserError):
    """Every replica of some state is gone; the message names it and the checkpoint to resume from."""


class OfferGoneError(RuntimeError):
    """Weights that a training run kept for servers are not there any more."""


class FencedError(RuntimeError):
    """Another scheduler has taken over this run's journal; this one must not act any more."""


class SchedulerLostError(RuntimeError):
    """The scheduler does not answer; Ray may be restarting it."""


class JobEndedError(RuntimeError):
    """The job was ended at once, without a checkpoint; its thread must not wait for slots any more."""
