"""A slot: one process with a device share that plays whatever roles the plan gives it.

It owns a mailbox and serves it from one thread; wire/messages.py has the table of who says what to whom.
One step: RunStep -> (FetchRows, Expert*)* -> FinishPart, DenseNodes -> *Reduced -> Prepared -> Commit.
What belongs to a step that is not open yet waits until the commit before it has been applied.
A change of plan: InstallPlan -> Pull* -> Installed; it may come at any moment and ends a step half way.
One request: Generate -> (FetchRows, ExpertForward)* -> Tokens, once for every engine step.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch

from sparseray.actors.engine_role import EngineRole
from sparseray.actors.exchange.by_message import Call, Caller
from sparseray.actors.exchange.reduction import PartResult, Reduction
from sparseray.actors.installation import InstallPlan, JobSpec, PullFrom
from sparseray.actors.observation import (
    observe_rows,
    observe_worker,
)
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.messages import Cancel, Generate
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.actors.training.worker import AttentionWorker, Batches
from sparseray.actors.wire.envelope import INGRESS, SCHEDULER, Body, Message
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import (
    Commit,
    Evaluate,
    Evaluated,
    ExpertBackward,
    ExpertForward,
    ExpertRows,
    Failed,
    FetchRows,
    Installed,
    MemoryRows,
    PartDone,
    Pieces,
    Ping,
    Pong,
    Pull,
    RunStep,
    SaveCheckpoint,
    Saved,
    SavedTensor,
    Settled,
    Silent,
    Stale,
    Stop,
)
from sparseray.errors import SlotLostError, SupersededError, UserError
from sparseray.log import get_logger

log = get_logger(__name__)

R = TypeVar("R", bound=Body)
_UNORDERED = (InstallPlan, Generate, Cancel, Stop)


class Job(Protocol):
    """What a slot needs to know of its job; platform/fleet/host.py builds it from the run's configuration."""

    deadline_s: float
    is_serving: bool

    def holdings(self) -> Holdings: ...
    def worker(
        self,
        plan: Plan,
        state: DenseState,
        call: Caller,
        begin: Callable[[int, int], None],
    ) -> AttentionWorker: ...
    def engine(self, worker: AttentionWorker) -> Engine | None: ...
    def train_batches(self) -> Batches: ...
    def validation_batches(self) -> Batches: ...
    def read(self, directory: str, names: Sequence[str]) -> dict[str, torch.Tensor]: ...
    def write(
        self, directory: str, name: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, SavedTensor]: ...
    def observe(self, name: str, value: float, **labels: str) -> None: ...


