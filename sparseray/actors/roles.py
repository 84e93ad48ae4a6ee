"""The roles that a slot plays in one generation, and what each message of a step or a request makes it do.

Called by slot.py, in the work thread alone.
One step: RunStep -> (FetchRows, Expert*)* -> FinishPart, DenseNodes -> *Reduced -> Prepared -> Commit.
A change of plan: InstallPlan -> Pull* -> Installed; it may come at any moment and ends a step half way.
One request: Generate -> (FetchRows, ExpertForward)* -> Tokens, once for every engine step.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from sparseray.actors.exchange.answers import Answers
from sparseray.actors.exchange.by_message import Caller, MessageExchange
from sparseray.actors.exchange.local import LocalExchange
from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.exchange.protocol import Exchange
from sparseray.actors.exchange.reduction import Reduction
from sparseray.actors.installation import InstallPlan, JobSpec, pull_missing, restore
from sparseray.actors.observation import observe_engine, observe_memory, observe_queues, observe_worker
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.messages import Generate, Tokens
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.actors.state.whole_experts import WholeExperts
from sparseray.actors.training.worker import AttentionWorker, Batches
from sparseray.actors.wire.envelope import SCHEDULER, Body, Message
from sparseray.actors.wire.messages import (
    Cancel,
    Commit,
    Evaluate,
    Evaluated,
    Installed,
    PartDone,
    RunStep,
    SaveCheckpoint,
    Saved,
    SavedTensor,
    Stale,
)
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SlotLostError
from sparseray.log import get_logger
from sparseray.model.transformer import Transformer

log = get_logger(__name__)


class Job(Protocol):
    """What a slot needs to know of its job; platform/fleet/host.py builds it from the run's configuration."""

    deadline_s: float
    is_serving: bool

    def holdings(self) -> Holdings: ...
    def engine(self, model: Transformer, exchange: Exchange) -> Engine | None: ...
    def train_batches(self) -> Batches: ...
    def validation_batches(self) -> Batches: ...
    def read(self, directory: str, names: Sequence[str]) -> dict[str, Tensor]: ...
    def write(self, directory: str, name: str, tensors: dict[str, Tensor]) -> dict[str, SavedTensor]: ...
    def observe(self, name: str, value: float, **labels: str) -> None: ...


