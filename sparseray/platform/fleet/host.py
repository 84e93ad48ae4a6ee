"""What a slot's process holds: builds transport, metrics and state, then lets the slot serve."""

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import ray
import torch
import zmq

from sparseray.actors.exchange.protocol import Exchange
from sparseray.actors.installation import JobSpec
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.grammar import Grammars
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.slot import Slot
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.state.tables import process_namespace
from sparseray.actors.state.whole_experts import WholeExperts
from sparseray.actors.training.token_data import TokenDataset, batch
from sparseray.actors.training.worker import Batch, Batches
from sparseray.actors.wire.messages import SavedTensor
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import IdentityError
from sparseray.kernels.ops import ops_for
from sparseray.model.dse_layout import DSELayout
from sparseray.model.transformer import Transformer
from sparseray.platform.config import RunConfig, from_dict
from sparseray.platform.device import is_whole
from sparseray.platform.fleet.priority import gently
from sparseray.platform.fleet.rehearsal import warm_holdings
from sparseray.platform.fleet.transport import ZmqTransport, private_directory
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.run import checkpoint


class TrainingJob:
    """What a slot needs of one run: how to build its states and where tokens and checkpoints are.

    Args:
        spec: of a plan message.
        metrics: the slot's metrics.
    """

    def __init__(self, spec: JobSpec, metrics: Metrics) -> None:
        self.config = from_dict(RunConfig, json.loads(spec.config))
        self.layout = DSELayout.load(Path(spec.layout)) if spec.layout else None
        if self.layout is not None and self.layout.sha256 != spec.layout_sha256:
            raise IdentityError(
                f"{spec.layout} holds DSE layout {self.layout.sha256[:12]}, and the plan was made for "
                f"{spec.layout_sha256[:12]}: rows would be addressed wrongly; use the run's own folder"
            )
        self.metrics = metrics
        self.is_serving = spec.serving
        self._grammars: Grammars | None = None
        if self.is_serving:
            model = self.config.model
            self._grammars = Grammars.load(
                Path(spec.tokenizer), vocab_size=model.vocab_size, eos_id=model.dse.document_end_id
            )
        self.deadline_s = self.config.cluster.deadline_s
        optim = self.config.optim
        self._shared: dict[str, Any] = {
            "seed": self.config.train.seed,
            "num_parts": self.config.train.logical_shards,
        }
        self._adam: dict[str, Any] = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        self.device = torch.device(
            "cuda" if self._is_whole and self.config.cluster.device == "cuda" else "cpu"
        )
        self._decay: dict[str, Any] = {"weight_decay": optim.weight_decay, **self._shared, **self._adam}
        self._datasets: dict[str, TokenDataset] = {}

    def _table_rows(self) -> list[int]:
        return (
            []
            if self.layout is None
            else [self.layout.num_rows(layer) for layer in self.config.model.dse.layers]
        )

    @property
    def _is_whole(self) -> bool:
        return is_whole(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """What forward and backward compute in."""
        return DTYPES[self.config.train.dtype] if self._is_whole else torch.float32

    def _slabs(self) -> dict[str, Any]:
        """What states on one device are made with, beside what all are."""
        config = self.config
        return {
            "device": self.device,
            "ops": ops_for(config.kernels, self.device),
            "moments": DTYPES[config.optim.moments],
            "determinism": config.determinism,
            **self._decay,
        }

    def _dense(self) -> DenseState:
        model = self.config.model
        if self._is_whole:
            return DenseSlabs(model, self.layout, dtype=self.dtype, **self._slabs())
        return DenseState(model, self.layout, ops=ops_for(self.config.kernels, self.device), **self._decay)

    def holdings(self) -> Holdings:
        """Build a slot's state, empty."""
        model = self.config.model
        experts = ExpertShard(model, **self._decay)
        if self._is_whole:
            compute = None if self.dtype == torch.float32 else self.dtype
            experts = WholeExperts(model, compute_dtype=compute, **self._slabs())
        memory = MemoryShard(model, self._table_rows(), **self._shared, **self._adam)
        return Holdings(self._dense, experts, memory if model.dse.layers else None)

    def engine(self, model: Transformer, exchange: Exchange) -> Engine | None:
        """Build the serving engine of an attention worker; None in training.

        Args:
            model: dense weights of the slot.
            exchange: of the generation.
        """
        if not self.is_serving:
            return None
        serve = self.config.serve
        memory = exchange if self.config.model.dse.layers else None
        options: dict[str, Any] = {
            "max_batch": serve.max_batch,
            "max_model_len": serve.max_model_len or None,
            "grammars": self._grammars,
        }
        if self.device.type == "cpu":
            return Engine(model, exchange.experts, memory, prefill_chunk=serve.prefill_chunk, **options)
        cache_bytes = int(serve.cache_gib * 2**30) or None
        return PagedEngine(model, exchange.experts, memory, cache_bytes=cache_bytes, **options)

    def _batches(self, split: str, seed: int) -> Batches:
        if split not in self._datasets:
            # The shards were verified once, when the run started.
            self._datasets[split] = TokenDataset(Path(self.config.data.path), split, verify=False)
        dataset, train = self._datasets[split], self.config.train

        def read(step: int, part: int) -> Batch:
            return batch(
                dataset,
                seed=seed,
                step=step,
                part=part,
                num_parts=train.logical_shards,
                sequences_per_part=train.sequences_per_shard,
                seq_len=train.seq_len,
            )

        return read

    def train_batches(self) -> Batches:
        """Training data by (step, part)."""
        return self._batches("train", self.config.train.seed)

    def validation_batches(self) -> Batches:
        """Validation data: batch i is (step i // L, part i % L) of the validation split, the same at every step."""
        read, parts = self._batches("validation", 0), self.config.train.logical_shards
        return lambda _step, index: read(index // parts, index % parts)

    def read(self, directory: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read tensors of a checkpoint."""
        return checkpoint.read_tensors(directory, names)

    def write(self, directory: str, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
        """Write one file of a checkpoint."""
        return checkpoint.write_part(directory, name, tensors)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record a metric of this slot."""
        self.metrics.record(name, value, **labels)


HEARTBEAT_S = 0.1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Host:
    """One slot.

    Args:
        slot: slot id.
        job: identifier of the job; messages of other jobs are dropped.
        threads: torch threads.
        transport: "ipc" or "tcp".
        bind_host: address that TCP sockets and metrics bind to.
    """

    def __init__(self, *, slot: int, job: str, threads: int, transport: str, bind_host: str) -> None:
        torch.set_num_threads(threads)
        # Received buffers are read-only by intent; nobody writes through the tensors that view them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        directory = private_directory(job) if transport == "ipc" else None
        self._slot_id, self._job_id = slot, job
        self._transport = ZmqTransport(f"slot{slot}", directory, bind_host)
        self._metrics = Metrics({"slot": str(slot)}, declare="slot")
        self._metrics_address = self._metrics.serve(bind_host)
        mailbox = SlotMailbox(self._transport, slot, job)
        self._jobs: dict[JobSpec, TrainingJob] = {}
        self._slot = Slot(mailbox, self._job_from)
        self._thread = threading.Thread(target=self._slot.serve_forever, daemon=True, name=f"slot-{slot}")
        self._heartbeats = ""
        self._beating = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    @property
    def address(self) -> str:
        """Address of the slot's inbox."""
        return self._transport.address

    @property
    def metrics_address(self) -> str:
        """Host and port of the slot's `/metrics`, empty when there is none."""
        return self._metrics_address

    def serve(self) -> None:
        """Start serving the mailbox."""
        if not self._thread.is_alive():
            self._thread.start()

    def prepare(self, spec: JobSpec, heartbeats: str) -> dict[str, Any]:
        """Load and warm what a job needs, begin to serve and to give signs of life; harmless when repeated.

        Args:
            spec: of the job.
            heartbeats: address that signs of life go to.

        Returns:
            address, node, metrics, pid, namespace of this slot.
        """
        self._heartbeats = heartbeats
        job = self._job_from(spec)
        if not self._thread.is_alive():
            self._slot.roles.holdings = gently(lambda: warm_holdings(job))
            self._thread.start()
            self._beating.start()
        return {
            "address": self._transport.address,
            "node": ray.get_runtime_context().get_node_id(),
            "metrics": self._metrics_address,
            "pid": os.getpid(),
            "namespace": process_namespace(),
        }

    def wait_for_end(self) -> None:
        """Return when the slot has stopped serving."""
        self._thread.join()

    def _job_from(self, spec: JobSpec) -> TrainingJob:
        if spec not in self._jobs:
            self._jobs = {spec: TrainingJob(spec, self._metrics)}
        return self._jobs[spec]

    def _beat(self) -> None:
        """Tell the scheduler ten times a second that this process runs."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        target = ""
        beat = [msgpack.packb([self._job_id, self._slot_id])]
        while True:
            if self._heartbeats != target:
                socket.close(linger=0)
                socket = zmq.Context.instance().socket(zmq.PUSH)
                # Beats that nobody takes are worth nothing: none is kept for later.
                socket.setsockopt(zmq.SNDHWM, 2)
                socket.setsockopt(zmq.LINGER, 0)
                target = self._heartbeats
                socket.connect(target)
            with contextlib.suppress(zmq.Again):
                socket.send_multipart(beat, zmq.DONTWAIT)
            time.sleep(HEARTBEAT_S)
