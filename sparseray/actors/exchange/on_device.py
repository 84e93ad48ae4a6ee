"""All roles in this slot, in slabs on one device: the exchange of a GPU, and of bf16 on a CPU.

A MoE layer is one operation over its slabs, gradients stay where the backward pass leaves them, and nothing is read
by the host before the step's end: then one copy brings every squared norm. Memory rows of a step are staged on the
device while the one before it computes, and trained there (state/staged_memory.py). Twin of local.py, whose bits are
those of messages.

Shapes: T tokens, K experts per token, H hidden, N table rows per token, D row width.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseray.actors.exchange.protocol import Abortable, Fetch, FetchedRows, PartGradients, Recording, Run
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.state.staged_memory import Addresses, StagedMemory
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Prepared


class OnDeviceExchange(Abortable):
    """`Exchange` of a slot that has everything on one device.

    Args:
        dense, experts: all weights.
        memory: all tables; None for a model without.
        mailbox: of the slot; the scheduler is told of the step's end.
    """

    is_alone, launches_beside = True, False

    def __init__(
        self, dense: DenseSlabs, experts: SlabExperts, memory: StagedMemory | None, mailbox: Mailbox
    ) -> None:
        super().__init__()
        self.dense, self.whole, self.memory, self.mailbox = dense, experts, memory, mailbox
        self.index = {layer: index for index, layer in enumerate(experts.config.moe_layers)}
        self._fetches: list[Fetch] = []
        self._norms: ToHost | None = None

    def begin(self, step: int, part: int) -> None:
        """Nothing depends on the part here.

        Args:
            step: whose commit comes next.
            part: of the global batch; -1 for none.
        """

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k of weight * expert(x), [T, H].

        Args:
            layer: 0-based model layer.
            x_TH: inputs, in the slabs' dtype.
            topk_ids_TK: int64, chosen experts.
            topk_weights_TK: fp32, their weights.
        """
        self.check()
        slabs = self.whole.weights(self.index[layer])
        return self.dense.ops.experts(x_TH, topk_ids_TK, topk_weights_TK, *slabs)

    def leaves(self) -> list[Tensor]:
        """What a backward pass leaves gradients at: every dense parameter, then both slabs of every MoE layer."""
        slabs = [slab for index in self.index.values() for slab in self.whole.weights(index)]
        return [*self.dense.parameters, *slabs]

    def built_in(self) -> tuple[object, ...]:
        """Nothing but what the leaves say."""
        return ()

    def recorded(self, run: Run, record: Callable[[Run], Recording]) -> Recording:
        """Nobody else takes part.

        Args:
            run, record: as in `Recordable`.
        """
        return record(run)

    @property
    def sum_bytes(self) -> int:
        """As in `Recordable`."""
        return 4 * self.dense.sum.num_slabs * sum(leaf.numel() for leaf in self.leaves())

    def prefetch(self, rows: Addresses) -> FetchedRows:
        """Read rows of all memory layers as the last commit left them, and send them to the device, without a wait for it.

        Args:
            rows: int64 [T, N] by 0-based model layer, on the CPU.
        """
        self.check()
        if self.memory is None:
            return FetchedRows(addresses={}, values={})
        started, values = time.perf_counter(), {}
        for index, (layer, rows_TN) in enumerate(rows.items()):
            found = self.memory.gather(index, rows_TN.reshape(-1))
            values[layer] = found.to(self.dense.device, non_blocking=True).to(self.dense.dtype)
        addressed = sum(rows_TN.numel() for rows_TN in rows.values())
        self._note(started, addressed, addressed)
        return FetchedRows(addresses=rows, values=values)

    def fetch(self, step: int, addresses: Callable[[int], Sequence[Addresses]]) -> list[FetchedRows]:
        """Take the rows of a training step, which were staged during the one before it.

        Args:
            step: that begins.
            addresses: of the parts of any step.
        """
        self.check()
        assert self.memory is not None
        started = time.perf_counter()
        staged = self.memory.open_step(step, addresses)
        found = [
            FetchedRows(
                addresses=part,
                values={
                    layer: self.dense.ops.take_rows(rows.weight_UD, rows.places[index]).to(self.dense.dtype)
                    for layer, rows in zip(part, staged.layers)
                },
            )
            for index, part in enumerate(staged.parts)
        ]
        addressed = sum(rows_TN.numel() for part in staged.parts for rows_TN in part.values())
        self._note(started, addressed, staged.num_rows)
        return found

    def _note(self, started: float, addressed: int, read: int) -> None:
        seconds = time.perf_counter() - started
        self._fetches.append(Fetch(addressed=addressed, rows_by_tier={"local": read}, seconds=seconds))

    def reduce(self, step: int, part: int, gradients: PartGradients) -> None:
        """Add a part's gradients to the sums that lie here; after the last part, send the norms on their way.

        Args:
            step: that is open.
            part: that the gradients are of.
            gradients: on the device: dense ones and those of table rows.
        """
        self.check()
        # A recording of the part writes the next one's to the same places.
        self.dense.sum.add(part, gradients.dense, lent=True)
        self.whole.sum.add(part, self.whole.take_gradients(), lent=True)
        if self.memory is not None:
            self.memory.add_row_gradients(part, [gradient for _, gradient in gradients.rows])
        if self.dense.is_reduced:
            of_tables = [] if self.memory is None else self.memory.norms_on_device()
            self._norms = ToHost(step_norms(self.dense, self.whole, of_tables))

    def conclude(self, step: int) -> None:
        """Tell the scheduler of every role's norms, which one copy brings from the device.

        Args:
            step: whose parts are all reduced.
        """
        self.check()
        assert self._norms is not None
        of_roles = norms_by_role(self.dense, self.whole, self._norms.read().tolist())
        self._norms = None
        for role, found in zip(("dense", "expert", "memory"), of_roles):
            if role != "memory" or self.memory is not None:
                # A thousand names would take longer to travel than the device takes for a layer, and it waits.
                norms = {f"{role}.{i}": value for i, value in enumerate(exact_sum(found))}
                self.mailbox.post(SCHEDULER, Prepared(role=role, norms=norms, digests={}), step=step)

    def take_fetches(self) -> list[Fetch]:
        """Return what was fetched since the last call."""
        found, self._fetches = self._fetches, []
        return found


