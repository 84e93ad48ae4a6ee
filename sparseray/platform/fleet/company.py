"""Steps of training in company, before a slot serves: what runs only among several slots is compiled, or loaded, then.

The slot is one of several, and nobody is the others: their memory is a second buffer here, their words say that they have
come to everything. All layers share the experts of one. Without this the first change from one GPU to two stands still for as
long as a dozen kernels are compiled, ten seconds, in both slots; without the shares that slots have while they come and go
one after another, for a second and a half.
"""

import time
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from sparseray.actors.exchange.by_message import MessageExchange
from sparseray.actors.exchange.protocol import FetchedRows, Observe
from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.peers.link import COUNT_BITS, HostLink, Link, word_of
from sparseray.actors.peers.peers import sizes_of
from sparseray.actors.peers.regions import Regions
from sparseray.actors.peers.table import Table
from sparseray.actors.peers.token_exchange import FEW
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.training.worker import AttentionWorker
from sparseray.log import get_logger
from sparseray.platform.config import RunConfig
from sparseray.platform.fleet.freeing import free_memory
from sparseray.platform.fleet.job import SlotJob

log = get_logger(__name__)

STEPS = 2
"""From the second on the host may not count rows any more (TokenExchange.settle)."""
Shares = tuple[int, int]
"""How many slots have experts, and how many run parts."""
DEADLINE_S = 60.0


class _Nobody:
    """In the place of a slot's mailbox: nothing comes, and what is posted is for nobody."""

    slot, generation = 0, 1

    def serve_until(
        self, condition: Callable[[], bool], _deadline_s: float, _serve: object, poll_s: float
    ) -> bool:
        """As of `SlotMailbox`."""
        while not condition():
            time.sleep(poll_s)
        return True

    def post(self, *_to: object, **_of: object) -> int:
        """As of `SlotMailbox`."""
        return 0


def zero_rows(rows: dict[int, Tensor], dim: int) -> FetchedRows:
    """Zeros for every row of tables that nobody has.

    Args:
        rows: addresses by 0-based model layer.
        dim: width of a row.
    """
    values = {layer: torch.zeros(at.numel(), dim) for layer, at in rows.items()}
    return FetchedRows(addresses=rows, values=values)


class _NoRows:
    """In the place of memory shards: zeros for every row."""

    def __init__(self, dim: int) -> None:
        self.dim, self.call = dim, SimpleNamespace(mailbox=_Nobody())
        self.reduction = SimpleNamespace(send_rows=lambda *_: None)

    def begin(self, step: int, part: int) -> None:
        """As of `MessageExchange`."""

    def owner_of(self, layer: int, rows_N: object) -> None:
        """As of `MessageExchange`."""

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """As of `MessageExchange`."""
        return zero_rows(rows, self.dim)


def rehearse_in_company(job: SlotJob, dense: DenseSlabs, slots: int = 2) -> None:
    """Run steps as one of several slots, of which nothing stays.

    Args:
        job: of the slot.
        dense: weights to run with; they are left alone.
        slots: that there may be.
    """
    for index, shares in enumerate(distinct_shares(job.config, slots)):
        try:
            _rehearse(job, dense, shares, 1 if index else STEPS)
        except torch.OutOfMemoryError as error:
            # No reason not to train, nor not to rehearse those that take less.
            log.warning("what %d and %d slots run is compiled when it is needed: %s", *shares, error)
        free_memory()


