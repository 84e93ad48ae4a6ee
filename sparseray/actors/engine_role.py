"""The engine that a slot plays in serving: it outlives plans that leave it where it is, with its caches.

Between the slot (slot.py), which enters generations, and the engine (serving/engine.py), which knows none. A plan
that comes while a layer waits is entered there and then, and the layer goes on with those who answer now.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sparseray.actors.exchange.patience import Patience
from sparseray.actors.exchange.protocol import Exchange
from sparseray.actors.observation import observe_engine, observe_memory, observe_no_engine, observe_queues
from sparseray.actors.peers.in_rounds import Round, RoundsExchange
from sparseray.actors.serving.enduring import EnduringExchange
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.messages import Cancel, Drain, Draining, Generate, Moved, Tokens
from sparseray.actors.serving.pace import Pace
from sparseray.actors.serving.rounds_engine import InRounds
from sparseray.actors.serving.staging import Edition
from sparseray.actors.serving.text_request import TokenEvent
from sparseray.actors.wire.envelope import INGRESS, SCHEDULER, Body, Message
from sparseray.actors.wire.messages import ExpertForward, FetchRows
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SlotLostError, SupersededError, UserError
from sparseray.log import get_logger
from sparseray.model.transformer import Transformer

log = get_logger(__name__)

SPEAK_S = 0.5
ANSWERED: dict[type[Body], str] = {ExpertForward: "experts", FetchRows: "memory"}
"""Role of a shard by what it is asked in serving."""


class Job(Protocol):
    """What it takes to make an engine."""

    is_serving: bool
    is_in_rounds: bool

    def engine(self, model: Transformer, exchange: EnduringExchange | InRounds) -> Engine | None:
        """Make the engine; None for a job that does not serve.

        Args:
            model: dense weights.
            exchange: that outlives plans.
        """
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record a metric of the slot.

        Args:
            name: in the registry.
            value: in the metric's unit.
            labels: of the metric.
        """
        ...


