"""A slot: one process with a device share that plays whatever roles the plan gives it.

It owns a mailbox and serves it from one thread. Messages and who sends them:
  scheduler -> slot: plan, step, commit, evaluate, checkpoint, stop
  slot -> scheduler: installed, shard, prepared, evaluated, saved, failed
  ingress -> slot:   generate, cancel (answered to the scheduler's mailbox by `tokens`)
  slot -> slot:      expert_forward, expert_backward, rows (answered by `reply`);
                     finish_shard, dense_nodes, dense_reduced, expert_reduced, rows_reduced
One step: step -> (rows, expert_*)* -> finish_shard, dense_nodes -> *_reduced -> prepared -> commit.
A request of a step that is not open yet waits until the commit before it has been applied.
One request: generate -> (rows, expert_forward)* -> tokens, once for every engine step.
"""

import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sparseray.actors.assignment import Plan
from sparseray.actors.attention_worker import AttentionWorker, Batches, ShardResult
from sparseray.actors.dense_state import DenseState
from sparseray.actors.engine import Engine
from sparseray.actors.exchange import Call
from sparseray.actors.expert_shard import ExpertShard
from sparseray.actors.generation import GenerationRequest
from sparseray.actors.mailbox import Mailbox
from sparseray.actors.memory_shard import MemoryShard
from sparseray.actors.messages import SCHEDULER, Message
from sparseray.errors import UserError
from sparseray.log import get_logger

log = get_logger(__name__)

Arrays = tuple[np.ndarray, ...]


class Job(Protocol):
    """What a slot needs to know of its job; platform/host.py builds it from the run's configuration."""

    deadline_s: float
    num_shards: int

    def dense(self) -> DenseState: ...
    def experts(self, plan: Plan, slot: int) -> ExpertShard | None: ...
    def memory(self, plan: Plan, slot: int) -> MemoryShard | None: ...
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
    def names(self, state: DenseState | ExpertShard | MemoryShard) -> list[str]: ...
    def read(self, directory: str, names: Sequence[str]) -> dict[str, torch.Tensor]: ...
    def write(self, directory: str, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]: ...
    def observe(self, name: str, value: float, **labels: str) -> None: ...