class Roles:
    """Everything that one slot holds and does.

    Args:
        mailbox: of the slot.
        job_from: returns the job that a plan message describes.
        serve: handles messages that come while a request of our own waits for its replies.
    """

    def __init__(
        self,
        mailbox: SlotMailbox,
        job_from: Callable[[JobSpec], Job],
        serve: Callable[[Message[Body]], None],
    ) -> None:
        self.mailbox, self.job_from, self.serve = mailbox, job_from, serve
        self.committed = 0
        self.plan: Plan | None = None
        self.holdings: Holdings | None = None
        self.answers: Answers | None = None
        self.reduction: Reduction | None = None
        self.exchange: Exchange | None = None
        self.worker: AttentionWorker | None = None
        self.engine: Engine | None = None
        self.control: dict[type[Body], Callable[[Message[Any]], None]] = {
            InstallPlan: self._install,
            RunStep: self._run_step,
            Commit: self._commit,
            Evaluate: self._evaluate,
            SaveCheckpoint: self._checkpoint,
            Generate: self._generate,
            Cancel: self._cancel,
        }

    @property
    def is_generating(self) -> bool:
        """Whether the engine has something to compute."""
        return self.engine is not None and self.engine.has_work

    def abort(self) -> None:
        """End what is computed at its next operation; called by the control thread."""
        exchange = self.exchange
        if exchange is not None:
            exchange.abort()

    # -- a change of plan ----------------------------------------------------------------------

    def _install(self, message: Message[InstallPlan]) -> None:
        """Enter a generation: finish or drop the open step, get what is lacking, take the roles."""
        body, plan, me = message.body, message.body.plan, self.mailbox.slot
        if plan.generation == self.mailbox.generation and self.plan == plan:
            self.mailbox.post(SCHEDULER, Installed(), step=self.committed)
            return
        self.mailbox.adopt(plan.generation)
        self.mailbox.transport.connect({**plan.addresses, SCHEDULER: body.scheduler})
        self.worker, self.exchange, self.reduction, self.plan = None, None, None, None
        self.job = self.job_from(body.job)
        if self.holdings is None:
            self.holdings = self.job.holdings()
        trains = not self.job.is_serving
        self.answers = Answers(self.holdings, self.job.observe, with_optimizer=trains)
        call = Caller(self.mailbox, self.answers, self.serve, self.job.deadline_s)
        mine = plan.pieces_of(me)
        if body.restore is not None:
            restore(self.holdings, mine, body, self.job.read, with_optimizer=trains)
            self.committed = body.step
        elif not self._catch_up(body):
            self.mailbox.post(SCHEDULER, Stale(), step=self.committed)
            return
        else:
            pull_missing(self.holdings, mine, body, call, with_optimizer=trains)
        self.holdings.assign(plan, me)
        self._take_roles(plan, call)
        self.plan = plan
        self.mailbox.post(SCHEDULER, Installed(), step=self.committed)

    def _catch_up(self, body: InstallPlan) -> bool:
        """Reach the plan's step: apply a commit that did not arrive. False when that cannot be done."""
        assert self.holdings is not None
        commit = body.commit
        if not self.holdings.held:
            self.committed = body.step
        elif (
            commit is not None and commit.step == body.step == self.committed + 1 and self.holdings.is_reduced
        ):
            self._apply(commit)
        if self.committed != body.step:
            log.warning("slot %d is at step %d, not %d", self.mailbox.slot, self.committed, body.step)
            self.holdings.clear()
            return False
        return True

    def _take_roles(self, plan: Plan, call: Caller) -> None:
        """Build what the plan has this slot do."""
        assert self.holdings is not None
        me, experts, memory = self.mailbox.slot, self.holdings.experts, self.holdings.memory
        dense = self.holdings.dense if me in plan.dense else None
        self.reduction = Reduction(self.mailbox, plan, dense, experts, memory)
        self.engine = None
        if not plan.parts_of(me):
            return
        assert dense is not None
        if isinstance(dense, DenseSlabs) and isinstance(experts, WholeExperts):
            self.exchange = OnDeviceExchange(dense, experts, self.holdings, self.mailbox)
        elif plan.holders == {me}:
            self.exchange = LocalExchange(self.holdings, self.reduction, me, self.job.observe)
        else:
            self.exchange = MessageExchange(
                plan,
                call,
                self.reduction,
                moe_layers=experts.config.moe_layers,
                memory_layers=() if memory is None else memory.layers,
                bounds=() if memory is None else memory.bounds,
            )
        self.worker = AttentionWorker(dense, self.exchange)
        self.engine = self.job.engine(dense.model, self.exchange)

    # -- training ------------------------------------------------------------------------------

    def _run_step(self, message: Message[RunStep]) -> None:
        assert self.worker is not None and self.plan is not None
        me, step = self.mailbox.slot, message.step

        def report(part: int, done: PartDone) -> None:
            self.mailbox.post(SCHEDULER, done, step=step, part=part)

        self.worker.run_step(step, self.plan.parts_of(me), self.job.train_batches(), report)
        observe_worker(self.job.observe, self.worker, me)

    def _commit(self, message: Message[Commit]) -> None:
        self._apply(message.body)

    def _apply(self, commit: Commit) -> None:
        """Apply a step's update to every replica held here."""
        assert self.holdings is not None and commit.step == self.committed + 1
        rows = self.holdings.apply(
            lr=commit.lr, memory_lr=commit.memory_lr, scale=commit.scale, counts_LE=commit.counts_LE
        )
        self.committed = commit.step
        if rows:
            assert self.holdings.memory is not None
            self.job.observe("dse_update_rows_total", rows)
            self.job.observe("dse_table_bytes", self.holdings.memory.num_bytes)

    def _evaluate(self, message: Message[Evaluate]) -> None:
        assert self.worker is not None
        mine = [index for index, owner in message.body.batches if owner == self.mailbox.slot]
        found = self.worker.evaluate(message.step, mine, self.job.validation_batches())
        self.mailbox.post(SCHEDULER, Evaluated(losses=found), step=message.step)

    def _checkpoint(self, message: Message[SaveCheckpoint]) -> None:
        """Write what is primary here into the checkpoint's folder and report the hashes."""
        assert self.plan is not None and self.holdings is not None
        me, directory, plan = self.mailbox.slot, message.body.directory, self.plan
        files: dict[str, list[Piece]] = {
            "dense": [DENSE] if plan.dense[0] == me else [],
            "experts": [("expert", *k) for k in plan.experts_of(me) if plan.experts[k[0]][k[1]][0] == me],
            "memory": [("bucket", *k) for k in plan.buckets_of(me) if plan.buckets[k[0]][k[1]][0] == me],
        }
        entries: dict[str, SavedTensor] = {}
        for file, pieces in files.items():
            if pieces:
                # The generation keeps a slot that was given up and comes back from writing over another's file.
                name = f"{file}_{me}_{plan.generation}"
                entries |= self.job.write(directory, name, self.holdings.tensors(pieces))
        self.mailbox.post(SCHEDULER, Saved(tensors=entries), step=message.step)

    # -- serving -------------------------------------------------------------------------------

    def _generate(self, message: Message[Generate]) -> None:
        assert self.engine is not None, "this slot was not installed for serving"
        self.engine.add(message.body.request)

    def _cancel(self, message: Message[Cancel]) -> None:
        assert self.engine is not None, "this slot was not installed for serving"
        self.engine.cancel(message.body.request_id)
        observe_queues(self.job.observe, self.engine)

    def generate_tokens(self) -> None:
        """Run one step of the serving batch and send its tokens on."""
        assert self.engine is not None and self.exchange is not None
        started = time.perf_counter()
        # Experts and rows answer for the step after the last committed one, as in training.
        self.exchange.begin(self.committed + 1, -1)
        try:
            events = self.engine.step()
        except SlotLostError as error:
            # The engine has put the batch back; it gives up on a request after some failures.
            log.warning("slot %d: a serving step failed, trying again: %s", self.mailbox.slot, error)
            return
        finally:
            observe_engine(self.job.observe, self.engine, time.perf_counter() - started)
            observe_memory(self.job.observe, self.exchange, self.mailbox.slot)
        if events:
            self.mailbox.post(SCHEDULER, Tokens(events=tuple(events)))
