"""What a slot does once before it serves, beside running jobs and at low priority: all that is slow the first time.

Weights are allocated, data is opened, autograd starts, loops and kernels are compiled or loaded, a GPU's context
opens. Nothing of it stays but what is slow to make.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparseray.actors.exchange.protocol import FetchedRows
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.memory import warm_loops
from sparseray.actors.state.staged_memory import StagedMemory
from sparseray.log import get_logger
from sparseray.model.statistics import collect
from sparseray.model.transformer import Transformer, cross_entropy_sum
from sparseray.platform.fleet.company import rehearse_in_company, zero_rows
from sparseray.platform.fleet.freeing import free_memory
from sparseray.platform.fleet.job import SlotJob
from sparseray.platform.metrics.discovery import state_directory

log = get_logger(__name__)

TURN_S = 60.0


def warm_holdings(job: SlotJob) -> Holdings:
    """Build a slot's state, empty, and touch once what is slow the first time: dense weights, autograd, compiled loops.

    Where nothing has been compiled before, slots that start together would all compile the same: seven took 70 s on two
    cores, and one with six that wait for what it leaves in the compilers' caches takes 20 s.
    """
    lock = Path(os.devnull)
    # Of a user without a home; a device can be locked too.
    with contextlib.suppress(RuntimeError):
        lock = state_directory() / "warming.lock"
    with first_alone(lock):
        return _warm_holdings(job)


@contextlib.contextmanager
def first_alone(path: Path, limit_s: float = TURN_S) -> Iterator[None]:
    """Do something while nobody else of this machine does; those who come meanwhile do it when the first is done, all at once.

    Args:
        path: of a lock file; where none can be made, nobody waits.
        limit_s: seconds to wait at most for a first one that hangs.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            if not _locked(file.fileno(), fcntl.LOCK_EX):
                deadline = time.monotonic() + limit_s
                while not _locked(file.fileno(), fcntl.LOCK_SH) and time.monotonic() < deadline:
                    time.sleep(0.02)
                file.close()
        yield


def gpus_here() -> int:
    """GPUs of this machine, also those that this process does not see."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def _locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _warm_holdings(job: SlotJob) -> Holdings:
    holdings = job.holdings()
    dense = holdings.spare()
    if not job.is_serving:
        rehearse(job, dense)
        if isinstance(dense, DenseSlabs) and dense.device.type == "cuda" and (gpus := gpus_here()) > 1:
            try:
                rehearse_in_company(job, dense, gpus)
            except Exception as error:
                # No reason not to train.
                log.warning("what runs among several slots is compiled when it is needed: %s", error)
    else:
        job.engine(dense.model, _Stage(dense))
        if dense.device.type == "cpu":
            _warm_experts(dense.model)
    if dense.device.type == "cuda":
        free_memory()
        # Of the run alone: an exchange leaves as much room.
        torch.cuda.reset_peak_memory_stats()
    warm_loops(job.config.model.dse.row_dtype)
    if job.layout is not None:
        tokens_BT = torch.zeros(1, 8, dtype=torch.int64)
        job.layout.rows(job.config.model.dse.layers[0], tokens_BT)
    return holdings


def _warm_experts(model: Transformer) -> None:
    """Compile, or load compiled, what an expert shard answers with: a new one must not do that at its first request."""
    hidden, inner, dtype = model.config.hidden, model.config.moe.expert_dim, model.embedding.dtype
    slabs = (torch.zeros(1, *shape, dtype=dtype) for shape in ((2 * inner, hidden), (hidden, inner)))
    rows_R = torch.zeros(1, dtype=torch.int64)
    model.ops.expert_rows(torch.zeros(1, hidden), rows_R, [(0, 1)], *slabs)


class _Stage:
    """An exchange for an engine that is made to compile what it needs, and thrown away."""

    def __init__(self, dense: DenseState) -> None:
        self.slabs = _Slabs(dense) if isinstance(dense, DenseSlabs) else _pass_through
        self.dim = dense.model.config.dse.head_dim

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """One layer's experts, for all."""
        return self.slabs(layer, x_TH, topk_ids_TK, topk_weights_TK)

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """Zeros for every row."""
        return zero_rows(rows, self.dim)


