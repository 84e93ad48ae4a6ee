"""The Ray actor that a slot lives in: light itself, so that all that is heavy (torch, the model) loads at low priority.

A slot that starts beside a running job would otherwise slow it down for the seconds that this takes.
"""

import gc
import importlib
from typing import Any

from sparseray.platform.fleet.priority import gently


class SlotActor:
    """One slot; everything but its start and end reaches it through its mailbox.

    Args:
        host: of `host.Host`.
    """

    def __init__(self, **host: Any) -> None:
        self._host = gently(_load).Host(**host)

    def prepare(self, spec: Any, heartbeats: str) -> Any:
        """`host.Host.prepare`; what it takes is not imported here, where nothing heavy may be.

        Args:
            spec: a `JobSpec`.
            heartbeats: address that signs of life go to.
        """
        return self._host.prepare(spec, heartbeats)

    def wait_for_end(self) -> None:
        """Return when the slot has stopped serving; the scheduler's call to it fails when this process dies."""
        self._host.wait_for_end()


def _load() -> Any:
    """Import what is heavy, with the garbage collector off: there is no garbage, and looking takes a fifth of the time."""
    gc.disable()
    try:
        return importlib.import_module("sparseray.platform.fleet.host")
    finally:
        # Modules stay; later collections, which stop a step, need not visit them either.
        gc.freeze()
        gc.enable()
