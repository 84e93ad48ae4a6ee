"""The engine that a slot plays in serving: it outlives plans that leave it where it is, with its caches.

Between the slot (slot.py), which enters generations, and the engine (serving/engine.py), which knows none. A plan
that comes while a layer waits is entered there and then, and the layer goes on with those who answer now.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol, cast

from sparseray.actors.installation import InstallPlan
from sparseray.actors.observation import observe_engine, observe_memory, observe_queues
from sparseray.actors.serving.enduring import EnduringSeam
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.messages import Cancel, Generate, Moved, Tokens
from sparseray.actors.serving.text_request import TokenEvent
from sparseray.actors.training.worker import AttentionWorker
from sparseray.actors.wire.envelope import INGRESS, Body, Message
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.errors import SupersededError, UserError
from sparseray.log import get_logger
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts

log = get_logger(__name__)


class Job(Protocol):
    """What it takes to make an engine."""

    def engine(self, worker: AttentionWorker) -> Engine | None: ...
    def observe(self, name: str, value: float, **labels: str) -> None: ...


class EngineRole:
    """Plays an engine, or none, as the plan has it.

    Args:
        mailbox: of the slot.
        enter: enters the plan of a message.
    """

    def __init__(self, mailbox: Mailbox, enter: Callable[[Message[InstallPlan]], None]) -> None:
        self.mailbox, self.enter = mailbox, enter
        self.engine: Engine | None = None
        self.worker: AttentionWorker | None = None
        self.job: Job | None = None
        self.handlers: dict[type[Body], Callable[[Message[Any]], None]] = {
            Generate: self._generate,
            Cancel: self._cancel,
        }

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self.engine is not None and self.engine.has_work

    def take(self, job: Job, worker: AttentionWorker | None) -> None:
        """Go on at a new plan: with the engine that is here if its weights stayed.

        Args:
            job: that the slot has.
            worker: with the seams of the new plan; None where the slot runs no model.
        """
        if self.engine is not None and (
            worker is None or job is not self.job or self.engine.model is not worker.state.model
        ):
            self.drop()
        self.job, self.worker = job, worker
        if self.engine is None and worker is not None:
            self.engine = job.engine(worker)
            if self.engine is not None:
                self.engine.experts = cast(Experts, EnduringSeam(lambda: self._seams().experts, self._go_on))
                if self.engine.memory is not None:
                    self.engine.memory = cast(Memory, EnduringSeam(lambda: self._seams().memory, self._go_on))

    def drop(self) -> None:
        """End the engine that is here; its requests must go elsewhere."""
        engine, self.engine = self.engine, None
        if engine is not None and engine.request_ids:
            self.mailbox.post(INGRESS, Moved(request_ids=engine.request_ids))

    def step(self) -> None:
        """Run one step of the batch and send its tokens on.

        Raises:
            SupersededError: a plan came that leaves no engine here; it has been entered.
        """
        engine, worker, job = self.engine, self.worker, self.job
        assert engine is not None and worker is not None and job is not None
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
            observe_memory(job.observe, (self.worker or worker).memory, self.mailbox.slot)
        if events:
            self.mailbox.post(INGRESS, Tokens(events=tuple(events)))

    def _seams(self) -> AttentionWorker:
        assert self.worker is not None
        return self.worker

    def _go_on(self, newer: SupersededError) -> None:
        """Enter a newer plan within a step of the engine."""
        engine = self.engine
        while True:
            try:
                self.enter(newer.args[0])
                break
            except SupersededError as again:
                newer = again
        if self.engine is not engine:
            raise newer

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

    def _cancel(self, message: Message[Cancel]) -> None:
        if self.engine is not None and self.job is not None:
            self.engine.cancel(message.body.request_id)
            observe_queues(self.job.observe, self.engine)
