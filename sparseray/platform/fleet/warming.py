"""What a slot does before it is needed, so that its first step takes no longer than its second."""

import torch

from sparseray.actors.exchange.protocol import FetchedRows
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.memory import warm_loops
from sparseray.model.transformer import cross_entropy_sum
from sparseray.platform.fleet.job import SlotJob


def warm_holdings(job: SlotJob) -> Holdings:
    """Build a slot's state, empty, and touch once what is slow the first time: dense weights, autograd, compiled loops."""
    holdings = job.holdings()
    dense = holdings.spare()
    if not job.is_serving:
        rehearse(job, dense)
    warm_loops(job.config.model.dse.row_dtype)
    if job.layout is not None:
        tokens_BT = torch.zeros(1, 8, dtype=torch.int64)
        job.layout.rows(job.config.model.dse.layers[0], tokens_BT)
    return holdings


def rehearse(job: SlotJob, dense: DenseState) -> None:
    """Open the data and run one part forward and backward, with stand-ins for the other slots.

    A process takes some 0.3 s longer over its first part; here that delays nobody. The weights are left alone, and
    of the gradient nothing stays.
    """
    batch = job.train_batches()(1, 0)

    def experts(
        _layer: int, x_TH: torch.Tensor, _ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        return x_TH * weights_TK.sum(-1, keepdim=True)

    model, dim = dense.model, job.config.model.dse.head_dim
    hashed = model.memory_rows(batch.tokens_BT, batch.document_starts_BT)
    values = {layer: torch.zeros(rows.numel(), dim) for layer, rows in hashed.items()}
    fetched = FetchedRows(addresses=hashed, values=values).differentiable()
    starts = batch.document_starts_BT
    out = model(batch.tokens_BT, experts=experts, memory=None, document_starts_BT=starts, fetched=fetched)
    loss = cross_entropy_sum(model, out.hidden_BTH, batch.targets_BT) + out.aux_loss
    loss.backward()
    dense.take_gradient()
