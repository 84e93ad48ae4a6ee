"""What a batch is trained for: one forward pass and its loss, in a step and in an evaluation alike.

Called by worker.py for each part. A loss is a sum over tokens, each with its weight; what it is divided by is the sum
of the weights of the whole global batch, which the batch source knows before any backward pass.

Shapes: B sequences, T tokens, L MoE layers, E experts.
"""

from dataclasses import dataclass, field
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
        metrics: further losses by name, for people; means over the part's tokens. The step's record has their mean.
    """

    sum: Tensor
    weight: float
    aux: Tensor
    counts_LE: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """One forward pass and its loss."""

    def __call__(self, model: Transformer, batch: Batch, exchange: Exchange, fetched: Rows) -> Loss:
        """Run the model on a batch whose table rows were fetched."""
        ...


def next_token(model: Transformer, batch: Batch, exchange: Exchange, fetched: Rows) -> Loss:
    """Cross-entropy of the next token, in nats.

    Args:
        model: dense weights.
        batch: of one part.
        exchange: answers for experts.
        fetched: the batch's table rows.
    """
    out = model(
        batch.tokens_BT,
        experts=exchange.experts,
        memory=None,
        document_starts_BT=batch.document_starts_BT,
        fetched=fetched,
    )
    weights_BT = batch.weights_BT
    return Loss(
        sum=cross_entropy_sum(model, out.hidden_BTH, batch.targets_BT, weights_BT),
        weight=float(batch.targets_BT.numel()) if weights_BT is None else float(weights_BT.double().sum()),
        aux=out.aux_loss,
        counts_LE=out.expert_counts_LE,
    )
