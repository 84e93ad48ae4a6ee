"""A slot: one process with a device share that plays whatever roles the plan gives it.

It owns a mailbox and serves it from one thread. Messages and who sends them:
  scheduler -> slot: plan, step, commit, evaluate, checkpoint, ping, stop
  slot -> scheduler: installed, stale, shard, prepared, evaluated, saved, pong, silent, failed
  ingress -> slot:   generate, cancel (answered to the scheduler's mailbox by `tokens`)
  slot -> slot:      expert_forward, expert_backward, rows, pull (answered by `reply`);
                     finish_shard, expert_part, dense_nodes, dense_reduced, expert_reduced,
                     rows_reduced
One step: step -> (rows, expert_*)* -> finish_shard, dense_nodes -> *_reduced -> prepared -> commit.
What belongs to a step that is not open yet waits until the commit before it has been applied.
A change of plan: plan -> pull* -> installed; it may come at any moment and ends a step half way.
One request: generate -> (rows, expert_forward)* -> tokens, once for every engine step.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sparseray.actors.exchange.by_message import Call
from sparseray.actors.exchange.reduction import Reduction, ShardResult
from sparseray.actors.observation import (
    observe_engine,
    observe_memory,
    observe_queues,
    observe_rows,
    observe_worker,
)
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.actors.training.worker import AttentionWorker, Batches
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import SCHEDULER, Message
from sparseray.errors import SlotLostError, SupersededError, UserError
from sparseray.log import get_logger

log = get_logger(__name__)

Arrays = tuple[np.ndarray, ...]
_UNORDERED = ("plan", "generate", "cancel", "stop")


class Job(Protocol):
    """What a slot needs to know of its job; platform/fleet/host.py builds it from the run's configuration."""

    deadline_s: float
    num_shards: int

    def holdings(self) -> Holdings: ...
    def worker(
        self,
        plan: Plan,
        state: DenseState,
        call: Callable[[Sequence[Call]], list[Arrays]],
        begin: Callable[[int, int], None],
    ) -> AttentionWorker: ...
    def engine(self, worker: AttentionWorker) -> Engine | None: ...
    def train_batches(self) -> Batches: ...
    def validation_batches(self) -> Batches: ...
    def read(self, directory: str, names: Sequence[str]) -> dict[str, torch.Tensor]: ...
    def write(self, directory: str, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]: ...
    def observe(self, name: str, value: float, **labels: str) -> None: ...


