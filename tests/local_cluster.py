"""A training run as threads of one process: real mailboxes, ZeroMQ, slots and scheduler loop, no Ray."""

import shutil
import tempfile
import threading
import uuid
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparseray.actors.mailbox import Mailbox
from sparseray.actors.messages import SCHEDULER
from sparseray.actors.slot import Slot
from sparseray.jobs.pretrain import build_layout, check_data, placement, resolve, slots_of
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig, NSAConfig
from sparseray.platform import checkpoint
from sparseray.platform.config import ClusterConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from sparseray.platform.host import TrainingJob
from sparseray.platform.journal import Journal
from sparseray.platform.metrics import Metrics
from sparseray.platform.plan import make_plan
from sparseray.platform.run_folder import RunFolder
from sparseray.platform.training import Trainer, validation_batch_count
from sparseray.platform.transport import ZmqTransport

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
    """A run that takes seconds: 4 logical shards of 2 sequences of 32 tokens."""
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
        cluster=ClusterConfig(deadline_s=20.0, **cluster),
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


def train(
    run_dir: Path,
    config: RunConfig,
    *,
    tcp: bool = False,
    stop_after: int = 1 << 30,
) -> Trained:
    """Train `config` in `run_dir` with every slot as a thread; resumes what the folder holds.

    Args:
        run_dir: folder of the run.
        config: of `tiny_run`.
        tcp: TCP on loopback instead of Unix sockets.
        stop_after: step after which to stop as Ctrl-C does, the schedule being that of the whole run.
    """
    data = check_data(config)
    config = replace(resolve(config, data["train"]), run_dir=str(run_dir))
    layout = build_layout(config.model, data["train"])
    folder = RunFolder(run_dir)
    folder.check(config)
    folder.open(config, layout, Path(config.data.path) / "tokenizer.json")
    job, count = uuid.uuid4().hex, slots_of(config)
    sockets = None if tcp else Path(tempfile.mkdtemp(prefix="sr"))
    transports = {slot: ZmqTransport(f"slot{slot}", sockets) for slot in (*range(count), SCHEDULER)}
    threads = [
        threading.Thread(target=_serve, args=(Mailbox(transports[slot], slot, job),), name=f"slot-{slot}")
        for slot in range(count)
    ]
    mailbox, seen = Mailbox(transports[SCHEDULER], SCHEDULER, job), []
    journal = Journal(folder.journal)
    plan = make_plan(**placement(config, {slot: transports[slot].address for slot in range(count)}))
    windows = data["validation"].num_windows(config.train.seq_len)
    trainer = Trainer(
        config,
        plan,
        mailbox,
        journal,
        folder,
        Metrics({}),
        layout="" if layout is None else str(folder.identity),
        bytes_per_token=data["validation"].bytes_per_token,
        validation_batches=validation_batch_count(windows, config),
        on_record=seen.append,
        should_stop=lambda: trainer.step >= stop_after,
    )
    for thread in threads:
        thread.start()
    try:
        trainer.run()
    finally:
        mailbox.transport.connect(plan.addresses)
        for slot in plan.addresses:
            mailbox.post(slot, "stop")
        for thread in threads:
            thread.join(10.0)
        journal.close()
        for transport in transports.values():
            transport.close()
        if sockets is not None:
            shutil.rmtree(sockets)
    assert not any(thread.is_alive() for thread in threads), "a slot did not stop"
    newest = folder.newest_checkpoint()
    return Trained(
        records=folder.records(),
        digest=checkpoint.read_manifest(newest)["digest"] if newest else "",
        evaluations=[record["eval_loss"] for record in seen if "eval_loss" in record],
        folder=folder,
    )


def _serve(mailbox: Mailbox) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    Slot(mailbox, lambda body: TrainingJob(body, Metrics({}))).serve_forever()
