"""All roles in this slot, in slabs on one device: the exchange of a GPU, and of bf16 on a CPU.

A MoE layer is one operation over its slabs, gradients stay where the backward pass leaves them, and nothing is read
by the host before the step's end: then one copy brings every squared norm. Memory rows come from tables in host
memory and their gradients go back there. Twin of local.py, whose bits are those of messages.

Shapes: T tokens, K experts per token, H hidden, N table rows per token, D row width.
"""

import time
from collections.abc import Callable

from torch import Tensor

from sparseray.actors.exchange.protocol import Abortable, Fetch, FetchedRows, PartGradients
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Prepared
from sparseray.kernels.dse.cpu import segment_sum_rows


class OnDeviceExchange(Abortable):
    """`Exchange` of a slot that has everything on one device.

    Args:
        dense, experts: all weights.
        holdings: of the slot, with the memory tables.
        mailbox: of the slot; the scheduler is told of the step's end.
    """

    def __init__(self, dense: DenseSlabs, experts: SlabExperts, holdings: Holdings, mailbox: Mailbox) -> None:
        super().__init__()
        self.dense, self.whole, self.memory, self.mailbox = dense, experts, holdings.memory, mailbox
        self.index = {layer: index for index, layer in enumerate(experts.config.moe_layers)}
        self._fetches: list[Fetch] = []

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

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """Read rows of all memory layers and send them to the device.

        Args:
            rows: int64 [T, N] by 0-based model layer, on the CPU.
        """
        self.check()
        if self.memory is None:
            return FetchedRows(addresses={}, values={})
        started, values = time.perf_counter(), {}
        for index, (layer, rows_TN) in enumerate(rows.items()):
            found = self.memory.gather(index, rows_TN.reshape(-1))
            values[layer] = found.to(self.dense.device).to(self.dense.dtype)
        addressed = sum(rows_TN.numel() for rows_TN in rows.values())
        seconds = time.perf_counter() - started
        self._fetches.append(Fetch(addressed=addressed, rows_by_tier={"local": addressed}, seconds=seconds))
        return FetchedRows(addresses=rows, values=values)

    def reduce(self, step: int, part: int, gradients: PartGradients) -> None:
        """Add a part's gradients to the sums that lie here; after the last part, read the norms.

        Args:
            step: that is open.
            part: that the gradients are of.
            gradients: on the device: dense ones and those of table rows.
        """
        self.check()
        self.dense.sum.add(part, gradients.dense)
        self.whole.sum.add(part, self.whole.take_gradients())
        if self.memory is not None:
            sums = [segment_sum_rows(at.numpy(), g.float().cpu().numpy()) for at, g in gradients.rows]
            self.memory.add_gradients(part, sums)
        if self.dense.is_reduced:
            self._prepared(step)

    def _prepared(self, step: int) -> None:
        """Tell the scheduler of every role's norms, which one copy brings from the device."""
        of_dense, of_experts = step_norms(self.dense, self.whole, lambda norms: norms.tolist())
        self._post(step, "dense", of_dense)
        self._post(step, "expert", of_experts)
        if self.memory is not None:
            self._post(step, "memory", self.memory.norms())

    def _post(self, step: int, role: str, norms: dict[str, float]) -> None:
        self.mailbox.post(SCHEDULER, Prepared(role=role, norms=norms, digests={}), step=step)

    def take_fetches(self) -> list[Fetch]:
        """Return what was fetched since the last call."""
        found, self._fetches = self._fetches, []
        return found


def step_norms(
    dense: DenseSlabs, experts: SlabExperts, read: Callable[[Tensor], list[float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Squared norms of the step's gradients, by name: of dense tensors, and of the experts computed here.

    Args:
        dense, experts: with their gradients; a slot that holds no dense weights has none of those.
        read: brings them to the host, all in one copy.
    """
    of_dense, of_experts = dense.sum.total or [], experts.sum.total or []
    rows = [1] * len(of_dense) + [gradient.shape[0] for gradient in of_experts if gradient.shape[0]]
    there = [gradient for gradient in of_experts if gradient.shape[0]]
    norms = read(dense.ops.squared_norms([*of_dense, *there], rows))
    count = len(of_dense)
    return dict(zip(dense.names, norms[:count])), experts.norms_by_expert(norms[count:])
