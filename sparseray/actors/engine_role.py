"""The engine that a slot plays in serving: it outlives plans that leave it where it is, with its caches.

Between the slot (slot.py), which enters generations, and the engine (serving/engine.py), which knows none. A plan
that comes while a layer waits is entered there and then, and the layer goes on with those who answer now.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

from sparseray.actors.exchange.patience import Patience
from sparseray.actors.exchange.protocol import Exchange
from sparseray.actors.observation import observe_engine, observe_memory, observe_no_engine, observe_queues
from sparseray.actors.serving.enduring import EnduringExchange
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.messages import Cancel, Drain, Draining, Generate, Moved, Tokens
from sparseray.actors.serving.text_request import TokenEvent
from sparseray.actors.wire.envelope import INGRESS, SCHEDULER, Body, Message
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SupersededError, UserError
from sparseray.log import get_logger
from sparseray.model.transformer import Transformer

log = get_logger(__name__)

SPEAK_S = 0.5


class Job(Protocol):
    """What it takes to make an engine."""

    def engine(self, model: Transformer, exchange: Exchange | EnduringExchange) -> Engine | None:
        """Make the engine; None for a job that does not serve.

        Args:
            model: dense weights.
            exchange: of the plan in force, or one that outlives plans.
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


class EngineRole:
    """Plays an engine, or none, as the plan has it.

    Args:
        mailbox: of the slot.
        enter: enters the plan of a message.
        patience: with those who hold experts and rows.
    """

    def __init__(
        self, mailbox: SlotMailbox, enter: Callable[[Message[Body]], None], patience: Patience
    ) -> None:
        self.mailbox, self.enter, self.patience = mailbox, enter, patience
        self.engine: Engine | None = None
        self.exchange: Exchange | None = None
        self.job: Job | None = None
        self.step_open = 1
        self.spoke_s = 0.0
        self.handlers: dict[type[Body], Callable[[Message[Any]], None]] = {
            Generate: self._generate,
            Cancel: self._cancel,
            Drain: self._drain,
        }

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self.engine is not None and self.engine.has_work

    def take(self, job: Job, model: Transformer | None, exchange: Exchange | None, committed: int) -> None:
        """Go on at a new plan: with the engine that is here if its weights stayed.

        Args:
            job: that the slot has.
            model: dense weights of the slot; None where it runs no model.
            exchange: of the new plan.
            committed: last step; experts and rows answer for the one after it, as in training.
        """
        if self.engine is not None and (job is not self.job or self.engine.model is not model):
            self.drop()
        self.job, self.exchange, self.step_open = job, exchange, committed + 1
        if self.engine is None and model is not None:
            self.engine = job.engine(model, EnduringExchange(self._current, self._go_on, self.patience))

    def _current(self) -> Exchange:
        assert self.exchange is not None
        self.exchange.begin(self.step_open, -1)
        return self.exchange

    def drop(self) -> None:
        """End the engine that is here; its requests must go elsewhere."""
        engine, self.engine = self.engine, None
        if engine is not None and engine.request_ids:
            self.mailbox.post(INGRESS, Moved(request_ids=engine.request_ids))
        if engine is not None and self.job is not None:
            observe_no_engine(self.job.observe)

    def step(self) -> None:
        """Run one step of the batch and send its tokens on.

        Raises:
            SupersededError: a plan came that leaves no engine here; it has been entered.
        """
        engine, job = self.engine, self.job
        assert engine is not None and job is not None
        started = time.perf_counter()
        try:
            events = engine.step()
        except SupersededError:
            raise
        except Exception as error:
            # The engine has put the batch back; it gives up on a request after some failures.
            log.warning("slot %d: a serving step failed, trying again: %s", self.mailbox.slot, error)
            return
        finally:
            observe_engine(job.observe, engine, time.perf_counter() - started)
            if self.exchange is not None:
                observe_memory(job.observe, self.exchange)
        if events or time.perf_counter() - self.spoke_s > SPEAK_S:
            self.spoke_s = time.perf_counter()
            self.mailbox.post(INGRESS, Tokens(events=tuple(events)))

    def _go_on(self) -> bool:
        """Enter the plan that came within a step of the engine; False if it leaves no engine here."""
        engine = self.engine
        while self.mailbox.is_superseded:
            message = self.mailbox.next(0.0)
            if message is None:
                break
            try:
                self.enter(message)
            except SupersededError:
                continue
        return self.engine is engine

    def _generate(self, message: Message[Generate]) -> None:
        request = message.body.request
        if self.engine is None:
            self.mailbox.post(INGRESS, Moved(request_ids=(request.request_id,)))
            return
        try:
            self.engine.add(request)
        except UserError as error:
            event = TokenEvent(
                request_id=request.request_id,
                index=len(request.resume_tokens),
                finish_reason="error",
                error=str(error),
            )
            self.mailbox.post(INGRESS, Tokens(events=(event,)))

    def _drain(self, _: Message[Drain]) -> None:
        left = 0 if self.engine is None else len(self.engine.request_ids)
        self.mailbox.post(SCHEDULER, Draining(num_requests=left))

    def _cancel(self, message: Message[Cancel]) -> None:
        if self.engine is not None and self.job is not None:
            self.engine.cancel(message.body.request_id)
            observe_queues(self.job.observe, self.engine)
