"""What a slot builds from the spec of a job: states, engines, data."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparseray.actors.installation import JobSpec
from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.enduring import Lookups
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.paged_engine import PLACES_FOR_BEGUN, PREFILL_ROWS, PagedEngine
from sparseray.actors.serving.rounds_engine import InRounds, RoundsEngine
from sparseray.actors.serving.speculative_engine import SpeculativeEngine
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.state.staged_memory import StagedMemory
from sparseray.actors.training.mixture import Mixture
from sparseray.actors.training.token_data import TokenBatches, TokenDataset
from sparseray.actors.wire.messages import SavedTensor
from sparseray.errors import IdentityError
from sparseray.kernels.ops import ops_for
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import DSELayout
from sparseray.model.transformer import Transformer
from sparseray.platform.config import RunConfig, from_dict
from sparseray.platform.device import is_whole, saves_beside, spreads_experts
from sparseray.platform.fleet.weights_port import WeightsPort, is_offered, read_offered
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.run import checkpoint

if TYPE_CHECKING:
    from sparseray.actors.serving.grammar import Grammars

ROUND_ROWS = 512
"""The same, where a pass is a round of all engines: each computes for as many of the others, or for none."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SlotJob:
    """What a slot needs of one job: how to build its states and where tokens and checkpoints are.

    Args:
        spec: of a plan message.
        metrics: the slot's metrics.
        port: where servers read the weights that it offers.
    """

    def __init__(self, spec: JobSpec, metrics: Metrics, port: WeightsPort) -> None:
        self.config = from_dict(RunConfig, json.loads(spec.config))
        self.layout = DSELayout.load(Path(spec.layout)) if spec.layout else None
        if self.layout is not None and self.layout.sha256 != spec.layout_sha256:
            raise IdentityError(
                f"{spec.layout} holds DSE layout {self.layout.sha256[:12]}, and the plan was made for "
                f"{spec.layout_sha256[:12]}: rows would be addressed wrongly; use the run's own folder"
            )
        self.metrics, self._port = metrics, port
        self.is_serving = spec.serving
        self._grammars = _load_grammars(spec, self.config.model) if self.is_serving else None
        self.deadline_s = self.config.cluster.deadline_s
        self.part_shape = self.config.train.sequences_per_shard, self.config.train.seq_len
        self.is_in_rounds = spec.serving and spreads_experts(self.config)
        optim = self.config.optim
        self._shared: dict[str, Any] = {
            "seed": self.config.train.seed,
            "num_parts": self.config.train.logical_shards,
        }
        self._adam: dict[str, Any] = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        self._decay: dict[str, Any] = {"weight_decay": optim.weight_decay, **self._shared, **self._adam}
        self._moments: dict[str, Any] = {
            "moments": DTYPES[optim.moments],
            "weight_decay": optim.weight_decay,
        }
        self._is_whole = is_whole(self.config)
        falls_due = not spec.serving and self.config.train.checkpoint_every > 0
        self.saves_beside = falls_due and saves_beside(self.config)
        self.device = torch.device(
            "cuda" if self._is_whole and self.config.cluster.device == "cuda" else "cpu"
        )
        self._datasets: dict[str, TokenDataset] = {}
        if self.is_in_rounds:
            # What a slot may give the others at once.
            self.part_shape = 1, max(self._prefill_rows, self.config.serve.max_batch * PLACES_FOR_BEGUN)

    def _table_rows(self) -> list[int]:
        return (
            []
            if self.layout is None
            else [self.layout.num_rows(layer) for layer in self.config.model.dse.layers]
        )

    def _slabs(self) -> dict[str, Any]:
        """What states on one device are made with, beside what all are."""
        config = self.config
        return {
            "device": self.device,
            "ops": ops_for(config.kernels, self.device),
            "determinism": config.determinism,
            **self._shared,
            **self._adam,
        }

    def _dense(self) -> DenseState:
        model, train = self.config.model, self.config.train
        if self._is_whole:
            dtype = DTYPES[train.dtype]
            return DenseSlabs(
                model, self.layout, dtype=dtype, recompute=train.recompute, **self._moments, **self._slabs()
            )
        return DenseState(model, self.layout, ops=ops_for(self.config.kernels, self.device), **self._decay)

    def experts(self) -> ExpertShard:
        """Build a slot's experts, none yet."""
        model, dtype = self.config.model, DTYPES[self.config.train.dtype]
        if not self._is_whole:
            return ExpertShard(model, ops=ops_for(self.config.kernels, self.device), **self._decay)
        compute = None if dtype == torch.float32 else dtype
        return SlabExperts(model, compute_dtype=compute, **self._moments, **self._slabs())

    def holdings(self) -> Holdings:
        """Build a slot's state, empty."""
        if self.device.type == "cuda":
            _fix_order(not self.is_serving and self.config.determinism == "bitwise")
        has_memory = bool(self.config.model.dse.layers)
        return Holdings(self._dense, self.experts(), self.memory(self._table_rows()) if has_memory else None)

    def memory(self, table_rows: list[int]) -> MemoryShard:
        """Build a slot's memory, empty, with so many rows in each layer's table."""
        model = self.config.model
        if self._is_whole:
            return StagedMemory(model, table_rows, **self._slabs())
        return MemoryShard(model, table_rows, **self._shared, **self._adam)

    def engine(self, model: Transformer, exchange: Lookups) -> Engine | None:
        """Build the serving engine of an attention worker; None in training.

        Args:
            model: dense weights of the slot.
            exchange: outlives the generation.
        """
        if not self.is_serving:
            return None
        serve = self.config.serve
        memory = exchange if self.config.model.dse.layers else None
        options: dict[str, Any] = {
            "max_batch": serve.max_batch,
            "max_model_len": serve.max_model_len or None,
            "grammars": self._grammars,
            "prefill_chunk": self._prefill_rows,
            "cache_bytes": int(serve.cache_gib * 2**30) or None,
        }
        if isinstance(exchange, InRounds):
            return RoundsEngine(model, exchange, **options)
        return self._engine_kind(model)(model, exchange.experts, memory, **options)

    @property
    def _prefill_rows(self) -> int:
        """Tokens of prompts that are read in one step."""
        if self.device.type == "cpu":
            return self.config.serve.prefill_chunk
        return ROUND_ROWS if self.is_in_rounds else PREFILL_ROWS

    def _engine_kind(self, model: Transformer) -> type[PagedEngine]:
        if not model.mtp:
            return PagedEngine
        return DraftingEngine if self.device.type == "cuda" else SpeculativeEngine

    def _batches(self, split: str, seed: int, *, is_fixed: bool) -> TokenBatches:
        if split not in self._datasets:
            # The shards were verified once, when the run started.
            self._datasets[split] = TokenDataset(Path(self.config.data.path), split, verify=False)
        train, mixture = self.config.train, self.config.data.mixture
        return TokenBatches(
            dataset=self._datasets[split],
            mixture=Mixture.parse(mixture) if mixture and not is_fixed else None,
            seed=seed,
            num_parts=train.logical_shards,
            sequences_per_part=train.sequences_per_shard,
            seq_len=train.seq_len,
            is_fixed=is_fixed,
        )

    def train_batches(self) -> TokenBatches:
        """Training data by (step, part)."""
        return self._batches("train", self.config.train.seed, is_fixed=False)

    def validation_batches(self) -> TokenBatches:
        """Validation data by (any step, index of the batch)."""
        return self._batches("validation", 0, is_fixed=True)

    def read(self, directory: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read tensors of a checkpoint, or of what a run offers.

        Args:
            directory: of the checkpoint; or what `source_of` gives.
            names: logical names.
        """
        if is_offered(directory):
            return read_offered(directory, names)
        return checkpoint.read_tensors(directory, names)

    def write(self, directory: str, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
        """Write one file of a checkpoint.

        Args:
            directory: of the checkpoint.
            name: of the file, without its suffix.
            tensors: by logical name.
        """
        return checkpoint.write_part(directory, name, tensors)

    def offer(self, step: int, tensors: dict[str, torch.Tensor]) -> str:
        """As `WeightsPort.offer`.

        Args:
            step, tensors: what is offered.
        """
        return self._port.offer(step, tensors)

    def withdraw(self) -> None:
        """Offer nothing any more."""
        self._port.withdraw()

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record a metric of this slot.

        Args:
            name: in the registry.
            value: in the metric's unit.
            labels: of the metric.
        """
        self.metrics.record(name, value, **labels)


def _fix_order(is_fixed: bool) -> None:
    """Have torch's own operations on this process's GPU sum in one order, or as is fastest.

    Attention is what differs (kernels/attention/ordered.py). What else has no fixed order warns; of that no step has any.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_fixed, warn_only=True)
    # Otherwise every new tensor would be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class SpecJobs:
    """Jobs by their spec; the last one is kept, so that a plan of the same job finds what it has built.

    Args:
        metrics: the slot's metrics.
        port: where servers read the weights that it offers.
    """

    def __init__(self, metrics: Metrics, port: WeightsPort | None = None) -> None:
        self._metrics, self._port = metrics, port or WeightsPort()
        self._last: tuple[JobSpec, SlotJob] | None = None

    def __call__(self, spec: JobSpec) -> SlotJob:
        """Return the job of a spec."""
        if self._last is None or self._last[0] != spec:
            self._last = spec, SlotJob(spec, self._metrics, self._port)
        return self._last[1]


def _load_grammars(spec: JobSpec, model: ModelConfig) -> "Grammars":
    from sparseray.actors.serving.grammar import Grammars  # and llguidance, which training does not need

    return Grammars.load(Path(spec.tokenizer), vocab_size=model.vocab_size, eos_id=model.dse.document_end_id)
