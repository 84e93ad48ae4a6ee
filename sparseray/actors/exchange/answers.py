"""What a slot answers to its peers, and to itself, from the state that it holds."""

import time
from collections.abc import Callable
from typing import Any

from sparseray.actors.exchange.chunks import Chunk, Giving, Pull, PullOn
from sparseray.actors.exchange.protocol import Observe
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.shared_buffer import Introduce, Introduced
from sparseray.actors.wire.envelope import Body
from sparseray.actors.wire.messages import (
    ExpertBackward,
    ExpertForward,
    ExpertRows,
    FetchRows,
    MemoryRows,
)


class Answers:
    """Computes the replies to data requests.

    Args:
        holdings: of the slot.
        observe: its metrics.
        with_optimizer: whether pieces that peers copy come with their optimizer state.
        introduce: says how the others reach this slot's memory, in a generation that needs it.
    """

    def __init__(
        self,
        holdings: Holdings,
        observe: Observe,
        *,
        with_optimizer: bool,
        introduce: Callable[[], Introduced] | None = None,
    ) -> None:
        self.holdings, self.observe = holdings, observe
        self.giving = Giving(holdings, with_optimizer=with_optimizer)
        self._introduction = introduce
        self._by_kind: dict[type[Body], Callable[[Any, int, int], Body]] = {
            ExpertForward: self._expert_forward,
            ExpertBackward: self._expert_backward,
            FetchRows: self._rows,
            Pull: self._pull,
            PullOn: self._pull_on,
            Introduce: self._introduce,
        }

    def knows(self, kind: type[Body]) -> bool:
        """Whether messages of this kind are requests that are answered here."""
        return kind in self._by_kind

    def __call__(self, body: Body, layer: int, part: int) -> Body:
        """Return the reply to a request.

        Args:
            body: of the request.
            layer, part: of its envelope.
        """
        return self._by_kind[type(body)](body, layer, part)

    def _expert_forward(self, body: ExpertForward, layer: int, part: int) -> ExpertRows:
        started = time.perf_counter()
        y_RH = self.holdings.experts.forward(
            layer, part, body.x_UH, body.rows_R, body.experts, body.counts, body.keep
        )
        observe_rows(self.observe, "forward", len(y_RH), time.perf_counter() - started)
        return ExpertRows(rows_RH=y_RH)

    def _expert_backward(self, body: ExpertBackward, layer: int, part: int) -> ExpertRows:
        started = time.perf_counter()
        dx_RH = self.holdings.experts.backward(layer, part, body.dout_UH, body.weights_R)
        observe_rows(self.observe, "backward", len(dx_RH), time.perf_counter() - started)
        return ExpertRows(rows_RH=dx_RH)

    def _rows(self, body: FetchRows, _layer: int, _part: int) -> MemoryRows:
        memory = self.holdings.memory
        assert memory is not None
        found = [memory.gather(layer, rows) for layer, rows in enumerate(body.rows_LN)]
        return MemoryRows(values_LND=tuple(found), handles=memory.handles)

    def _introduce(self, _body: Introduce, _layer: int, _part: int) -> Introduced:
        assert self._introduction is not None
        return self._introduction()

    def _pull(self, body: Pull, _layer: int, _part: int) -> Chunk:
        return self.giving.begin(body)

    def _pull_on(self, body: PullOn, _layer: int, _part: int) -> Chunk:
        return self.giving.go_on(body)


def observe_rows(observe: Observe, direction: str, rows: int, seconds: float) -> None:
    """Record token rows that the experts of this slot computed.

    Args:
        observe: the slot's metrics.
        direction: forward or backward.
        rows: how many.
        seconds: that it took.
    """
    observe("expert_rows_total", rows, direction=direction)
    observe("expert_seconds_total", seconds, direction=direction)
