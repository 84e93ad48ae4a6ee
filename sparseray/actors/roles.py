"""The roles that a slot plays in one generation, and what each message of a step or a request makes it do.

Called by slot.py, in the work thread alone.
One step: RunStep -> (FetchRows, Expert*)* -> FinishPart, DenseNodes -> *Reduced -> Prepared -> Commit.
A change of plan: InstallPlan -> Pull* -> Installed; it may come at any moment and ends a step half way.
One request: Generate -> (FetchRows, ExpertForward)* -> Tokens, once for every engine step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from sparseray.actors.engine_role import EngineRole
from sparseray.actors.exchange.answers import Answers
from sparseray.actors.exchange.by_message import Caller, MessageExchange
from sparseray.actors.exchange.local import LocalExchange
from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.exchange.patience import Patience
from sparseray.actors.exchange.protocol import Exchange
from sparseray.actors.exchange.reduction import Reduction
from sparseray.actors.installation import InstallPlan, JobSpec, pull_missing, restore
from sparseray.actors.observation import observe_worker
from sparseray.actors.serving.enduring import EnduringExchange
from sparseray.actors.serving.engine import Engine
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.actors.state.whole_experts import WholeExperts
from sparseray.actors.training.background_save import BackgroundSave
from sparseray.actors.training.objective import BatchSource
from sparseray.actors.training.worker import AttentionWorker
from sparseray.actors.wire.envelope import INGRESS, SCHEDULER, Body, Message
from sparseray.actors.wire.messages import (
    Commit,
    Evaluate,
    Evaluated,
    Installed,
    PartDone,
    RunStep,
    SaveCheckpoint,
    Saved,
    SavedTensor,
    Settled,
    Stale,
)
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.log import get_logger
from sparseray.model.transformer import Transformer

log = get_logger(__name__)


class Job(Protocol):
    """What a slot needs to know of its job; platform/fleet/job.py builds it from the run's configuration."""

    deadline_s: float
    is_serving: bool

    def holdings(self) -> Holdings: ...
    def engine(self, model: Transformer, exchange: Exchange | EnduringExchange) -> Engine | None:
        """Make the engine; None for a job that does not serve.

        Args:
            model: dense weights.
            exchange: of the plan in force, or one that outlives plans.
        """
        ...

    def train_batches(self) -> BatchSource: ...
    def validation_batches(self) -> BatchSource: ...
    def read(self, directory: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors of a checkpoint.

        Args:
            directory: its folder.
            names: logical names.
        """
        ...

    def write(self, directory: str, name: str, tensors: dict[str, Tensor]) -> dict[str, SavedTensor]:
        """Write one file of a checkpoint and say where each tensor is.

        Args:
            directory: its folder.
            name: of the file, without its suffix.
            tensors: by logical name.
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


class Roles:
    """Everything that one slot holds and does.

    Args:
        mailbox: of the slot.
        job_from: returns the job that a plan message describes.
        serve: handles messages that come while a request of our own waits for its replies.
        enter: enters a plan that comes within a step of the engine.
    """

    def __init__(
        self,
        mailbox: SlotMailbox,
        job_from: Callable[[JobSpec], Job],
        serve: Callable[[Message[Body]], None],
        enter: Callable[[Message[Body]], None],
    ) -> None:
        self.mailbox, self.job_from, self.serve = mailbox, job_from, serve
        self.committed = 0
        self.plan: Plan | None = None
        self.holdings: Holdings | None = None
        self.answers: Answers | None = None
        self.reduction: Reduction | None = None
        self.exchange: Exchange | None = None
        self.worker: AttentionWorker | None = None
        self.saving = BackgroundSave()
        self.patience = Patience()
        self.engine_role = EngineRole(mailbox, enter, self.patience)
        self.control: dict[type[Body], Callable[[Message[Any]], None]] = {
            InstallPlan: self._install,
            RunStep: self._run_step,
            Commit: self._commit,
            Evaluate: self._evaluate,
            SaveCheckpoint: self._checkpoint,
            Settled: self._settled,
            **self.engine_role.handlers,
        }

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
        ingress = {INGRESS: body.ingress} if body.ingress else {}
        self.mailbox.adopt(plan.generation)
        self.mailbox.transport.connect({**plan.addresses, SCHEDULER: body.scheduler, **ingress})
        self.worker, self.exchange, self.reduction, self.plan = None, None, None, None
        self.saving.forget()
        self.job = self.job_from(body.job)
        if self.holdings is None:
            self.holdings = self.job.holdings()
        trains, self.patience.deadline_s = not self.job.is_serving, self.job.deadline_s
        self.answers = Answers(self.holdings, self.job.observe, with_optimizer=trains)
        call = Caller(self.mailbox, self.answers, self.serve, self.job.deadline_s)
        mine = plan.pieces_of(me)
        if body.restore is not None and body.restore.everything:
            self.holdings.clear()
            self.committed = body.step
        elif not self._catch_up(body):
            self.engine_role.drop()
            self.mailbox.post(SCHEDULER, Stale(), step=self.committed)
            return
        pull_missing(self.holdings, mine, body, call, with_optimizer=trains)
        if body.restore is not None:
            restore(self.holdings, mine, body, self.job.read, with_optimizer=trains)
        self.holdings.assign(plan, me)
        self._take_roles(plan, call)
        model = None if self.worker is None else self.worker.state.model
        self.engine_role.take(self.job, model, self.exchange, self.committed)
        self.plan = plan
        self.mailbox.post(SCHEDULER, Installed(), step=self.committed)

    def _settled(self, message: Message[Settled]) -> None:
        assert self.holdings is not None
        self.holdings.trim()

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
                patience=self.patience if self.job.is_serving else None,
            )
        self.worker = AttentionWorker(dense, self.exchange)

    # -- training ------------------------------------------------------------------------------

    def _run_step(self, message: Message[RunStep]) -> None:
        assert self.worker is not None and self.plan is not None
        me, step = self.mailbox.slot, message.step
        if (saved := self.saving.take()) is not None:
            self.mailbox.post(SCHEDULER, saved[1], step=saved[0])

        def report(part: int, done: PartDone) -> None:
            self.mailbox.post(SCHEDULER, done, step=step, part=part)

        self.worker.run_step(step, self.plan.parts_of(me), self.job.train_batches(), report)
        observe_worker(self.job.observe, self.worker)

    def _commit(self, message: Message[Commit]) -> None:
        self._apply(message.body)

    def _apply(self, commit: Commit) -> None:
        """Apply a step's update to every replica held here."""
        assert self.holdings is not None and commit.step == self.committed + 1
        self.saving.wait_until_copied()
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
        """Write what is primary here into the checkpoint's folder and report the hashes, now or when that is done."""
        assert self.plan is not None and self.holdings is not None
        me, directory, plan = self.mailbox.slot, message.body.directory, self.plan
        pieces: dict[str, list[Piece]] = {
            "dense": [DENSE] if plan.dense[0] == me else [],
            "experts": [("expert", *k) for k in plan.experts_of(me) if plan.experts[k[0]][k[1]][0] == me],
            "memory": [("bucket", *k) for k in plan.buckets_of(me) if plan.buckets[k[0]][k[1]][0] == me],
        }
        # The generation keeps a slot that was given up and comes back from writing over another's file.
        files = {
            f"{file}_{me}_{plan.generation}": self.holdings.tensors(of) for file, of in pieces.items() if of
        }
        write = partial(self.job.write, directory)
        if message.body.in_background:
            self.saving.start(message.step, files, write)
            return
        self.saving.forget()
        entries = {name: entry for file, found in files.items() for name, entry in write(file, found).items()}
        self.mailbox.post(SCHEDULER, Saved(tensors=entries), step=message.step)
