"""What the exchange with other slots costs in each step: bytes, and time of the device or of the host without one.

Nothing here makes the host wait: marks lie between what is launched, and are read when a step's end has been.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparseray.actors.exchange.protocol import Observe
from sparseray.actors.peers.link import Link


class Meter:
    """Adds up over a step.

    Args:
        link: tells the time of what it is asked for, and what it has waited.
        observe: metrics of the slot.
    """

    def __init__(self, link: Link, observe: Observe) -> None:
        self.link, self.observe = link, observe
        self._spans: list[tuple[str, Any, Any]] = []
        self._bytes: Counter[str] = Counter()
        self._waited_s = link.waited_s

    @contextmanager
    def phase(self, name: str, num_bytes: int) -> Iterator[None]:
        """Count what is asked for in the block.

        Args:
            name: dispatch or combine.
            num_bytes: that go to other slots.
        """
        begin = self.link.mark()
        yield
        self._spans.append((name, begin, self.link.mark()))
        self._bytes[name] += num_bytes

    def tell(self) -> None:
        """Record everything since the last call; the link must have read what was asked for later."""
        for name, begin, end in self._spans:
            self.observe("exchange_seconds_total", self.link.seconds(begin, end), phase=name)
        for name, count in self._bytes.items():
            self.observe("exchange_bytes_total", count, phase=name)
        self.observe("exchange_seconds_total", self.link.waited_s - self._waited_s, phase="wait")
        self._waited_s = self.link.waited_s
        self.forget()

    def forget(self) -> None:
        """Begin anew, after what came to no end."""
        self._spans.clear()
        self._bytes.clear()
