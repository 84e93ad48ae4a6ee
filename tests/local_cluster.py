"""A training run as threads of one process: real mailboxes, ZeroMQ, slots and scheduler loop, no Ray.

Slots can be killed, hung and added, and messages dropped, repeated, delayed and reordered, at a
chosen message of a chosen step or at random from a seed.
"""

import random
import shutil
import tempfile
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgpack
import torch

from sparseray.actors.slot import Slot
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig, NSAConfig
from sparseray.platform.composition import Run
from sparseray.platform.config import (
    ClusterConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from sparseray.platform.fleet.control import Loss, Member
from sparseray.platform.fleet.job import SpecJobs
from sparseray.platform.fleet.transport import ZmqTransport
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.opening import open_training, slots_of
from sparseray.platform.run import checkpoint
from sparseray.platform.run.folder import RunFolder

MODEL = ModelConfig(
    vocab_size=300,
    hidden=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    attention=("full", "nsa", "full"),
    max_seq_len=64,
    nsa=NSAConfig(block=8, stride=4, select_block=8, num_selected=3, num_initial=1, num_local=1, window=8),
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=16),
    dse=DSEConfig(layers=(1,), heads=2, rows_per_head=97, head_dim=8, num_buckets=6),
)


def tiny_run(data: Path, *, steps: int = 30, **cluster: Any) -> RunConfig:
    """A run that takes seconds: 4 parts of 2 sequences of 32 tokens."""
    return RunConfig(
        model=MODEL,
        data=DataConfig(path=str(data), verify=False),
        optim=OptimConfig(warmup_steps=5),
        train=TrainConfig(
            steps=steps,
            seq_len=32,
            logical_shards=4,
            sequences_per_shard=2,
            checkpoint_every=0,
            eval_every=0,
            eval_batches=2,
        ),
        cluster=ClusterConfig(**{"deadline_s": 20.0, "device": "cpu", **cluster}),
    )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run left: a record a step, the digest of its last checkpoint, validation losses, its folder."""

    records: list[dict[str, Any]]
    digest: str
    evaluations: list[float]
    folder: RunFolder

    @property
    def curve(self) -> list[tuple[float, float, float]]:
        """Loss, balance loss and gradient norm of every step, to be compared to the bit."""
        return [(r["loss"], r["aux_loss"], r["grad_norm"]) for r in self.records]

    @property
    def events(self) -> list[str]:
        """Kinds of the run's events, in order."""
        return [event["kind"] for event in self.folder.event_lines()]


class Killed(BaseException):
    """Ends a slot's thread where it stands, as SIGKILL ends a process."""


@dataclass(frozen=True)
class Sent:
    """A message on its way: who sends it to whom, its kind and step."""

    source: int
    to: int
    kind: str
    step: int


@dataclass
class Faults:
    """What goes wrong.

    Args:
        on_send: called before every message; it may kill or hang slots.
        drop, repeat, delay: chance of each for a message between slots, from a stream of `seed`.
        seed: of the chances.
    """

    on_send: Callable[[Sent, "LocalFleet"], None] = lambda sent, fleet: None
    drop: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    seed: int = 0


class FaultyTransport:
    """A `Transport` of a slot that can be killed or hung, and that treats messages badly."""

    def __init__(self, inner: ZmqTransport, slot: int, faults: Faults, fleet: "LocalFleet") -> None:
        self._inner, self._slot, self._faults, self._fleet = inner, slot, faults, fleet
        self._random = random.Random(f"{faults.seed}:{slot}")
        self._late: deque[tuple[int, int, list[Any]]] = deque()
        self._count = 0
        self._lock = threading.RLock()
        self.address = inner.address
        self.killed, self.hung = threading.Event(), threading.Event()

    def _live(self) -> None:
        while self.hung.is_set() and not self.killed.is_set():
            time.sleep(0.005)
        if self.killed.is_set():
            raise Killed

    def connect(self, peers: dict[int, str]) -> None:
        self._live()
        self._inner.connect(peers)

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        self._live()
        header = msgpack.unpackb(frames[0], strict_map_key=False)
        sent = Sent(self._slot, slot, header[1], header[5])
        self._faults.on_send(sent, self._fleet)
        self._live()
        with self._lock:
            self._send(slot, [bytes(frame) for frame in frames])

    def _send(self, slot: int, frames: list[Any]) -> None:
        self._count += 1
        chance = self._random.random()
        if chance < self._faults.drop:
            return
        if self._random.random() < self._faults.delay:
            # Kept back until some later messages have overtaken it.
            self._late.append((self._count + self._random.randint(1, 4), slot, frames))
        else:
            self._inner.send(slot, frames)
            if self._random.random() < self._faults.repeat:
                self._late.append((self._count + self._random.randint(0, 6), slot, frames))
        self._flush(everything=False)

    def _flush(self, *, everything: bool) -> None:
        with self._lock:
            for due, slot, frames in list(self._late):
                if everything or due <= self._count:
                    self._late.remove((due, slot, frames))
                    self._inner.send(slot, frames)

    def receive(self, timeout_s: float) -> list[Any] | None:
        deadline = time.monotonic() + timeout_s
        while True:
            self._live()
            found = self._inner.receive(min(0.02, max(0.0, deadline - time.monotonic())))
            if found is not None:
                return found
            # Nothing else to do: what was kept back goes out now, so that nobody waits for it forever.
            self._flush(everything=True)
            if time.monotonic() >= deadline:
                return None

    def close(self) -> None:
        self._inner.close()