def rehearse(job: SlotJob, dense: DenseState) -> None:
    """Open the data and run one part forward and backward, then forward alone, with stand-ins for what other slots or slabs give.

    A process takes some 0.3 s longer over its first part, and with a GPU a minute; here that delays nobody. The
    weights are left alone, and of the gradient nothing stays.

    Args:
        job: of the slot.
        dense: weights to run with.
    """
    batch, model, device = job.train_batches()(1, 0), dense.model, dense.device
    slabs = _Slabs(dense) if isinstance(dense, DenseSlabs) else None
    values = {}
    if job.layout is not None:
        for layer in job.config.model.dse.layers:
            rows = job.layout.rows(layer, batch.tokens_BT, None, batch.document_starts_BT).flatten(0, 1)
            shape = (*rows.shape, job.config.model.dse.head_dim)
            values[layer] = rows, torch.zeros(shape, device=device, dtype=model.embedding.dtype).flatten(0, 1)
    fetched = FetchedRows(
        addresses={layer: rows for layer, (rows, _) in values.items()},
        values={layer: value for layer, (_, value) in values.items()},
    ).differentiable()

    def loss() -> Tensor:
        out = model(
            batch.tokens_BT.to(device),
            experts=_pass_through if slabs is None else slabs,
            memory=None,
            document_starts_BT=batch.document_starts_BT.to(device),
            fetched=fetched,
        )
        total = cross_entropy_sum(model, out.hidden_BTH, batch.targets_BT.to(device))
        return torch.add(total, out.aux_loss)

    loss().backward()
    gradients = dense.take_gradients()
    with torch.no_grad(), collect():
        # As in evaluations, and where a step notes statistics.
        loss()
    if isinstance(dense, DenseSlabs) and slabs is not None:
        _rehearse_update(dense, [*gradients, *slabs.tensors])
        if job.layout is not None:
            _rehearse_rows(job, dense.dtype)


def _pass_through(_layer: int, x_TH: Tensor, _ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return x_TH * weights_TK.sum(-1, keepdim=True)


class _Slabs:
    """Experts of one layer that stand for those of all."""

    def __init__(self, dense: DenseSlabs) -> None:
        config, self.ops = dense.model.config, dense.ops
        E, inner, hidden = config.moe.num_experts, config.moe.expert_dim, config.hidden
        shapes = ((E, 2 * inner, hidden), (E, hidden, inner))
        self.tensors = [
            torch.zeros(shape, device=dense.device, dtype=dense.dtype, requires_grad=True) for shape in shapes
        ]

    def __call__(self, _layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gate_up, down = self.tensors
        return self.ops.experts(x_TH, ids_TK, weights_TK, gate_up, down)


@torch.no_grad()
def _rehearse_update(dense: DenseSlabs, gradients: list[Tensor]) -> None:
    """Compile the norms and the update, on tensors that are thrown away."""
    dense.ops.squared_norms(gradients, [1] * len(gradients))
    for gradient in (gradients[0], gradients[-1]):
        master = torch.zeros_like(gradient, dtype=torch.float32)
        first, second = (torch.zeros_like(gradient, dtype=dense.moments_dtype) for _ in range(2))
        dense.ops.adamw_step(
            master,
            first,
            second,
            gradient,
            copy=torch.zeros_like(gradient, dtype=dense.dtype) if dense.dtype != torch.float32 else None,
            scale=torch.ones((), device=dense.device),
            lr=0.0,
            betas=dense.adamw.betas,
            eps=dense.adamw.eps,
            weight_decay=0.0,
            step=1,
        )


def _rehearse_rows(job: SlotJob, dtype: torch.dtype) -> None:
    """Stage, train and write back rows of tiny tables, which are thrown away."""
    dse, parts = job.config.model.dse, job.config.train.logical_shards
    memory = job.memory([dse.num_buckets] * len(dse.layers))
    assert isinstance(memory, StagedMemory)
    keys = [(index, bucket) for index in range(len(dse.layers)) for bucket in range(dse.num_buckets)]
    memory.initialize(keys)
    memory.assign(keys, keys)
    part = dict.fromkeys(dse.layers, torch.zeros(1, 1, dtype=torch.int64))
    for step in (1, 2):
        memory.open_step(step, lambda _: [part] * parts)
        gradients = [torch.zeros(1, dse.head_dim, dtype=dtype, device=memory.device) for _ in dse.layers]
        for number in range(parts):
            memory.add_row_gradients(number, gradients)
        memory.norms_on_device()
        memory.apply(lr=0.0, scale=1.0)
    memory.settle()
