"""What a run does about a loss spike: remembers the last steps, and decides before a step is committed.

Everything it knows it takes from the steps' records, so it knows the same after a restart. The detector is
planning/spikes.py; the reaction is in the training loop: a skipped step is committed without an update.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseray.errors import UserError
from sparseray.platform.config import OptimConfig, TrainConfig
from sparseray.platform.planning.spikes import Reading, find_spike
from sparseray.platform.run import checkpoint

MOST_IN_A_ROW = 8
"""Steps left out one after another before a person is asked: by then it is not the data."""


class SpikeWatch:
    """Watches the steps of one run.

    Args:
        train: reaction and its measure.
        optim: whose learning rate an error names.
    """

    def __init__(self, train: TrainConfig, optim: OptimConfig) -> None:
        self._train, self._optim = train, optim
        self.begin([])

    def begin(self, records: Sequence[dict[str, Any]]) -> None:
        """Go on after these steps."""
        self._recent: deque[Reading] = deque(maxlen=self._train.spike_window)
        self._in_a_row, self.wants_rollback = 0, False
        for record in records:
            self.count(record)

    def count(self, record: dict[str, Any]) -> None:
        """Take note of a committed step."""
        self.wants_rollback = record.get("spike") == "rollback"
        if "spike" in record:
            self._in_a_row += 1
            return
        self._in_a_row = 0
        self._recent.append(Reading(loss=record["loss"], norm=record["grad_norm"]))

    def look(self, step: int, now: Reading) -> str:
        """Say why a step is to be left out; empty to apply it.

        Args:
            step: that is decided.
            now: what it gave.

        Raises:
            UserError: it cannot be applied and no reaction is chosen, or too many were left out in a row.
        """
        is_off = self._train.spike == "off"
        why = find_spike(now, [] if is_off else self._recent, self._train.spike_deviations)
        if not why:
            return ""
        lower = f"--optim.lr={self._optim.lr / 10:g}"
        if is_off:
            raise UserError(
                f"{why} at step {step}: nothing was applied; the same command with {lower} goes on from the last "
                "checkpoint at a tenth of the rate, or with --train.spike=skip leaves such steps out"
            )
        if self._in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{why} at step {step}, and {self._in_a_row} steps before it were left out for the like: this is not "
                f"the data; the same command with {lower} goes on from the last checkpoint at a tenth of the rate"
            )
        return why


def rollback_target(root: Path, train: TrainConfig, step: int) -> Path | None:
    """The checkpoint that a spike goes back to: the newest that the schedule made; None where there is none yet.

    One that a stop left in between does not count: a run that was stopped goes back where any other does.

    Args:
        root: folder of the run's checkpoints.
        train: says when checkpoints are made.
        step: of the spike; the checkpoint is of an earlier one.
    """
    if train.spike != "rollback" or not train.checkpoint_every:
        return None
    found = (p for p in checkpoint.list_finished(root) if checkpoint.step_of(p) < step)
    return max(
        (p for p in found if checkpoint.step_of(p) % train.checkpoint_every == 0),
        key=checkpoint.step_of,
        default=None,
    )
