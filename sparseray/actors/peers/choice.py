"""Which exchange a slot has in a generation: it follows from what it holds, and from who else there is."""

import torch

from sparseray.actors.exchange.by_message import Caller, MessageExchange
from sparseray.actors.exchange.local import LocalExchange
from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.exchange.patience import Patience
from sparseray.actors.exchange.protocol import Exchange, Observe
from sparseray.actors.exchange.reduction import Reduction
from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.peers.collective_link import CollectiveLink
from sparseray.actors.peers.in_rounds import (
    NOBODY,
    HostLayers,
    Layers,
    RoundsExchange,
    is_in_rounds,
    round_sizes,
)
from sparseray.actors.peers.link import HostLink, Link
from sparseray.actors.peers.peers import Peers, sizes_of
from sparseray.actors.peers.table import Table
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.state.staged_memory import StagedMemory


def is_in_step(plan: Plan, held: Holdings, slot: int, *, trains: bool) -> bool:
    """Whether a slot exchanges in step with others: all of them compute in slabs, and need each other.

    Who trains needs others that hold the same, for gradients meet; an engine needs those who have what it has not.

    Args:
        plan: of the generation.
        held: by the slot.
        slot: its id.
        trains: whether gradients are summed.
    """
    needs = plan.holders != {slot} if trains else is_in_rounds(plan)
    return isinstance(held.experts, SlabExperts) and slot in plan.peers and needs


def lay_open(peers: Peers, plan: Plan, held: Holdings, part_shape: tuple[int, int], *, trains: bool) -> None:
    """Have the memory ready that a plan's slots write to here, before one of them asks for it.

    Args:
        peers: of the slot.
        plan: of the generation.
        held: by the slot.
        part_shape: sequences of a part, and tokens of each.
        trains: whether gradients are summed.
    """
    if not trains:
        device = held.experts.device
        peers.prepare(round_sizes(held.experts, part_shape[0] * part_shape[1]), device)
        peers.own.ids_STK.fill_(NOBODY)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return
    dense = held.dense or held.spare()
    assert isinstance(dense, DenseSlabs)
    peers.prepare(sizes_of(plan, dense, part_shape[0] * part_shape[1]), dense.device)


def exchange_of(
    plan: Plan,
    held: Holdings,
    call: Caller,
    reduction: Reduction,
    *,
    peers: Peers,
    part_shape: tuple[int, int],
    observe: Observe,
    patience: Patience | None,
    trains: bool,
) -> Exchange | None:
    """How a slot reaches experts and rows of what it holds; None where it answers others and asks for nothing.

    Args:
        plan: of the generation.
        held: by the slot.
        call: asks other slots.
        reduction: of the gradients that meet here.
        peers, part_shape: as in `lay_open`.
        observe: metrics of the slot.
        patience: with peers whose answers change no state.
        trains: as in `is_in_step`.
    """
    me, experts, memory = call.mailbox.slot, held.experts, held.memory
    in_step = is_in_step(plan, held, me, trains=trains)
    if not plan.parts_of(me) and not in_step:
        return None
    if in_step and not trains:
        assert isinstance(experts, SlabExperts) and memory is None
        table = peers.introduce(plan, call, experts.device)
        layers = _layers(plan, call, experts, peers, table)
        return RoundsExchange(layers, experts, call.mailbox, [s for s in table.slots if s != me], experts.ops)
    if not in_step and isinstance(held.dense, DenseSlabs) and isinstance(experts, SlabExperts):
        assert memory is None or isinstance(memory, StagedMemory)
        return OnDeviceExchange(held.dense, experts, memory, call.mailbox)
    if not in_step and plan.holders == {me}:
        return LocalExchange(held, reduction, me, observe)
    by_message = MessageExchange(
        plan,
        call,
        reduction,
        moe_layers=experts.config.moe_layers,
        memory_layers=() if memory is None else memory.layers,
        bounds=() if memory is None else memory.bounds,
        patience=patience,
    )
    if not in_step:
        return by_message
    dense = held.dense or held.spare()
    assert isinstance(dense, DenseSlabs) and isinstance(experts, SlabExperts)
    table = peers.introduce(plan, call, dense.device)
    link = _link(call, peers, table.slots)
    return DeviceExchange(plan, dense, experts, table, link, by_message, part_shape, observe)


def _layers(plan: Plan, call: Caller, experts: SlabExperts, peers: Peers, table: Table) -> Layers:
    me = call.mailbox.slot
    if peers.signs is None:
        return HostLayers(plan, experts, table, _link(call, peers, table.slots), me, experts.ops)
    from sparseray.actors.peers.device_rounds import DeviceLayers, RoundTables  # and Triton, as below

    peers.tables = peers.tables or RoundTables(experts, peers.signs)
    peers.tables.enter(plan, experts, table, me, call.mailbox.generation)
    is_owner = me in plan.expert_primaries
    layers = DeviceLayers(experts, peers.tables, table, me, is_owner=is_owner, deadline_s=call.deadline_s)
    layers.capture()
    return layers


def _link(call: Caller, peers: Peers, slots: tuple[int, ...]) -> Link:
    if peers.group is not None:
        return CollectiveLink(call.mailbox, call.serve, call.deadline_s, slots, peers.group, peers.own_bytes)
    if peers.signs is None:
        return HostLink(call.mailbox, call.serve, call.deadline_s, slots)
    from sparseray.actors.peers.device_link import DeviceLink  # and Triton, which a CPU does without

    return DeviceLink(call.mailbox, call.serve, call.deadline_s, slots, peers.signs)
