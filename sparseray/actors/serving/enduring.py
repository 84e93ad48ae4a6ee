"""An engine's exchange: a call that a change of plan cuts off, or that nobody answers, is made again.

So an engine that stays where it is keeps its caches: the layer that waited for an expert or for rows goes on
with those who hold them now, or with a replica while a slot is silent (exchange/patience.py), and no request notices.
A call in serving changes no state, hence may be repeated.
"""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from sparseray.actors.exchange.patience import Patience
from sparseray.actors.exchange.protocol import Exchange, FetchedRows
from sparseray.errors import SlotLostError, SupersededError
from sparseray.log import get_logger

log = get_logger(__name__)

R = TypeVar("R")


class Lookups(Protocol):
    """What an engine asks of an exchange."""

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k, in k order, of weight * expert(x).

        Args:
            layer: 0-based model layer.
            x_TH: tokens.
            topk_ids_TK: int64 expert ids.
            topk_weights_TK: fp32.
        """
        ...

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """As `Exchange.prefetch`."""
        ...


class EnduringExchange:
    """What a model asks of an exchange, over changes of plan.

    Args:
        current: the exchange of the plan in force.
        go_on: enters the plan that came; False where this slot is no engine any more.
        patience: with those who are asked.
    """

    def __init__(
        self, current: Callable[[], Exchange], go_on: Callable[[], bool], patience: Patience
    ) -> None:
        self._current, self._go_on, self._patience = current, go_on, patience

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """As `Exchange.experts`.

        Args:
            layer, x_TH, topk_ids_TK, topk_weights_TK: as there.
        """
        return self._ask(lambda exchange: exchange.experts(layer, x_TH, topk_ids_TK, topk_weights_TK))

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """As `Exchange.prefetch`."""
        return self._ask(lambda exchange: exchange.prefetch(rows))

    def _ask(self, call: Callable[[Exchange], R]) -> R:
        started = time.monotonic()
        while True:
            try:
                return call(self._current())
            except SupersededError:
                if not self._go_on():
                    raise
            except SlotLostError as error:
                if time.monotonic() - started > self._patience.deadline_s:
                    raise
                log.info("%s; a replica is asked", error)
                self._patience.missed(error.slots)