@dataclass
class LocalFleet:
    """`Fleet` of threads.

    Args:
        job: identifier of the job.
        sockets: folder for Unix sockets, None for TCP.
        faults: what goes wrong.
        most: slots that may live at once.
        nodes, machines: of the slots, by id.
    """

    job: str
    sockets: Path | None
    faults: Faults
    most: int = 12
    nodes: dict[int, str] = field(default_factory=dict)
    machines: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._members: dict[int, Member] = {}
        self._losses: list[Loss] = []
        self.transports: dict[int, FaultyTransport] = {}
        self.slots: dict[int, Slot] = {}
        self.threads: dict[int, threading.Thread] = {}
        self.used = 0

    def members(self) -> dict[int, Member]:
        with self._lock:
            return dict(self._members)

    def starting(self) -> int:
        return 0

    def ages(self) -> dict[int, float]:
        return dict.fromkeys(self.members(), 0.0)

    def room(self) -> int:
        return self.most - len(self.members())

    def losses(self) -> list[Loss]:
        with self._lock:
            taken, self._losses = self._losses, []
        return taken

    def start(self, count: int) -> None:
        for _ in range(count):
            slot, self.used = self.used, self.used + 1
            inner = ZmqTransport(f"slot{slot}", self.sockets)
            transport = self.transports[slot] = FaultyTransport(inner, slot, self.faults, self)
            self.slots[slot] = Slot(SlotMailbox(transport, slot, self.job), SpecJobs(Metrics({})))
            self.threads[slot] = threading.Thread(target=self._serve, args=(slot,), name=f"slot-{slot}")
            self.threads[slot].start()
            with self._lock:
                self._members[slot] = Member(
                    slot=slot,
                    address=transport.address,
                    node=self.nodes.get(slot, ""),
                    machine=self.machines.get(slot, ""),
                )

    def _serve(self, slot: int) -> None:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            self.slots[slot].serve_forever()
        except Killed:
            self.transports[slot].close()

    def retire(self, slot: int) -> None:
        with self._lock:
            self._members.pop(slot, None)
        self.transports[slot].killed.set()

    def give_up(self, slot: int, cause: str) -> None:
        self._lose(slot, cause)

    def _lose(self, slot: int, cause: str) -> None:
        with self._lock:
            if self._members.pop(slot, None) is None:
                return
            self._losses.append(Loss(slot=slot, cause=cause, noticed=time.monotonic()))
        self.transports[slot].killed.set()

    def kill(self, slot: int) -> None:
        """SIGKILL: the thread ends at its next word, and the fleet knows."""
        self.transports[slot].killed.set()
        self._lose(slot, "killed")

    def partition(self, slot: int) -> None:
        """Count a slot as lost while it lives on, speechless, until `heal`."""
        self.transports[slot].hung.set()
        with self._lock:
            self._members.pop(slot, None)
            self._losses.append(Loss(slot=slot, cause="no sign of life", noticed=time.monotonic()))

    def heal(self, slot: int) -> None:
        """Let a slot that was counted as lost speak again."""
        self.transports[slot].hung.clear()

    def stop(self) -> None:
        for transport in self.transports.values():
            transport.killed.set()
        for thread in self.threads.values():
            thread.join(10.0)
        assert not any(thread.is_alive() for thread in self.threads.values()), "a slot did not stop"


def train(
    run_dir: Path,
    config: RunConfig,
    *,
    tcp: bool = False,
    stop_after: int = 1 << 30,
    faults: Faults | None = None,
    at_step: Callable[[int, Run, LocalFleet], None] = lambda step, run, fleet: None,
    nodes: dict[int, str] | None = None,
    machines: dict[int, str] | None = None,
    scheduler_dies: Sequence[int] = (),
) -> Trained:
    """Train `config` in `run_dir` with every slot as a thread; resumes what the folder holds.

    Args:
        run_dir: folder of the run.
        config: of `tiny_run`.
        tcp: TCP on loopback instead of Unix sockets.
        stop_after: step after which to stop as Ctrl-C does, the schedule being that of the whole run.
        faults: what goes wrong.
        at_step: called after every committed step.
        nodes, machines: of the slots, by id.
        scheduler_dies: steps whose commit is a scheduler's last deed; another one goes on.
    """
    inputs = open_training(replace(config, run_dir=str(run_dir)))
    inputs.create_folder()
    config, folder, seen = inputs.config, inputs.folder, []
    sockets = None if tcp else Path(tempfile.mkdtemp(prefix="sr"))
    fleet = LocalFleet(
        uuid.uuid4().hex, sockets, faults or Faults(), nodes=nodes or {}, machines=machines or {}
    )
    dying = list(scheduler_dies)

    def note(record: dict[str, Any]) -> None:
        seen.append(record)
        if "loss" in record:
            at_step(record["step"], run, fleet)
            if record["step"] in dying:
                dying.remove(record["step"])
                raise Killed

    def scheduler() -> Run:
        transport = FaultyTransport(ZmqTransport("scheduler", sockets), SCHEDULER, fleet.faults, fleet)
        return Run.open(
            config,
            Mailbox(transport, SCHEDULER, fleet.job),
            lambda journal, history, prepare: fleet,
            Metrics({}),
            task=inputs.validation,
            on_record=note,
            should_stop=lambda: run.driver.step >= stop_after,
        )

    run = scheduler()
    try:
        fleet.start(slots_of(config, run.generations.workload.inventory))
        while True:
            try:
                run.drive()
                break
            except Killed:
                run.close()
                run = scheduler()
    finally:
        fleet.stop()
        run.close()
        if sockets is not None:
            shutil.rmtree(sockets)
    newest = folder.newest_checkpoint()
    return Trained(
        records=folder.records(),
        digest=checkpoint.read_manifest(newest)["digest"] if newest else "",
        evaluations=[record["eval_loss"] for record in seen if "eval_loss" in record],
        folder=folder,
    )
