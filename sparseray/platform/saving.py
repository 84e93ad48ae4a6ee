"""A checkpoint on its way: which slots still write, and what the others wrote."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from sparseray.actors.wire.envelope import Message
from sparseray.actors.wire.messages import Saved, SavedTensor
from sparseray.errors import UserError


@dataclass
class Saving:
    """A checkpoint that slots are writing.

    Args:
        step: that it is of.
        folder: unfinished.
        waiting: slots that have not answered.
        tensors: what those that have wrote.
        started: when it began.
    """

    step: int
    folder: Path
    waiting: set[int]
    tensors: dict[str, SavedTensor] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def take(self, message: Message[Saved]) -> bool:
        """Add an answer; True once all are in.

        Raises:
            UserError: a slot could not write.
        """
        if message.step != self.step + 1:
            return False  # Of a checkpoint that was given up.
        if message.body.error:
            raise UserError(message.body.error)
        self.tensors |= message.body.tensors
        self.waiting.discard(message.source)
        return not self.waiting
