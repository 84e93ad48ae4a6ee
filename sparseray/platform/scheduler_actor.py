"""The scheduler as Ray knows it: light itself, for whoever finds a named actor loads its class, and it has all there is behind it."""

import importlib
from typing import Any

PLATFORM = "sparseray-platform"
"""Ray's name of the scheduler: a cluster has one."""


class SchedulerActor:
    """Passes on what is asked.

    Args:
        options: of `scheduler.Scheduler`, which is loaded in the actor's process alone.
    """

    def __init__(self, **options: Any) -> None:
        self._scheduler = importlib.import_module("sparseray.platform.scheduler").Scheduler(**options)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the scheduler.

        Args:
            method: its name.
            arguments: of the call.
        """
        return getattr(self._scheduler, method)(*arguments)