class Slot:
    """Serves one mailbox until told to stop.

    Args:
        mailbox: own mailbox.
        job_from: builds the job from the body of a plan message.
    """

    def __init__(self, mailbox: Mailbox, job_from: Callable[[dict[str, Any]], Job]) -> None:
        self.mailbox = mailbox
        self.job_from = job_from
        self.committed = 0
        self.running = True
        self.plan: Plan | None = None
        self.later: deque[Message] = deque()
        self.deferred: list[Message] = []
        self.dense: DenseState | None = None
        self.experts: ExpertShard | None = None
        self.memory: MemoryShard | None = None
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
        }
        self._gradients = {
            "finish_shard": self._finish_shard,
            "dense_nodes": self._dense_nodes,
            "dense_reduced": self._dense_reduced,
            "expert_reduced": self._expert_reduced,
            "rows_reduced": self._rows_reduced,
        }

    def serve_forever(self) -> None:
        """Handle messages until `stop`; a failure is told to the scheduler before it is raised."""
        while self.running:
            is_busy = self.engine is not None and self.engine.has_work
            message = self.later.popleft() if self.later else self.mailbox.next(0.0 if is_busy else 0.5)
            try:
                if message is not None:
                    self._handle(message, waiting=False)
                elif is_busy:
                    self._generate_tokens()
            except Exception as error:
                body = {"error": f"{type(error).__name__}: {error}", "user": isinstance(error, UserError)}
                what = "generating" if message is None else message.kind
                log.error("slot %d failed on %s:\n%s", self.mailbox.slot, what, traceback.format_exc())
                self.mailbox.post(SCHEDULER, "failed", step=self.committed, body=body)

    def _handle(self, message: Message, *, waiting: bool) -> None:
        """Handle one message; while a step of our own waits for replies, control messages keep."""
        if message.kind in self._control:
            if waiting:
                self.later.append(message)
            else:
                self._control[message.kind](message)
        elif message.step > self.committed + 1:
            self.deferred.append(message)
        elif message.step < self.committed + 1:
            log.debug("slot %d: %s of step %d comes too late", self.mailbox.slot, message.kind, message.step)
        elif message.kind in self._requests:
            arrays = self._requests[message.kind](message)
            self.mailbox.post(
                message.source, "reply", step=message.step, reply_to=message.sequence, arrays=arrays
            )
        elif message.kind in self._gradients:
            self._gradients[message.kind](message)
        else:
            log.warning(
                "slot %d: unexpected message %r from slot %d", self.mailbox.slot, message.kind, message.source
            )

    # -- control -------------------------------------------------------------------------------

    def _install(self, message: Message) -> None:
        """Take the roles of a plan, with state from a checkpoint or from the seed."""
        body, plan, me = message.body, Plan.from_dict(message.body["plan"]), self.mailbox.slot
        self.mailbox.generation = plan.generation
        self.mailbox.transport.connect({**plan.addresses, SCHEDULER: body["scheduler"]})
        self.plan, self.job = plan, self.job_from(body)
        self.committed = body["step"]
        self.later.clear()
        self.deferred.clear()
        self.dense = self.job.dense() if me in plan.dense else None
        self.experts = self.job.experts(plan, me)
        self.memory = self.job.memory(plan, me)
        if body["checkpoint"]:
            for state in (self.dense, self.experts, self.memory):
                if state is not None:
                    # The checkpoint holds primaries; a backup asks for the names of all that it owns.
                    names = self.job.names(state)
                    state.load(self.job.read(body["checkpoint"], names), self.committed)
        self.worker, self.engine = None, None
        if plan.shards_of(me):
            assert self.dense is not None
            self.worker = self.job.worker(plan, self.dense, self._call, self._begin)
            self.engine = self.job.engine(self.worker)
        self.mailbox.post(SCHEDULER, "installed", step=self.committed, body={"roles": plan.roles_of(me)})

    def _run_step(self, message: Message) -> None:
        assert self.worker is not None and self.plan is not None
        shards = self.plan.shards_of(self.mailbox.slot)
        self.worker.run_step(message.step, shards, self.job.train_batches(), self._shard_done)
        assert self.dense is not None
        reducer = self.plan.dense[0]
        nodes = self.dense.tree.nodes()
        if reducer == self.mailbox.slot:
            self._dense_complete(message.step)
        else:
            self.mailbox.post(
                reducer,
                "dense_nodes",
                step=message.step,
                body={"nodes": [(level, index) for level, index, _ in nodes]},
                arrays=tuple(value.numpy() for _, _, value in nodes),
            )

    def _shard_done(self, shard: int, result: ShardResult) -> None:
        """Send a shard's gradients on their way and report its loss."""
        assert self.dense is not None and self.plan is not None and self.worker is not None
        step, me = self._current[0], self.mailbox.slot
        self.dense.tree.add(0, shard, result.gradient)
        owners = [self.worker.memory.owner_of(layer, rows) for layer, (rows, _) in enumerate(result.rows)]
        memory_slots = self.plan.memory_primaries
        for slot in sorted(set(self.plan.expert_primaries) | set(memory_slots)):
            arrays: Arrays = ()
            if slot in memory_slots:
                arrays = tuple(a[owner == slot] for owner, pair in zip(owners, result.rows) for a in pair)
            if slot == me:
                self._finish(step, shard, arrays)
            else:
                self.mailbox.post(slot, "finish_shard", step=step, shard=shard, arrays=arrays)
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
        assert message.step == self.committed + 1, (message.step, self.committed)
        lr, scale = message.body["lr"], message.body["scale"]
        if self.dense is not None:
            self.dense.apply(lr=lr, scale=scale, counts_LE=torch.tensor(message.arrays[0]))
        if self.experts is not None:
            self.experts.apply(lr=lr, scale=scale)
        if self.memory is not None:
            rows = self.memory.apply(lr=message.body["memory_lr"], scale=scale)
            self.job.observe("dse_update_rows_total", rows)
        self.committed = message.step
        waiting, self.deferred = self.deferred, []
        for deferred in waiting:
            self._handle(deferred, waiting=False)

    def _evaluate(self, message: Message) -> None:
        assert self.worker is not None and self.plan is not None
        shards = [tuple(pair) for pair in message.body["batches"]]
        mine = [index for index, owner in shards if owner == self.mailbox.slot]
        found = self.worker.evaluate(message.step, mine, self.job.validation_batches())
        self.mailbox.post(SCHEDULER, "evaluated", step=message.step, body={"losses": found})

    def _checkpoint(self, message: Message) -> None:
        """Write what is primary here into the checkpoint's folder and report the hashes."""
        assert self.plan is not None
        me, directory = self.mailbox.slot, message.body["directory"]
        entries: dict[str, Any] = {}
        if self.dense is not None and self.plan.dense[0] == me:
            entries |= self.job.write(directory, "dense", self.dense.tensors())
        if self.experts is not None and self.experts.primary:
            entries |= self.job.write(directory, f"experts_{me}", self.experts.tensors())
        if self.memory is not None and self.memory.primary:
            entries |= self.job.write(directory, f"memory_{me}", self.memory.tensors())
        self.mailbox.post(SCHEDULER, "saved", step=message.step, body={"tensors": entries})

    def _generate(self, message: Message) -> None:
        assert self.engine is not None, "this slot was not installed for serving"
        self.engine.add(GenerationRequest.from_dict(message.body))

    def _cancel(self, message: Message) -> None:
        assert self.engine is not None, "this slot was not installed for serving"
        self.engine.cancel(message.body["request_id"])

    def _generate_tokens(self) -> None:
        """Run one step of the serving batch and send its tokens on."""
        assert self.engine is not None
        # Experts and rows answer for the step after the last committed one, as in training.
        self._begin(self.committed + 1, -1)
        try:
            events = self.engine.step()
        except Exception:
            # The ingress fails all that is open here; a request that comes next must not meet their caches.
            self.engine.clear()
            raise
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
        assert self.experts is not None
        x_UH, rows_R = (torch.from_numpy(array) for array in message.arrays)
        body = message.body
        return (
            self.experts.forward(
                message.layer, message.shard, x_UH, rows_R, body["experts"], body["counts"], body["keep"]
            ).numpy(),
        )

    def _expert_backward(self, message: Message) -> Arrays:
        assert self.experts is not None
        dout_UH, weights_R = (torch.from_numpy(array) for array in message.arrays)
        return (self.experts.backward(message.layer, message.shard, dout_UH, weights_R).numpy(),)

    def _rows(self, message: Message) -> Arrays:
        assert self.memory is not None
        return tuple(self.memory.gather(layer, rows) for layer, rows in enumerate(message.arrays))

    # -- reduction -----------------------------------------------------------------------------

    def _finish_shard(self, message: Message) -> None:
        self._finish(message.step, message.shard, message.arrays)

    def _finish(self, step: int, shard: int, arrays: Arrays) -> None:
        """Take note that a logical shard has sent all its gradients here."""
        plan, me = self.plan, self.mailbox.slot
        assert plan is not None
        if self.experts is not None and self.experts.primary and self.experts.finish_shard(shard):
            keys = _backups(plan.experts, me)
            for slot, owned in keys.items():
                self.mailbox.post(
                    slot,
                    "expert_reduced",
                    step=step,
                    body={"keys": owned},
                    arrays=(self.experts.pack(owned),),
                )
            self._prepared(step, "expert")
        if self.memory is not None and self.memory.primary:
            pairs = [(np.array(arrays[i]), np.array(arrays[i + 1])) for i in range(0, len(arrays), 2)]
            if self.memory.add_gradients(shard, pairs):
                for slot, owned in _backups(plan.buckets, me).items():
                    packed = tuple(array for key in owned for array in self.memory.reduced[key])
                    self.mailbox.post(slot, "rows_reduced", step=step, body={"keys": owned}, arrays=packed)
                self._prepared(step, "memory")

    def _dense_nodes(self, message: Message) -> None:
        assert self.dense is not None
        for (level, index), array in zip(message.body["nodes"], message.arrays):
            self.dense.tree.add(level, index, torch.tensor(array))
        self._dense_complete(message.step)

    def _dense_complete(self, step: int) -> None:
        """At the reducer: once all shards are in, share the sum with the other replicas."""
        assert self.dense is not None and self.plan is not None
        self.dense.reduced = self.dense.tree.root
        if self.dense.reduced is not None:
            for slot in self.plan.dense[1:]:
                self.mailbox.post(
                    slot, "dense_reduced", step=step, arrays=(self.dense.reduced.numpy().copy(),)
                )
            self._prepared(step, "dense")

    def _dense_reduced(self, message: Message) -> None:
        assert self.dense is not None
        self.dense.reduced = torch.tensor(message.arrays[0])
        self._prepared(message.step, "dense")

    def _expert_reduced(self, message: Message) -> None:
        assert self.experts is not None
        self.experts.unpack([(layer, expert) for layer, expert in message.body["keys"]], message.arrays[0])
        self._prepared(message.step, "expert")

    def _rows_reduced(self, message: Message) -> None:
        assert self.memory is not None
        for i, (layer, bucket) in enumerate(message.body["keys"]):
            self.memory.reduced[(layer, bucket)] = (
                np.array(message.arrays[2 * i]),
                np.array(message.arrays[2 * i + 1]),
            )
        self._prepared(message.step, "memory")

    def _prepared(self, step: int, role: str) -> None:
        """Tell the scheduler, once a role has all reduced gradients, their norms and digests."""
        plan = self.plan
        assert plan is not None
        norms: dict[str, float] = {}
        digests: dict[str, int] = {}
        if role == "dense" and self.dense is not None:
            norms = self.dense.norms() if plan.dense[0] == self.mailbox.slot else {}
            digests = {"dense": self.dense.digest()} if len(plan.dense) > 1 else {}
        if role == "expert" and self.experts is not None:
            if not self.experts.is_reduced:
                return
            norms = self.experts.norms()
            digests = self.experts.digests(
                [k for k in self.experts.owned if len(plan.experts[k[0]][k[1]]) > 1]
            )
        if role == "memory" and self.memory is not None:
            if not self.memory.is_reduced:
                return
            norms = self.memory.norms()
            digests = self.memory.digests([k for k in self.memory.owned if len(plan.buckets[k[0]][k[1]]) > 1])
        body = {"role": role, "norms": norms, "digests": digests}
        self.mailbox.post(SCHEDULER, "prepared", step=step, body=body)


def _backups(
    placement: tuple[tuple[tuple[int, ...], ...], ...], slot: int
) -> dict[int, list[tuple[int, int]]]:
    """Keys of which `slot` is the primary, by the slots that back them up."""
    found: dict[int, list[tuple[int, int]]] = {}
    for layer, row in enumerate(placement):
        for index, holders in enumerate(row):
            if holders[0] == slot:
                for backup in holders[1:]:
                    found.setdefault(backup, []).append((layer, index))
    return found
