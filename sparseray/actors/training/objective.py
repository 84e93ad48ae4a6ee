"""What a batch is trained for: one forward pass and its loss, in a step and in an evaluation alike.

Called by worker.py for each part. A loss is a sum over tokens, each with its weight; what it is divided by is the sum
of the weights of the whole global batch, which the batch source knows before any backward pass.

Shapes: B sequences, T tokens, L MoE layers, E experts.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sparseray.actors.exchange.protocol import Exchange
from sparseray.model.dse import Rows
from sparseray.model.transformer import Transformer, cross_entropy_sum


class Batch(Protocol):
    """One part's tokens of one step, [B, T]: int64 tokens and targets (-1 is ignored), bool starts of documents."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...
    @property
    def weights_BT(self) -> Tensor | None:
        """fp32, 0 where the target is ignored; None means ones."""

    @property
    def document_starts_BT(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """A `Batch` whose tensors lie on the model's device."""

    tokens_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor | None
    document_starts_BT: Tensor


def on_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Send a batch on its way to a device, without waiting for it.

    Args:
        batch: on the CPU.
        device: of the model.
    """
    weights_BT = batch.weights_BT
    return DeviceBatch(
        tokens_BT=send(batch.tokens_BT, device),
        targets_BT=send(batch.targets_BT, device),
        weights_BT=None if weights_BT is None else send(weights_BT, device),
        document_starts_BT=send(batch.document_starts_BT, device),
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor of the host to a device; pinned first, or the copy would wait for what the device has to do.

    Args:
        tensor: of any shape and dtype.
        device: where to; a tensor that is there already comes back as it is.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class BatchSource(Protocol):
    """Data as a pure function of (step, part)."""

    def __call__(self, step: int, part: int) -> Batch: ...

    def weight(self, step: int) -> float:
        """Sum of the weights of all parts of a step; every worker gets the same."""
        ...


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one part's forward pass gave.

    Args:
        sum: fp32 scalar, weighted sum of the tokens' losses; differentiable.
        weight: sum of the weights.
        aux: fp32 scalar, balance losses with their coefficients; differentiable.
        counts_LE: int64, tokens per moe layer and expert.
        further: fp32 scalar, what is trained for beside `sum` and divided like it; differentiable. None for nothing.
        metrics: further losses by name, fp32 scalars, for people; means over the part's tokens. The step's record has
            their mean.
    """

    sum: Tensor
    weight: float
    aux: Tensor
    counts_LE: Tensor
    further: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def backward(self, weight: float, num_parts: int) -> None:
        """Run the backward pass of this part's share in the step's loss.

        Args:
            weight: of the whole global batch.
            num_parts: of the step.
        """
        total = self.sum if self.further is None else self.sum + self.further
        (total / weight + self.aux / num_parts).backward()


class Objective(Protocol):
    """One forward pass and its loss."""

    def __call__(
        self, model: Transformer, batch: Batch, exchange: Exchange, fetched: Rows, *, step: int | None
    ) -> Loss:
        """Run the model on a batch whose table rows were fetched.

        Args:
            model: dense weights.
            batch: of one part.
            exchange: answers for experts.
            fetched: the batch's table rows.
            step: of training; None in an evaluation, which asks for `sum` and `weight` alone.
        """
        ...


def next_token(
    model: Transformer, batch: Batch, exchange: Exchange, fetched: Rows, *, step: int | None
) -> Loss:
    """Cross-entropy of the next token, in nats; in training also of further tokens, where the model predicts them.

    Args:
        model, batch, exchange, fetched, step: as in `Objective`.
    """
    out = model(
        batch.tokens_BT,
        experts=exchange.experts,
        memory=None,
        document_starts_BT=batch.document_starts_BT,
        fetched=fetched,
    )
    weights_BT = batch.weights_BT
    loss = Loss(
        sum=cross_entropy_sum(model, out.hidden_BTH, batch.targets_BT, weights_BT),
        weight=float(batch.targets_BT.numel()) if weights_BT is None else float(weights_BT.double().sum()),
        aux=out.aux_loss,
        counts_LE=out.expert_counts_LE,
    )
    if step is None or not model.mtp:
        return loss
    return _with_further_tokens(loss, model, batch, exchange, out.hidden_BTH, step)


def _with_further_tokens(
    loss: Loss, model: Transformer, batch: Batch, exchange: Exchange, hidden_BTH: Tensor, step: int
) -> Loss:
    """Add the losses of the modules that predict further tokens: `mtp_1` is of the token after the next one.

    A place counts where no token that its modules read begins a document: what they go on from knows nothing of it.

    Args:
        loss: of the next token.
        model, batch, exchange, step: as in `Objective`.
        hidden_BTH: of the network.

    Source: arXiv 2412.19437 eq. 24 and 25; the sums are divided by the weight of all next tokens, as T is there.
    """
    sums, metrics = [], dict[str, Tensor]()
    aux, counts = loss.aux, [loss.counts_LE]
    documents_BT = batch.document_starts_BT.long().cumsum(1)
    for k, out in enumerate(model.predictions(batch.tokens_BT, hidden_BTH, exchange.experts), 1):
        is_other_BT = documents_BT[:, k:] != documents_BT[:, :-k]
        targets_BT = batch.targets_BT[:, k:].masked_fill(is_other_BT, -1)
        weights_BT = None if batch.weights_BT is None else batch.weights_BT[:, k:]
        found = cross_entropy_sum(model, out.hidden_BTH, targets_BT, weights_BT)
        counted_BT = (targets_BT >= 0) * (1.0 if weights_BT is None else weights_BT)
        sums.append(found)
        metrics[f"mtp_{k}"] = found.detach() / counted_BT.sum().clamp(min=1e-9)
        aux = aux + out.aux_loss
        counts.append(out.expert_counts_LE)
    factor = model.config.mtp.weight_at(step) / len(sums)
    return replace(
        loss, aux=aux, counts_LE=torch.cat(counts), further=torch.stack(sums).sum() * factor, metrics=metrics
    )