class Slot:
    """Serves one mailbox until told to stop.

    Args:
        mailbox: own mailbox.
        job_from: returns the job that a plan message describes.
    """

    def __init__(self, mailbox: Mailbox, job_from: Callable[[JobSpec], Job]) -> None:
        self.mailbox = mailbox
        self.job_from = job_from
        self.committed = 0
        self.running = True
        self.plan: Plan | None = None
        self.later: deque[Message[Body]] = deque()
        self.deferred: list[Message[Body]] = []
        self.holdings: Holdings | None = None
        self.reduction: Reduction | None = None
        self.worker: AttentionWorker | None = None
        self.role = EngineRole(mailbox, self._install)
        self._current = (0, -1)
        self._control: dict[type[Body], Callable[[Message[Any]], None]] = {
            InstallPlan: self._install,
            Settled: self._settled,
            RunStep: self._run_step,
            Commit: self._commit,
            Evaluate: self._evaluate,
            SaveCheckpoint: self._checkpoint,
            Stop: self._stop,
            **self.role.handlers,
        }
        self._requests: dict[type[Body], Callable[[Message[Any]], Body]] = {
            ExpertForward: self._expert_forward,
            ExpertBackward: self._expert_backward,
            FetchRows: self._rows,
            Pull: self._pull,
        }

    def serve_forever(self) -> None:
        """Handle messages until `stop`; a failure is told to the scheduler, and the slot goes on."""
        while self.running:
            is_busy = self.role.has_work
            message = self.later.popleft() if self.later else self.mailbox.next(0.0 if is_busy else 0.5)
            while message is not None or is_busy:
                try:
                    if message is not None:
                        self._handle(message, waiting=False)
                    else:
                        # Experts and rows answer for the step after the last committed one, as in training.
                        self._begin(self.committed + 1, -1)
                        self.role.step()
                    break
                except SupersededError as newer:
                    message = newer.args[0]
                except SlotLostError as error:
                    log.warning("%s", error)
                    self.mailbox.post(SCHEDULER, Silent(error=str(error)), step=self.committed)
                    break
                except Exception as error:
                    body = Failed(error=f"{type(error).__name__}: {error}", user=isinstance(error, UserError))
                    what = "generating" if message is None else message.body.kind
                    log.error("slot %d failed on %s:\n%s", self.mailbox.slot, what, traceback.format_exc())
                    self.mailbox.post(SCHEDULER, body, step=self.committed)
                    break

    def _handle(self, message: Message[Body], *, waiting: bool) -> None:
        """Handle one message; while a step of our own waits for replies, control messages keep."""
        kind = type(message.body)
        if kind is Ping:
            self.mailbox.post(SCHEDULER, Pong(), reply_to=message.sequence)
        elif kind not in _UNORDERED and message.step > self.committed + 1:
            self.deferred.append(message)
        elif kind not in _UNORDERED and message.step < self.committed + 1:
            log.debug("slot %d: %s of step %d comes again", self.mailbox.slot, kind.kind, message.step)
        elif kind in self._control:
            if waiting:
                self.later.append(message)
            else:
                self._control[kind](message)
        elif kind in self._requests:
            reply = self._requests[kind](message)
            self.mailbox.post(message.source, reply, step=message.step, reply_to=message.sequence)
        elif self.reduction is not None and kind in self.reduction.handlers:
            self.reduction.handlers[kind](message)
        else:
            log.warning(
                "slot %d: unexpected message %r from slot %d", self.mailbox.slot, kind.kind, message.source
            )

    # -- control -------------------------------------------------------------------------------

    def _install(self, message: Message[InstallPlan]) -> None:
        """Enter a generation: finish or drop the open step, get what is lacking, take the roles."""
        body, plan, me = message.body, message.body.plan, self.mailbox.slot
        if plan.generation == self.mailbox.generation and self.plan == plan:
            self.mailbox.post(SCHEDULER, Installed(), step=self.committed)
            return
        self.mailbox.adopt(plan.generation)
        ingress = {INGRESS: body.ingress} if body.ingress else {}
        self.mailbox.transport.connect({**plan.addresses, SCHEDULER: body.scheduler, **ingress})
        # Requests are of no generation; whatever else waited was.
        self.later = deque(message for message in self.later if not message.body.is_fenced)
        self.deferred.clear()
        self.worker, self.reduction, self.plan = None, None, None
        job = self.job = self.job_from(body.job)
        if self.holdings is None:
            self.holdings = job.holdings()
        if not self._take_state(body, plan.pieces_of(me)):
            self.role.drop()
            self.mailbox.post(SCHEDULER, Stale(), step=self.committed)
            return
        self.holdings.assign(plan, me)
        dense = self.holdings.dense if me in plan.dense else None
        self.reduction = Reduction(self.mailbox, plan, dense, self.holdings.experts, self.holdings.memory)
        if plan.parts_of(me):
            assert dense is not None
            self.worker = job.worker(plan, dense, self._call, self._begin)
        self.role.take(job, self.worker)
        self.plan = plan
        self.mailbox.post(SCHEDULER, Installed(), step=self.committed)

    def _take_state(self, body: InstallPlan, mine: list[Piece]) -> bool:
        """Hold the pieces that the plan gives; False when what is held is of another step."""
        assert self.holdings is not None
        if body.restore is not None and body.restore.everything:
            self.holdings.clear()
            self.committed = body.step
        elif not self._catch_up(body):
            return False
        self._pull_missing(mine, body.pulls)
        lacking = [piece for piece in mine if piece not in self.holdings.held]
        if lacking and body.restore is not None and body.restore.checkpoint:
            trains = not self.job.is_serving
            names = self.holdings.names(lacking, with_optimizer=trains)
            found = self.job.read(body.restore.checkpoint, names)
            self.holdings.load(lacking, found, self.committed, with_optimizer=trains)
        elif lacking and body.restore is not None:
            self.holdings.initialize(lacking)
        return True

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

    def _pull_missing(self, mine: list[Piece], sources: Sequence[PullFrom]) -> None:
        """Copy from peers the pieces that are not held here."""
        assert self.holdings is not None
        lacking = set(mine) - self.holdings.held
        calls, wanted = [], []
        for pull in sources:
            pieces = tuple(piece for piece in pull.pieces if piece in lacking)
            if pieces:
                wanted.append(pieces)
                calls.append(Call(to=pull.source, body=Pull(pieces=pieces)))
        self._begin(self.committed + 1, -1)
        for pieces, reply in zip(wanted, self._call(calls, Pieces)):
            trains = not self.job.is_serving
            self.holdings.load(pieces, reply.tensors, self.committed, with_optimizer=trains)

    def _run_step(self, message: Message[RunStep]) -> None:
        assert self.worker is not None and self.plan is not None and self.reduction is not None
        parts = self.plan.parts_of(self.mailbox.slot)
        self.worker.run_step(message.step, parts, self.job.train_batches(), self._part_done)
        self.reduction.send_dense(message.step)
        observe_worker(self.job.observe, self.worker, self.mailbox.slot)

    def _part_done(self, part: int, result: PartResult) -> None:
        """Send a part's gradients on their way and report its loss."""
        assert self.worker is not None and self.reduction is not None
        step = self._current[0]
        self.reduction.send_part(step, part, result, self.worker.memory.owner_of)
        body = PartDone(
            loss_sum=result.loss_sum,
            aux_loss=result.aux_loss,
            tokens=result.tokens,
            seconds=dict(self.worker.seconds),
            counts_LE=result.counts_LE,
        )
        self.mailbox.post(SCHEDULER, body, step=step, part=part)

    def _commit(self, message: Message[Commit]) -> None:
        """Apply a step's update to every replica held here, then serve what waited for it."""
        self._apply(message.body)
        waiting, self.deferred = self.deferred, []
        # What others wait for goes first: a step of our own would wait for them in turn.
        for deferred in sorted(waiting, key=lambda m: type(m.body) in self._control):
            if type(deferred.body) in self._control:
                self.later.append(deferred)
            else:
                self._handle(deferred, waiting=False)

    def _apply(self, commit: Commit) -> None:
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
        assert self.worker is not None and self.plan is not None
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

    def _stop(self, message: Message[Stop]) -> None:
        self.running = False

    # -- requests between slots ----------------------------------------------------------------

    def _begin(self, step: int, part: int) -> None:
        self._current = (step, part)

    def _call(self, calls: Sequence[Call], reply: type[R]) -> list[R]:
        """Send requests of the current part, answer our own ones directly, wait for the others."""
        (step, part), me = self._current, self.mailbox.slot
        sequences = [
            0
            if call.to == me
            else self.mailbox.post(call.to, call.body, step=step, part=part, layer=call.layer)
            for call in calls
        ]
        asked = {sequence: call.to for sequence, call in zip(sequences, calls) if sequence}
        own: dict[int, Body] = {}
        for index, call in enumerate(calls):
            if call.to == me:
                message = Message(
                    body=call.body,
                    source=me,
                    generation=self.mailbox.generation,
                    sequence=0,
                    step=step,
                    part=part,
                    layer=call.layer,
                )
                own[index] = self._requests[type(call.body)](message)
        replies = self.mailbox.wait(asked, self.job.deadline_s, lambda m: self._handle(m, waiting=True))
        found = [
            replies[sequence].body if sequence else own[index] for index, sequence in enumerate(sequences)
        ]
        for body in found:
            if not isinstance(body, reply):
                raise RuntimeError(f"slot {me} was answered by {type(body).__name__}, not {reply.__name__}")
        return cast(list[R], found)

    def _expert_forward(self, message: Message[ExpertForward]) -> ExpertRows:
        assert self.holdings is not None
        body, started = message.body, time.perf_counter()
        y_RH = self.holdings.experts.forward(
            message.layer, message.part, body.x_UH, body.rows_R, body.experts, body.counts, body.keep
        )
        observe_rows(self.job.observe, "forward", len(y_RH), time.perf_counter() - started)
        return ExpertRows(rows_RH=y_RH)

    def _expert_backward(self, message: Message[ExpertBackward]) -> ExpertRows:
        assert self.holdings is not None
        body, started = message.body, time.perf_counter()
        dx_RH = self.holdings.experts.backward(message.layer, message.part, body.dout_UH, body.weights_R)
        observe_rows(self.job.observe, "backward", len(dx_RH), time.perf_counter() - started)
        return ExpertRows(rows_RH=dx_RH)

    def _rows(self, message: Message[FetchRows]) -> MemoryRows:
        assert self.holdings is not None and self.holdings.memory is not None
        memory = self.holdings.memory
        found = [memory.gather(layer, rows.numpy()) for layer, rows in enumerate(message.body.rows_LN)]
        return MemoryRows(values_LND=tuple(found))

    def _pull(self, message: Message[Pull]) -> Pieces:
        """Give a peer copies of pieces as they are at the plan's step."""
        assert self.holdings is not None
        trains = not self.job.is_serving
        tensors = self.holdings.tensors(message.body.pieces, with_optimizer=trains)
        # Copies, because frames leave later than the next update may come.
        return Pieces(tensors={name: tensor.clone() for name, tensor in tensors.items()})
