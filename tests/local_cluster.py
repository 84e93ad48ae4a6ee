"""A training run as threads of one process: real mailboxes, ZeroMQ, slots and scheduler loop, no Ray.

Slots can be killed, hung and added, and messages dropped, repeated, delayed and reordered, at a
chosen message of a chosen step or at random from a seed.
"""

import shutil
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from faulty_transport import Faults, FaultyTransport, Killed

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
from sparseray.platform.offers import Offers
from sparseray.platform.opening import TrainingInputs, open_training, slots_of
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


@dataclass
class LocalFleet:
    """`Fleet` of threads.

    Args:
        job: identifier of the job.
        sockets: folder for Unix sockets, None for TCP.
        faults: what goes wrong.
        most: slots that may live at once.
        nodes, machines: of the slots, by id.
        drained: nodes that are to be drained, and seconds until they are gone.
    """

    job: str
    sockets: Path | None
    faults: Faults
    most: int = 12
    nodes: dict[int, str] = field(default_factory=dict)
    machines: dict[int, str] = field(default_factory=dict)
    drained: dict[str, float] = field(default_factory=dict)

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

    def waiting(self) -> int:
        return 0

    def withdraw(self, count: int) -> None:
        """Nothing waits: slots start at once."""

    def ages(self) -> dict[int, float]:
        return dict.fromkeys(self.members(), 0.0)

    def room(self) -> int:
        return self.most - len(self.members())

    def draining(self) -> dict[int, float]:
        return {s: self.drained[m.node] for s, m in self.members().items() if m.node in self.drained}

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
                    namespace=self.nodes.get(slot, ""),
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


class Schedulers:
    """The schedulers of a run, one after another.

    Args:
        inputs: of the run.
        fleet: its slots, none of them started.
        at_step: called after every committed step.
        dying: steps whose commit is a scheduler's last deed.
        stop_after: step after which to stop.
        offers: of a server that follows the run.
    """

    def __init__(
        self,
        inputs: TrainingInputs,
        fleet: LocalFleet,
        at_step: Callable[[int, Run, LocalFleet], None],
        dying: list[int],
        stop_after: int,
        offers: Callable[[], Offers | None],
    ) -> None:
        self.offers = offers
        self.inputs, self.fleet, self.at_step = inputs, fleet, at_step
        self.dying, self.stop_after = dying, stop_after
        self.seen: list[dict[str, Any]] = []
        self.run = self._open()

    def _open(self) -> Run:
        fleet = self.fleet
        transport = FaultyTransport(ZmqTransport("scheduler", fleet.sockets), SCHEDULER, fleet.faults, fleet)
        return Run.open(
            self.inputs.config,
            Mailbox(transport, SCHEDULER, fleet.job),
            lambda journal, history, prepare: fleet,
            Metrics({}),
            task=self.inputs.validation,
            on_record=self._note,
            should_stop=lambda: self.run.driver.step >= self.stop_after,
            offers=self.offers,
        )

    def _note(self, record: dict[str, Any]) -> None:
        self.seen.append(record)
        if "loss" in record:
            self.at_step(record["step"], self.run, self.fleet)
            if record["step"] in self.dying:
                self.dying.remove(record["step"])
                raise Killed

    def drive(self) -> None:
        """Start the slots and train to the end."""
        self.fleet.start(slots_of(self.inputs.config, self.run.generations.workload.inventory))
        while True:
            try:
                self.run.drive()
                return
            except Killed:
                self.run.close()
                self.run = self._open()


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
    offers: Callable[[], Offers | None] = lambda: None,
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
        offers: of a server that follows the run.
    """
    inputs = open_training(replace(config, run_dir=str(run_dir)))
    inputs.create_folder()
    sockets = None if tcp else Path(tempfile.mkdtemp(prefix="sr"))
    fleet = LocalFleet(
        uuid.uuid4().hex, sockets, faults or Faults(), nodes=nodes or {}, machines=machines or {}
    )
    schedulers = Schedulers(inputs, fleet, at_step, list(scheduler_dies), stop_after, offers)
    try:
        schedulers.drive()
    finally:
        fleet.stop()
        schedulers.run.close()
        if sockets is not None:
            shutil.rmtree(sockets)
    folder = inputs.folder
    newest = folder.newest_checkpoint()
    return Trained(
        records=folder.records(),
        digest=checkpoint.read_manifest(newest)["digest"] if newest else "",
        evaluations=[record["eval_loss"] for record in schedulers.seen if "eval_loss" in record],
        folder=folder,
    )
