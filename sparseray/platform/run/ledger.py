"""Where a run's time went: goodput is productive time over all time since the start.

Productive is what ended in a committed step; the time of a step that a loss cut off is lost.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sparseray.platform.metrics.exporter import Metrics

STATES = ("productive", "lost", "recovering", "resizing", "checkpointing", "evaluating")


class Ledger:
    """Adds up seconds by state and shows them as metrics.

    Args:
        metrics: of the scheduler.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.seconds = dict.fromkeys(STATES, 0.0)

    @contextmanager
    def state(self, name: str, failed: str = "lost") -> Iterator[None]:
        """Count the time inside as `name`, or as `failed` when it ends with an exception.

        Args:
            name: of the state.
            failed: state that the time counts as after an exception.
        """
        started, counted = time.monotonic(), failed
        try:
            yield
            counted = name
        finally:
            spent = time.monotonic() - started
            self.seconds[counted] += spent
            self.metrics.record("elastic_time_seconds_total", spent, state=counted)
            self.metrics.record("elastic_goodput_ratio", self.goodput)

    @property
    def goodput(self) -> float:
        """Productive time over all time that was counted; 1.0 at the start."""
        total = sum(self.seconds.values())
        return self.seconds["productive"] / total if total else 1.0