class ToHost:
    """Numbers on their way to the host through pinned memory.

    A copy to other memory waits inside the driver for what the device has to do before it, and calls of other
    threads wait with it: staging would stand still until the step's end.

    Args:
        values: on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._sent = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def read(self) -> Tensor:
        """The numbers, once they are here."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._values


def _with_rows(experts: SlabExperts) -> list[Tensor]:
    return [gradient for gradient in experts.sum.total or [] if gradient.shape[0]]


def step_norms(dense: DenseSlabs, experts: SlabExperts, further: Sequence[Tensor]) -> Tensor:
    """Squared norms of the step's gradients, on the device: of dense tensors, of rows of the experts' slabs, and further ones.

    Args:
        dense, experts: with their gradients; a slot that holds no dense weights has none of those.
        further: fp32, of other gradients.
    """
    of_dense, of_experts = dense.sum.total or [], _with_rows(experts)
    rows = [1] * len(of_dense) + [gradient.shape[0] for gradient in of_experts]
    return torch.cat([dense.ops.squared_norms([*of_dense, *of_experts], rows), *further])


def norms_by_role(
    dense: DenseSlabs, experts: SlabExperts, norms: Sequence[float]
) -> tuple[list[float], list[float], list[float]]:
    """Those of dense tensors, of the experts that are held, and the further ones.

    Args:
        dense, experts: as they were given to `step_norms`.
        norms: what that found.
    """
    count = len(dense.sum.total or [])
    end = count + sum(gradient.shape[0] for gradient in _with_rows(experts))
    return list(norms[:count]), experts.expert_norms(norms[count:end]), list(norms[end:])


def exact_sum(values: Sequence[float]) -> list[float]:
    """A few numbers whose sum is that of the values to the last bit: summed with others they are rounded but once.

    Args:
        values: any; where the sum is no finite number, it is all that comes back.

    Source: Shewchuk 1997, whose expansions `math.fsum` rounds at the end; each round here is what the last one left.
    """
    found: list[float] = []
    while rest := math.fsum([*values, *(-value for value in found)]):
        found.append(rest)
        if not math.isfinite(rest):
            break
    return found
