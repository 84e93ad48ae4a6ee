"""Another version of the weights, read beside the one that is served, and the one before it until its requests end.

A slot that is told of a version reads its pieces in a thread; the plan that brings the version then finds them here
(roles.py). With `serve.in_flight: finish` the version before stays for the requests that began with it.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sparseray.actors.exchange.answers import Answers
from sparseray.actors.exchange.protocol import Exchange
from sparseray.actors.state.holdings import Holdings
from sparseray.log import get_logger
from sparseray.model.transformer import Transformer

log = get_logger(__name__)

R = TypeVar("R")


@dataclass(kw_only=True)
class Edition:
    """The weights of one version in a slot.

    Args:
        number: of the version; a later one's is higher. In messages it is the step before the open one.
        holdings: its pieces.
        answers: to what is asked of them in the plan in force.
        exchange: by which an engine asks for this version's experts and rows; None where the slot plays no engine.
    """

    number: int
    holdings: Holdings
    answers: Answers | None = None
    exchange: Exchange | None = None

    @property
    def model(self) -> Transformer | None:
        """Dense weights, where they are held."""
        return None if self.holdings.dense is None else self.holdings.dense.model


class Staging(Generic[R]):
    """Reads one thing at a time in a thread of its own: a version, or pieces of one."""

    def __init__(self) -> None:
        self._what: Hashable = None
        self._thread: threading.Thread | None = None
        self._read: R | None = None

    def start(self, what: Hashable, read: Callable[[], R], tell: Callable[[str], None]) -> None:
        """Read something; what is being read already goes on.

        Args:
            what: it is: number and folder of a version, and perhaps pieces.
            read: reads it.
            tell: called with what went wrong, or with nothing.
        """
        if what == self._what:
            if self._thread is not None and not self._thread.is_alive():
                tell("")
            return
        self._join()
        self._what, self._read = what, None

        def run() -> None:
            error = ""
            try:
                self._read = read()
            except Exception as failure:
                log.warning("%s cannot be read: %s", what, failure)
                error = f"{type(failure).__name__}: {failure}"
                self._what = None
            tell(error)

        self._thread = threading.Thread(target=run, daemon=True, name="staging")
        self._thread.start()

    def take(self, what: Hashable) -> R | None:
        """Return what was read, waiting for the rest; None where nothing was."""
        if what != self._what:
            return None
        self._join()
        found, self._read, self._what = self._read, None, None
        return found

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
