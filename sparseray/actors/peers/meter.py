"""What the exchange with other slots costs in each step: bytes, and time of the device or of the host without one.

Nothing here makes the host wait: marks lie between what is launched, and are read when a step's end has been.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sparseray.actors.exchange.protocol import Observe
from sparseray.actors.peers.link import Link


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was asked for: phases with the marks around them, and bytes by phase."""

    spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    num_bytes: Counter[str] = field(default_factory=Counter)


class Meter:
    """Adds up over a step.

    Args:
        link: tells the time of what it is asked for, and what it has waited.
        observe: metrics of the slot.
    """

    def __init__(self, link: Link, observe: Observe) -> None:
        self.link, self.observe = link, observe
        self._costs = Costs()
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
        self._costs.spans.append((name, begin, self.link.mark()))
        self._costs.num_bytes[name] += num_bytes

    @contextmanager
    def apart(self) -> Iterator[Costs]:
        """Count what is asked for in the block in what it is given: it is recorded, and is added each time it happens."""
        here, self._costs = self._costs, Costs()
        try:
            yield self._costs
        finally:
            self._costs = here

    def add(self, costs: Costs) -> None:
        """Count what has happened again; of its phases the last time within a step counts for each.

        Args:
            costs: of `apart`.
        """
        self._costs.spans.extend(costs.spans)
        self._costs.num_bytes.update(costs.num_bytes)

    def tell(self) -> None:
        """Record everything since the last call; the link must have read what was asked for later."""
        for name, begin, end in self._costs.spans:
            self.observe("exchange_seconds_total", self.link.seconds(begin, end), phase=name)
        for name, count in self._costs.num_bytes.items():
            self.observe("exchange_bytes_total", count, phase=name)
        self.observe("exchange_seconds_total", self.link.waited_s - self._waited_s, phase="wait")
        self._waited_s = self.link.waited_s
        self.forget()

    def forget(self) -> None:
        """Begin anew, after what came to no end."""
        self._costs = Costs()