@dataclass(kw_only=True)
class Seat:
    """An engine, of one version of the weights, and the exchange of the plan in force.

    Args:
        exchange: by which the engine asks; None until there is one.
        step_open: experts and rows answer for this step, as in training: the one after the version's number.
        engine: None until it is made.
    """

    exchange: Exchange | None
    step_open: int
    engine: Engine | None = None

    def current(self) -> Exchange:
        """The exchange, set to ask for this version."""
        assert self.exchange is not None
        self.exchange.begin(self.step_open, -1)
        return self.exchange

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Requests that are computed here."""
        return () if self.engine is None else self.engine.request_ids


class EngineRole:
    """Plays an engine, or none, as the plan has it; and the one of the version before until its requests end.

    Args:
        mailbox: of the slot.
        enter: enters the plan of a message.
        patience: with those who hold experts and rows.
    """

    def __init__(
        self, mailbox: SlotMailbox, enter: Callable[[Message[Body]], None], patience: Patience
    ) -> None:
        self.mailbox, self.enter, self.patience = mailbox, enter, patience
        self.seat, self.earlier = Seat(exchange=None, step_open=1), Seat(exchange=None, step_open=0)
        self.job: Job | None = None
        self.pace = Pace(time.perf_counter())
        self.spoke_s = 0.0
        self.askers: dict[str, int] = {}
        """Which ingress each request came from."""
        self.handlers: dict[type[Body], Callable[[Message[Any]], None]] = {
            Generate: self._generate,
            Cancel: self._cancel,
            Drain: self._drain,
            Round: self._round,
        }

    @property
    def engine(self) -> Engine | None:
        """The engine that new requests go to."""
        return self.seat.engine

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        rounds = self._rounds
        if rounds is not None and rounds.is_over:
            return False
        is_behind = rounds is not None and rounds.is_behind
        return is_behind or any(
            seat.engine is not None and seat.engine.has_work for seat in (self.earlier, self.seat)
        )

    @property
    def _rounds(self) -> RoundsExchange | None:
        """The exchange, where it is one in rounds."""
        return self.seat.exchange if isinstance(self.seat.exchange, RoundsExchange) else None

    def take(
        self,
        job: Job,
        model: Transformer | None,
        exchange: Exchange | None,
        committed: int,
        earlier: Edition | None = None,
    ) -> None:
        """Go on at a new plan: with the engine that is here if its weights stayed.

        Args:
            job: that the slot has.
            model: dense weights of the slot; None where it runs no model.
            exchange: of the new plan.
            committed: last step; experts and rows answer for the one after it, as in training.
            earlier: version before, whose requests may be finished; None where there is none.
        """
        if self.engine is not None and (job is not self.job or self.engine.model is not model):
            if earlier is not None and self.engine.model is earlier.model:
                self.drop_earlier()
                self.earlier = self.seat
            else:
                self._give_up(self.seat, stays=model is not None)
            self.seat = Seat(exchange=exchange, step_open=committed + 1)
        self.job = job
        if earlier is None or earlier.exchange is None:
            self.drop_earlier()
        else:
            self.earlier.exchange = earlier.exchange
        self.seat.exchange, self.seat.step_open = exchange, committed + 1
        if self.engine is None and model is not None:
            lookups = InRounds(self.seat) if job.is_in_rounds else self._enduring(self.seat)
            self.seat.engine = job.engine(model, lookups)
            self.pace.new_engine()

    def _enduring(self, seat: Seat) -> EnduringExchange:
        return EnduringExchange(seat.current, lambda: self._go_on(seat), self.patience)

    def drop(self) -> None:
        """End what is here; its requests must go elsewhere."""
        self.drop_earlier()
        had_engine = self.engine is not None
        self._give_up(self.seat, stays=False)
        self.seat = Seat(exchange=None, step_open=1)
        if had_engine and self.job is not None:
            observe_no_engine(self.job.observe)

    def drop_earlier(self) -> None:
        """End the engine of the version before; its requests go on with the one in force."""
        self._give_up(self.earlier, stays=True)
        self.earlier = Seat(exchange=None, step_open=0)

    def _give_up(self, seat: Seat, *, stays: bool) -> None:
        gone = seat.request_ids
        for asker in {self.askers[request_id] for request_id in gone}:
            own = tuple(request_id for request_id in gone if self.askers[request_id] == asker)
            self.mailbox.post(asker, Moved(request_ids=own, stays=stays))
        for request_id in gone:
            self._left(request_id)

    def _left(self, request_id: str) -> None:
        """Take note that a request is computed here no more."""
        self.askers.pop(request_id, None)
        self.pace.left(request_id)

    def _forget_gone(self) -> None:
        """Give the places of requests free whose ingress has ended: nobody reads them."""
        # With the first one the server ends.
        others = {asker for asker in self.askers.values() if asker < INGRESS}
        gone = set(self.mailbox.transport.gone(others))
        for request_id in [name for name, asker in self.askers.items() if asker in gone]:
            self._end(request_id)

    def tell_load(self) -> None:
        """Tell the scheduler twice a second what the slot does, in a job that serves."""
        now = time.perf_counter()
        if self.job is None or not self.job.is_serving or not self.pace.is_due(now):
            return
        self._forget_gone()
        engine = self.engine
        stats, usage = (None, 0.0) if engine is None else (engine.stats, engine.cache_usage)
        num_earlier, version = len(self.earlier.request_ids), self.seat.step_open - 1
        load = self.pace.take(now, stats, usage, version=version, num_earlier=num_earlier)
        self.mailbox.post(SCHEDULER, load)

    def answered(self, kind: type[Body], seconds: float) -> None:
        """Take note of time that the slot took to answer a peer.

        Args:
            kind: of the request.
            seconds: spent.
        """
        if (role := ANSWERED.get(kind)) is not None:
            self.pace.answered(role, seconds)

    def step(self) -> None:
        """Run one step of each batch and send its tokens on.

        Raises:
            SupersededError: a plan came that leaves no engine here; it has been entered. Or it ends a round, and waits.
            SlotLostError: a slot takes no part in a round.
        """
        rounds = self._rounds
        begun = 0 if rounds is None else rounds.begun
        for seat in (self.earlier, self.seat):
            # A plan that came within the first step may have ended the second.
            if self._is_here(seat) and seat.engine is not None and seat.engine.has_work:
                self._step(seat, seat.engine)
        if rounds is not None and rounds.begun == begun and rounds.is_behind:
            rounds.join(self.seat.step_open)

    def _is_here(self, seat: Seat) -> bool:
        return seat is self.earlier or seat is self.seat

    def _step(self, seat: Seat, engine: Engine) -> None:
        job = self.job
        assert job is not None
        started, events = time.perf_counter(), list[TokenEvent]()
        try:
            events = engine.step()
        except SupersededError:
            raise
        except Exception as error:
            if isinstance(error, SlotLostError) and isinstance(seat.exchange, RoundsExchange):
                # There is no replica to ask, and no further round, before the next plan.
                seat.exchange.abort()
                raise
            # The engine has put the batch back; it gives up on a request after some failures.
            log.warning("slot %d: a serving step failed, trying again: %s", self.mailbox.slot, error)
            return
        finally:
            now = time.perf_counter()
            batch = observe_engine(job.observe, engine, now - started)
            self.pace.stepped(now - started, batch, events, now)
            if seat.exchange is not None:
                observe_memory(job.observe, seat.exchange)
        is_due = now - self.spoke_s > SPEAK_S
        if is_due:
            self.spoke_s = now
        if events or is_due:
            # Those who hear of no token hear that the engine works.
            for asker in set(self.askers.values()):
                own = tuple(event for event in events if self.askers.get(event.request_id) == asker)
                if own or is_due:
                    self.mailbox.post(asker, Tokens.of(own, seat.step_open - 1))
            for event in events:
                if event.finish_reason is not None:
                    self.askers.pop(event.request_id, None)

    def _go_on(self, seat: Seat) -> bool:
        """Enter the plan that came within a step of an engine; False if it leaves that engine no part here."""
        while self.mailbox.is_superseded:
            message = self.mailbox.next(0.0)
            if message is None:
                break
            try:
                self.enter(message)
            except SupersededError:
                continue
        return self._is_here(seat)

    def _generate(self, message: Message[Generate]) -> None:
        request = message.body.request
        if self.engine is None:
            self.mailbox.post(message.source, Moved(request_ids=(request.request_id,)))
            return
        self.askers[request.request_id] = message.source
        try:
            self.engine.add(request)
            self.pace.arrived(request.request_id, time.perf_counter(), is_resumed=bool(request.resume_tokens))
        except UserError as error:
            event = TokenEvent(
                request_id=request.request_id,
                index=len(request.resume_tokens),
                finish_reason="error",
                error=str(error),
            )
            self.askers.pop(request.request_id, None)
            self.mailbox.post(message.source, Tokens.of((event,)))

    def _round(self, message: Message[Round]) -> None:
        if (rounds := self._rounds) is not None:
            rounds.heard(message.body.number)

    def _drain(self, _: Message[Drain]) -> None:
        left = len(self.seat.request_ids) + len(self.earlier.request_ids)
        self.mailbox.post(SCHEDULER, Draining(num_requests=left))

    def _cancel(self, message: Message[Cancel]) -> None:
        self._end(message.body.request_id)

    def _end(self, request_id: str) -> None:
        for seat in (self.earlier, self.seat):
            if seat.engine is not None and self.job is not None:
                seat.engine.cancel(request_id)
                observe_queues(self.job.observe, seat.engine)
        self._left(request_id)
