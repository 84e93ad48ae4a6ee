"""`RoundsEngine`: an engine whose experts lie in several slots, each of whose passes over the network is a round of all.

What it asks of the exchange outlives plans (`InRounds`). A plan that comes within a round ends it, and the step with it:
requests that decode go on from the tokens that the host knows, with their caches, and those that read their prompt
begin again (`PagedEngine`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseray.actors.exchange.protocol import Exchange, FetchedRows
from sparseray.actors.peers.in_rounds import Layers, RoundsExchange
from sparseray.actors.serving.chunks import Chunk
from sparseray.actors.serving.engine import Ongoing
from sparseray.actors.serving.paged_engine import Flight, PagedEngine, Taken, to_host
from sparseray.actors.serving.paged_model import WARM_ROWS, PagedModel
from sparseray.actors.serving.recording import nothing
from sparseray.errors import SlotLostError, SupersededError
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.transformer import Transformer


class Place(Protocol):
    """Where an engine stands."""

    step_open: int

    def current(self) -> Exchange:
        """The exchange of the plan in force; where an engine has everything it is on its own."""
        ...


class InRounds:
    """What a model asks of an exchange, over changes of plan.

    Args:
        place: of the engine.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._current = place, place.current

    def open_round(self) -> None:
        """Begin a pass over the network, with all others."""
        if (rounds := self.rounds) is not None:
            rounds.open_round(self._place.step_open)

    @property
    def rounds(self) -> RoundsExchange | None:
        """The exchange of the plan in force, where it is one in rounds."""
        exchange = self._current()
        return exchange if isinstance(exchange, RoundsExchange) else None

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """As `Exchange.experts`.

        Args:
            layer, x_TH, topk_ids_TK, topk_weights_TK: as there.
        """
        return self._current().experts(layer, x_TH, topk_ids_TK, topk_weights_TK)

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """As `Exchange.prefetch`."""
        return self._current().prefetch(rows)


class RoundsModel(PagedModel):
    """`PagedModel` whose passes are rounds.

    Args:
        model: the dense part.
        rounds: begins them.
        sizes: as of `PagedModel`.
    """

    # Of which any round has room for.
    warm_prompts = (32,)

    def __init__(self, model: Transformer, *, rounds: InRounds, **sizes: Any) -> None:
        self._rounds, self._is_warm = rounds, False
        self._key: tuple[int, ...] | None = None
        # Prompts are launched: whoever enters makes the others wait for its graphs.
        super().__init__(model, **{**sizes, "prompt_rows": 0})

    def warm(self, experts: Experts, memory: Memory | None) -> None:
        """As of `PagedModel`; others take no part.

        Args:
            experts, memory: there.
        """
        rounds, self._is_warm = self._rounds.rounds, False
        # In rounds other kernels run than alone, and a holder computes as many rows in every one.
        self.warm_rows = WARM_ROWS if rounds is None else 0
        self._is_compiled &= (rounds is None) == (self._key is None)
        with nullcontext() if rounds is None else rounds.layers.rehearsed():
            super().warm(experts, memory)
        self._key, self._is_warm = self._captured_for(), True

    def _captured_for(self) -> tuple[int, ...] | None:
        rounds = self._rounds.rounds
        return None if rounds is None else rounds.layers.key

    def _open_round(self, experts: Experts, memory: Memory | None) -> None:
        if not self._is_warm:
            return
        if self._key != self._captured_for():
            self.warm(experts, memory)
        self._rounds.open_round()

    def prefill(self, chunks: Sequence[Chunk], experts: Experts, memory: Memory | None) -> list[Tensor]:
        """As of `PagedModel`.

        Args:
            chunks, experts, memory: there.
        """
        self._open_round(experts, memory)
        return super().prefill(chunks, experts, memory)

    def decode(
        self,
        chunks: Sequence[Chunk],
        experts: Experts,
        memory: Memory | None,
        learn: Callable[[], None] = nothing,
    ) -> Tensor:
        """As of `PagedModel`.

        Args:
            chunks, experts, memory, learn: there.
        """
        self._open_round(experts, memory)
        return super().decode(chunks, experts, memory, learn)


@dataclass(frozen=True, kw_only=True)
class RoundsFlight(Flight):
    """A step whose rounds may have come to no end.

    Args:
        layers: that it ran on.
        state: what its rounds left on the device, on the host once `done`.
    """

    layers: Layers
    state: Tensor


class RoundsEngine(PagedEngine):
    """Runs many requests, in step with the engines of other slots.

    Args:
        model: dense weights.
        rounds: to the experts.
        options: as of `PagedEngine`.
    """

    def __init__(self, model: Transformer, rounds: InRounds, **options: Any) -> None:
        self.runs_on, self._rounds = partial(RoundsModel, rounds=rounds), rounds
        super().__init__(model, rounds.experts, None, **options)

    def _sample(
        self, batch: list[tuple[Ongoing, Tensor | None]], ready: list[Ongoing], logits: list[Tensor]
    ) -> Flight:
        """As of `PagedEngine`; what the rounds left goes to the host too.

        Args:
            batch, ready, logits: there.
        """
        flight, rounds = super()._sample(batch, ready, logits), self._rounds.rounds
        if rounds is None or rounds.layers.state is None:
            return flight
        state, done = to_host(rounds.layers.state), torch.cuda.Event()
        done.record()
        return RoundsFlight(**{**vars(flight), "done": done}, layers=rounds.layers, state=state)

    def _lose(self, flight: Flight | None, batch: list[Ongoing], error: Exception) -> None:
        """As of `PagedEngine`, unless a round came to no end, which is no request's fault.

        Those that decode keep their caches, which end before the tokens that have not been told; those that read their
        prompt begin again, and nobody takes what was read for their prefix.

        Args:
            flight, batch, error: there.
        """
        if not isinstance(error, SupersededError | SlotLostError):
            super()._lose(flight, batch, error)
            return
        self._flight = None
        lost = [*batch, *([] if flight is None else [sequence for sequence, _ in flight.batch])]
        for sequence in reversed(list(dict.fromkeys(lost))):
            if sequence.lease is None:
                continue
            sequence.pending = 0
            if len(sequence.tokens) > sequence.num_read:
                # One that has moved here may still be computing tokens that it had.
                sequence.lease.length = min(sequence.lease.length, len(sequence.tokens) - 1)
                continue
            self.pool.forget(sequence.lease)
            self._release(sequence)
            self._running.remove(sequence)
            sequence.prompt_logprobs = []
            self._waiting.appendleft(sequence)

    def _take(self, flight: Flight) -> list[Taken]:
        """As of `PagedEngine`; raises where a round came to no end."""
        if isinstance(flight, RoundsFlight):
            assert flight.done is not None
            flight.done.synchronize()
            flight.layers.check(int(flight.state[0]))
        return super()._take(flight)
