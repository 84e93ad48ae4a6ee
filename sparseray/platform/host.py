"""The Ray actor that a slot lives in: builds transport, metrics and state, then lets the slot serve.

Ray starts, finds and ends it; everything else reaches the slot through its mailbox.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparseray.actors.assignment import Plan
from sparseray.actors.attention_worker import AttentionWorker, Batch, Batches
from sparseray.actors.dense_state import EXP_AVG, EXP_AVG_SQ, DenseState
from sparseray.actors.engine import Engine
from sparseray.actors.exchange import Call, RemoteExperts, RemoteMemory
from sparseray.actors.expert_shard import ExpertShard
from sparseray.actors.mailbox import Mailbox
from sparseray.actors.memory_shard import FIELDS, MemoryShard, bucket_bounds
from sparseray.actors.slot import Slot
from sparseray.actors.token_data import TokenDataset, batch
from sparseray.errors import IdentityError
from sparseray.model.dse_layout import DSELayout
from sparseray.platform import checkpoint
from sparseray.platform.config import RunConfig, from_dict
from sparseray.platform.metrics import Metrics
from sparseray.platform.transport import ZmqTransport, private_directory


class TrainingJob:
    """What a slot needs of one run: how to build its states and where tokens and checkpoints are.

    Args:
        body: of a plan message: config, layout directory.
        metrics: the slot's metrics.
    """

    def __init__(self, body: dict[str, Any], metrics: Metrics) -> None:
        self.config = from_dict(RunConfig, body["config"])
        self.layout = DSELayout.load(Path(body["layout"])) if body["layout"] else None
        if self.layout is not None and self.layout.sha256 != body["layout_sha256"]:
            raise IdentityError(
                f"{body['layout']} holds DSE layout {self.layout.sha256[:12]}, and the plan was made for "
                f"{body['layout_sha256'][:12]}: rows would be addressed wrongly; use the run's own folder"
            )
        self.metrics = metrics
        self.is_serving = bool(body.get("serving"))
        self.deadline_s = self.config.cluster.deadline_s
        self.num_shards = self.config.train.logical_shards
        optim = self.config.optim
        self._shared: dict[str, Any] = {"seed": self.config.train.seed, "num_shards": self.num_shards}
        self._adam: dict[str, Any] = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        self._datasets: dict[str, TokenDataset] = {}

    def _table_rows(self) -> list[int]:
        return (
            []
            if self.layout is None
            else [self.layout.num_rows(layer) for layer in self.config.model.dse.layers]
        )

    def dense(self) -> DenseState:
        """Build the dense weights from the seed."""
        decay = self.config.optim.weight_decay
        return DenseState(self.config.model, self.layout, weight_decay=decay, **self._shared, **self._adam)

    def experts(self, plan: Plan, slot: int) -> ExpertShard | None:
        """Build the experts that the plan gives a slot."""
        owned = plan.experts_of(slot)
        if not owned:
            return None
        primary = [key for key in owned if plan.experts[key[0]][key[1]][0] == slot]
        decay = self.config.optim.weight_decay
        return ExpertShard(
            self.config.model, owned, primary, weight_decay=decay, **self._shared, **self._adam
        )

    def memory(self, plan: Plan, slot: int) -> MemoryShard | None:
        """Build the buckets that the plan gives a slot."""
        owned = plan.buckets_of(slot)
        if not owned:
            return None
        primary = [key for key in owned if plan.buckets[key[0]][key[1]][0] == slot]
        return MemoryShard(
            self.config.model, self._table_rows(), owned, primary, **self._shared, **self._adam
        )

    def worker(
        self,
        plan: Plan,
        state: DenseState,
        call: Callable[[Sequence[Call]], list[tuple[np.ndarray, ...]]],
        begin: Callable[[int, int], None],
    ) -> AttentionWorker:
        """Build an attention worker on dense weights."""
        model = self.config.model
        bounds = [bucket_bounds(count, model.dse.num_buckets) for count in self._table_rows()]
        experts = RemoteExperts(plan, call, model.moe_layers)
        return AttentionWorker(state, experts, RemoteMemory(plan, call, model.dse.layers, bounds), begin)

    def engine(self, worker: AttentionWorker) -> Engine | None:
        """Build the serving engine of an attention worker; None in training."""
        if not self.is_serving:
            return None
        serve = self.config.serve
        return Engine(
            worker.state.model,
            worker.experts,
            worker.memory if self.config.model.dse.layers else None,
            max_batch=serve.max_batch,
            max_model_len=min(serve.max_model_len, self.config.model.max_seq_len),
            prefill_chunk=serve.prefill_chunk,
        )

    def _batches(self, split: str, seed: int) -> Batches:
        if split not in self._datasets:
            # The shards were verified once, when the run started.
            self._datasets[split] = TokenDataset(Path(self.config.data.path), split, verify=False)
        dataset, train = self._datasets[split], self.config.train

        def read(step: int, shard: int) -> Batch:
            return batch(
                dataset,
                seed=seed,
                step=step,
                shard=shard,
                num_shards=train.logical_shards,
                sequences_per_shard=train.sequences_per_shard,
                seq_len=train.seq_len,
            )

        return read

    def train_batches(self) -> Batches:
        """Training data by (step, shard)."""
        return self._batches("train", self.config.train.seed)

    def validation_batches(self) -> Batches:
        """Validation data: batch i is (step i // L, shard i % L) of the validation split, the same at every step."""
        read = self._batches("validation", 0)
        return lambda _step, index: read(index // self.num_shards, index % self.num_shards)

    def names(self, state: DenseState | ExpertShard | MemoryShard) -> list[str]:
        """Logical names of everything a state must load."""
        if isinstance(state, DenseState):
            return [*state.biases, *(n + s for n in state.names for s in ("", EXP_AVG, EXP_AVG_SQ))]
        if isinstance(state, ExpertShard):
            names = [name for key in state.owned for name in state.names[key]]
            return [n + s for n in names for s in ("", EXP_AVG, EXP_AVG_SQ)]
        return [state.name(key) + suffix for key in state.owned for suffix in FIELDS]

    def read(self, directory: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read tensors of a checkpoint."""
        return checkpoint.read_tensors(directory, names)

    def write(self, directory: str, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write one part of a checkpoint."""
        return checkpoint.write_part(directory, part, tensors)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record a metric of this slot."""
        self.metrics.record(name, value, **labels)


class Host:
    """One slot as a Ray actor.

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
        self._transport = ZmqTransport(f"slot{slot}", directory, bind_host)
        self._metrics = Metrics({"slot": str(slot)}, declare="slot")
        self._metrics_address = self._metrics.serve(bind_host)
        mailbox = Mailbox(self._transport, slot, job)
        self._slot = Slot(mailbox, lambda body: TrainingJob(body, self._metrics))
        self._thread = threading.Thread(target=self._slot.serve_forever, daemon=True, name=f"slot-{slot}")

    def address(self) -> str:
        """Address of the slot's inbox."""
        return self._transport.address

    def metrics_address(self) -> str:
        """Host and port of the slot's `/metrics`, empty when there is none."""
        return self._metrics_address

    def serve(self) -> None:
        """Start serving the mailbox."""
        self._thread.start()