class Slot:
    """Serves one mailbox until told to stop.

    Args:
        mailbox: own mailbox.
        job_from: returns the job for the body of a plan message.
    """

    def __init__(self, mailbox: Mailbox, job_from: Callable[[dict[str, Any]], Job]) -> None:
        self.mailbox = mailbox
        self.job_from = job_from
        self.committed = 0
        self.running = True
        self.plan: Plan | None = None
        self.later: deque[Message] = deque()
        self.deferred: list[Message] = []
        self.holdings: Holdings | None = None
        self.reduction: Reduction | None = None
        self.worker: AttentionWorker | None = None
        self.engine: Engine | None = None
        self._current = (0, -1)
        self._control = {
            "plan": self._install,
            "step": self._run_step,
            "commit": self._commit,
            "evaluate": self._evaluate,
            "checkpoint": self._checkpoint,
            "generate": self._generate,
            "cancel": self._cancel,
            "stop": self._stop,
        }
        self._requests = {
            "expert_forward": self._expert_forward,
            "expert_backward": self._expert_backward,
            "rows": self._rows,
            "pull": self._pull,
        }

    def serve_forever(self) -> None:
        """Handle messages until `stop`; a failure is told to the scheduler, and the slot goes on."""
        while self.running:
            is_busy = self.engine is not None and self.engine.has_work
            message = self.later.popleft() if self.later else self.mailbox.next(0.0 if is_busy else 0.5)
            while message is not None or is_busy:
                try:
                    if message is not None:
                        self._handle(message, waiting=False)
                    else:
                        self._generate_tokens()
                    break
                except SupersededError as newer:
                    message = newer.args[0]
                except SlotLostError as error:
                    log.warning("%s", error)
                    self.mailbox.post(SCHEDULER, "silent", step=self.committed, body={"error": str(error)})
                    break
                except Exception as error:
                    body = {"error": f"{type(error).__name__}: {error}", "user": isinstance(error, UserError)}
                    what = "generating" if message is None else message.kind
                    log.error("slot %d failed on %s:\n%s", self.mailbox.slot, what, traceback.format_exc())
                    self.mailbox.post(SCHEDULER, "failed", step=self.committed, body=body)
                    break

    def _handle(self, message: Message, *, waiting: bool) -> None:
        """Handle one message; while a step of our own waits for replies, control messages keep."""
        kind = message.kind
        if kind == "ping":
            self.mailbox.post(SCHEDULER, "pong", reply_to=message.sequence)
        elif kind not in _UNORDERED and message.step > self.committed + 1:
            self.deferred.append(message)
        elif kind not in _UNORDERED and message.step < self.committed + 1:
            log.debug("slot %d: %s of step %d comes again", self.mailbox.slot, kind, message.step)
        elif kind in self._control:
            if waiting:
                self.later.append(message)
            else:
                self._control[kind](message)
        elif kind in self._requests:
            arrays = self._requests[kind](message)
            self.mailbox.post(
                message.source, "reply", step=message.step, reply_to=message.sequence, arrays=arrays
            )
        elif self.reduction is not None and kind in self.reduction.handlers:
            self.reduction.handlers[kind](message)
        else:
            log.warning(
                "slot %d: unexpected message %r from slot %d", self.mailbox.slot, kind, message.source
            )

    # -- control -------------------------------------------------------------------------------

    def _install(self, message: Message) -> None:
        """Enter a generation: finish or drop the open step, get what is lacking, take the roles."""
        body, plan, me = message.body, Plan.from_dict(message.body["plan"]), self.mailbox.slot
        if plan.generation == self.mailbox.generation and self.plan == plan:
            self.mailbox.post(SCHEDULER, "installed", step=self.committed)
            return
        self.mailbox.adopt(plan.generation)
        self.mailbox.transport.connect({**plan.addresses, SCHEDULER: body["scheduler"]})
        self.later.clear()
        self.deferred.clear()
        self.worker, self.reduction, self.plan = None, None, None
        self.job = self.job_from(body)
        if self.holdings is None:
            self.holdings = self.job.holdings()
        mine = plan.pieces_of(me)
        if body["restore"]:
            self._restore(mine, body)
        elif not self._catch_up(body, message):
            self.mailbox.post(SCHEDULER, "stale", step=self.committed)
            return
        else:
            self._pull_missing(mine, body["pulls"])
        self.holdings.assign(plan, me)
        dense = self.holdings.dense if me in plan.dense else None
        self.reduction = Reduction(self.mailbox, plan, dense, self.holdings.experts, self.holdings.memory)
        self.engine = None
        if plan.shards_of(me):
            assert dense is not None
            self.worker = self.job.worker(plan, dense, self._call, self._begin)
            self.engine = self.job.engine(self.worker)
        self.plan = plan
        self.mailbox.post(SCHEDULER, "installed", step=self.committed)

    def _restore(self, mine: list[Piece], body: dict[str, Any]) -> None:
        """Take the state of a checkpoint, or draw it from the seed where there is none."""
        assert self.holdings is not None
        self.holdings.clear()
        self.committed = body["step"]
        if body["restore"]["checkpoint"]:
            names = self.holdings.names(mine)
            self.holdings.load(mine, self.job.read(body["restore"]["checkpoint"], names), self.committed)
        else:
            self.holdings.initialize(mine)

    def _catch_up(self, body: dict[str, Any], message: Message) -> bool:
        """Reach the plan's step: apply a commit that did not arrive. False when that cannot be done."""
        assert self.holdings is not None
        commit = body["commit"]
        if not self.holdings.held:
            self.committed = body["step"]
        elif commit and commit["step"] == body["step"] == self.committed + 1 and self.holdings.is_reduced:
            self._apply(commit, message.arrays)
        if self.committed != body["step"]:
            log.warning("slot %d is at step %d, not %d", self.mailbox.slot, self.committed, body["step"])
            self.holdings.clear()
            return False
        return True

    def _pull_missing(self, mine: list[Piece], sources: list[Any]) -> None:
        """Copy from peers the pieces that are not held here."""
        assert self.holdings is not None
        lacking = set(mine) - self.holdings.held
        calls, wanted = [], []
        for source, listed in sources:
            pieces: list[Piece] = [(kind, layer, index) for kind, layer, index in listed]
            pieces = [piece for piece in pieces if piece in lacking]
            if pieces:
                wanted.append(pieces)
                calls.append(Call(to=source, kind="pull", body={"pieces": pieces}, arrays=()))
        self._begin(self.committed + 1, -1)
        for pieces, arrays in zip(wanted, self._call(calls)):
            names = self.holdings.names(pieces)
            tensors = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
            self.holdings.load(pieces, tensors, self.committed)

    def _run_step(self, message: Message) -> None:
        assert self.worker is not None and self.plan is not None and self.reduction is not None
        shards = self.plan.shards_of(self.mailbox.slot)
        self.worker.run_step(message.step, shards, self.job.train_batches(), self._shard_done)
        self.reduction.send_dense(message.step)
        observe_worker(self.job.observe, self.worker, self.mailbox.slot)

    def _shard_done(self, shard: int, result: ShardResult) -> None:
        """Send a shard's gradients on their way and report its loss."""
        assert self.worker is not None and self.reduction is not None
        step = self._current[0]
        self.reduction.send_shard(step, shard, result, self.worker.memory.owner_of)
        self.mailbox.post(
            SCHEDULER,
            "shard",
            step=step,
            shard=shard,
            body={
                "loss_sum": result.loss_sum,
                "aux_loss": result.aux_loss,
                "tokens": result.tokens,
                "seconds": dict(self.worker.seconds),
            },
            arrays=(result.counts_LE.numpy(),),
        )

    def _commit(self, message: Message) -> None:
        """Apply a step's update to every replica held here, then serve what waited for it."""
        self._apply(message.body, message.arrays)
        waiting, self.deferred = self.deferred, []
        # What others wait for goes first: a step of our own would wait for them in turn.
        for deferred in sorted(waiting, key=lambda m: m.kind in self._control):
            if deferred.kind in self._control:
                self.later.append(deferred)
            else:
                self._handle(deferred, waiting=False)

    def _apply(self, commit: dict[str, Any], arrays: Arrays) -> None:
        assert self.holdings is not None and commit["step"] == self.committed + 1
        rows = self.holdings.apply(
            lr=commit["lr"],
            memory_lr=commit["memory_lr"],
            scale=commit["scale"],
            counts_LE=torch.tensor(arrays[0]),
        )
        self.committed = commit["step"]
        if rows:
            assert self.holdings.memory is not None
            self.job.observe("dse_update_rows_total", rows)
            self.job.observe("dse_table_bytes", self.holdings.memory.num_bytes)

    def _evaluate(self, message: Message) -> None:
        assert self.worker is not None and self.plan is not None
        shards = [tuple(pair) for pair in message.body["batches"]]
        mine = [index for index, owner in shards if owner == self.mailbox.slot]
        found = self.worker.evaluate(message.step, mine, self.job.validation_batches())
        self.mailbox.post(SCHEDULER, "evaluated", step=message.step, body={"losses": found})

    def _checkpoint(self, message: Message) -> None:
        """Write what is primary here into the checkpoint's folder and report the hashes."""
        assert self.plan is not None and self.holdings is not None
        me, directory, plan = self.mailbox.slot, message.body["directory"], self.plan
        parts: dict[str, list[Piece]] = {
            "dense": [DENSE] if plan.dense[0] == me else [],
            "experts": [("expert", *k) for k in plan.experts_of(me) if plan.experts[k[0]][k[1]][0] == me],
            "memory": [("bucket", *k) for k in plan.buckets_of(me) if plan.buckets[k[0]][k[1]][0] == me],
        }
        entries: dict[str, Any] = {}
        for part, pieces in parts.items():
            if pieces:
                # The generation keeps a slot that was given up and comes back from writing over another's file.
                name = f"{part}_{me}_{plan.generation}"
                entries |= self.job.write(directory, name, self.holdings.tensors(pieces))
        self.mailbox.post(SCHEDULER, "saved", step=message.step, body={"tensors": entries})

    def _generate(self, message: Message) -> None:
        assert self.engine is not None, "this slot was not installed for serving"
        self.engine.add(GenerationRequest.from_dict(message.body))

    def _cancel(self, message: Message) -> None:
        assert self.engine is not None, "this slot was not installed for serving"
        self.engine.cancel(message.body["request_id"])
        observe_queues(self.job.observe, self.engine)

    def _generate_tokens(self) -> None:
        """Run one step of the serving batch and send its tokens on."""
        assert self.engine is not None and self.worker is not None
        started = time.perf_counter()
        # Experts and rows answer for the step after the last committed one, as in training.
        self._begin(self.committed + 1, -1)
        try:
            events = self.engine.step()
        except SlotLostError as error:
            # The engine has put the batch back; it gives up on a request after some failures.
            log.warning("slot %d: a serving step failed, trying again: %s", self.mailbox.slot, error)
            return
        finally:
            observe_engine(self.job.observe, self.engine, time.perf_counter() - started)
            observe_memory(self.job.observe, self.worker.memory, self.mailbox.slot)
        if events:
            self.mailbox.post(SCHEDULER, "tokens", body={"events": [event.to_dict() for event in events]})

    def _stop(self, message: Message) -> None:
        self.running = False

    # -- requests between slots ----------------------------------------------------------------

    def _begin(self, step: int, shard: int) -> None:
        self._current = (step, shard)

    def _call(self, calls: Sequence[Call]) -> list[Arrays]:
        """Send requests of the current shard, answer our own ones directly, wait for the others."""
        step, shard = self._current
        sequences: dict[int, int] = {}
        order: list[int] = []
        for call in calls:
            if call.to == self.mailbox.slot:
                order.append(0)
                continue
            sequence = self.mailbox.post(
                call.to,
                call.kind,
                step=step,
                shard=shard,
                layer=call.layer,
                body=call.body,
                arrays=call.arrays,
            )
            sequences[sequence] = call.to
            order.append(sequence)
        own = [
            self._requests[call.kind](
                Message(
                    kind=call.kind,
                    source=call.to,
                    generation=self.mailbox.generation,
                    sequence=0,
                    step=step,
                    shard=shard,
                    layer=call.layer,
                    body=call.body,
                    arrays=call.arrays,
                )
            )
            for call in calls
            if call.to == self.mailbox.slot
        ]
        replies = self.mailbox.wait(sequences, self.job.deadline_s, lambda m: self._handle(m, waiting=True))
        answered = iter(own)
        return [replies[sequence].arrays if sequence else next(answered) for sequence in order]

    def _expert_forward(self, message: Message) -> Arrays:
        assert self.holdings is not None
        x_UH, rows_R = (torch.from_numpy(array) for array in message.arrays)
        body, started = message.body, time.perf_counter()
        y_RH = self.holdings.experts.forward(
            message.layer, message.shard, x_UH, rows_R, body["experts"], body["counts"], body["keep"]
        )
        observe_rows(self.job.observe, "forward", len(y_RH), time.perf_counter() - started)
        return (y_RH.numpy(),)

    def _expert_backward(self, message: Message) -> Arrays:
        assert self.holdings is not None
        dout_UH, weights_R = (torch.from_numpy(array) for array in message.arrays)
        started = time.perf_counter()
        dx_RH = self.holdings.experts.backward(message.layer, message.shard, dout_UH, weights_R)
        observe_rows(self.job.observe, "backward", len(dx_RH), time.perf_counter() - started)
        return (dx_RH.numpy(),)

    def _rows(self, message: Message) -> Arrays:
        assert self.holdings is not None and self.holdings.memory is not None
        memory = self.holdings.memory
        return tuple(memory.gather(layer, rows) for layer, rows in enumerate(message.arrays))

    def _pull(self, message: Message) -> Arrays:
        """Give a peer copies of pieces as they are at the plan's step."""
        assert self.holdings is not None
        pieces: list[Piece] = [(kind, layer, index) for kind, layer, index in message.body["pieces"]]
        tensors = self.holdings.tensors(pieces)
        # Copies, because frames leave later than the next update may come.
        return tuple(tensors[name].numpy().copy() for name in self.holdings.names(pieces))