def distinct_shares(config: RunConfig, slots: int) -> list[Shares]:
    """Shares that between them run every kernel that any do.

    Kernels are compiled for how many rows of a token come back, and for the groups that rows are sorted into, in powers of two;
    another one gives tokens where many slots have experts.

    Args:
        config: of the run.
        slots: that there may be.
    """
    experts, is_fast = config.model.moe.num_experts, config.determinism == "fast"
    found: dict[tuple[int, int], Shares] = {}
    both = [(2, 2), *product(range(1, slots + 1), range(1, min(slots, config.train.logical_shards) + 1))]
    for owners, sources in both:
        sets = 1 if is_fast else sources
        for held in {experts // owners, -(-experts // owners)}:
            if max(owners, sources) > 1:
                key = owners if is_fast else int(owners >= FEW), (sets * held).bit_length()
                found.setdefault(key, (owners, sources))
    return list(dict.fromkeys(found.values()))


def _rehearse(job: SlotJob, dense: DenseSlabs, shares: Shares, steps: int) -> None:
    exchange = in_company(job, dense, lambda *_, **__: None, shares)
    worker, batches, plan = AttentionWorker(dense, exchange), job.train_batches(), exchange.plan
    # What a recording holds is launched before it, too.
    worker.graph = None
    try:
        for step in range(1, steps + 1):
            exchange.expect(list(enumerate(plan.part_owners)), trains=True)
            worker.run_step(step, plan.parts_of(0), batches, lambda _part, _done: None)
            dense.discard()
            exchange.held.discard()
    finally:
        dense.discard()
        # Moments, which the exchange makes early.
        dense.begin_load(0, with_optimizer=False)
    if dense.device.type == "cuda":
        torch.cuda.synchronize(dense.device)


def in_company(job: SlotJob, dense: DenseSlabs, observe: Observe, shares: Shares = (2, 2)) -> DeviceExchange:
    """The exchange of the first of several slots, with experts whose weights are zero.

    Args:
        job: of the slot.
        dense: its weights.
        observe: metrics of the slot.
        shares: of the slots.
    """
    config, (sequences, length) = job.config, job.part_shape
    plan = _plan(config, shares)
    held = _experts(job, plan)
    sizes = sizes_of(plan, dense, sequences * length)
    own, theirs = (torch.zeros(sizes.num_bytes, dtype=torch.uint8, device=dense.device) for _ in range(2))
    # Nobody reads what goes to the others.
    regions = {slot: sizes.cut(theirs if slot else own) for slot in plan.addresses}
    _fill(regions[0], config.model.moe.num_experts)
    rows = cast(MessageExchange, _NoRows(config.model.dse.head_dim))
    table, link = Table(slots=tuple(regions), regions=regions), _link(dense.device, tuple(regions))
    return DeviceExchange(plan, dense, held, table, link, rows, job.part_shape, observe)


def _plan(config: RunConfig, shares: Shares) -> Plan:
    """The first slots have as many experts each, and run as many parts; every piece twice where the run has it so."""
    (owners, sources), parts, experts = shares, config.train.logical_shards, config.model.moe.num_experts
    slots, holders = max(shares), [e * owners // experts for e in range(experts)]
    twice = config.cluster.replication > 1
    pieces = [(slot, (slot + 1) % slots)[: 1 + twice] for slot in holders]
    return Plan(
        generation=1,
        addresses=dict.fromkeys(range(slots), ""),
        part_owners=tuple(part * sources // max(sources, parts) for part in range(parts)),
        dense=tuple(range(max(sources, 1 + twice))),
        experts=(tuple(pieces),) * len(config.model.moe_layers),
        buckets=(),
    )


def _experts(job: SlotJob, plan: Plan) -> SlabExperts:
    """Those of the plan's first slot; all layers lie in one place."""
    held = job.experts()
    assert isinstance(held, SlabExperts)
    owned = plan.experts_of(0)
    held.slabs = held.slabs[:1] * len(held.slabs)
    for slab in held.slabs[:1]:
        slab.take(expert for layer, expert in owned if layer == 0)
        for weights in slab.weights:
            weights.zero_()
    held.assign(owned, [key for key in owned if plan.computing(*key) == (0,)])
    return held


def _fill(own: Regions, num_experts: int) -> None:
    """The other has sent tokens for all experts alike, and has come to every word there is."""
    own.ids_STK.copy_((torch.arange(own.ids_STK.numel()) % num_experts).view(own.ids_STK.shape))
    own.flags_S.fill_(word_of(_Nobody.generation, (1 << COUNT_BITS) - 1))


def _link(device: torch.device, slots: tuple[int, ...]) -> Link:
    mailbox: Any = _Nobody()

    def serve(_message: object) -> None:
        """Nothing comes."""

    if device.type == "cpu":
        return HostLink(mailbox, serve, DEADLINE_S, slots)
    from sparseray.actors.peers.device_link import DeviceLink  # and Triton, which a CPU does without
    from sparseray.kernels import peer

    signs = peer.new_state(device), peer.new_end(device)
    return DeviceLink(mailbox, serve, DEADLINE_S, slots, signs)
