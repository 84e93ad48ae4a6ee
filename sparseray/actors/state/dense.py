"""The dense weights of the model with their optimizer: what every attention worker holds a replica of.

Stands at both ends of a step: the attention worker reads the weights, and after COMMIT every
holder applies the same reduced gradient (DESIGN of a step: docs/architecture.md).
"""

import copy
from zlib import crc32

import torch
from torch import Tensor, nn

from sparseray.actors.state.adamw import EXP_AVG, EXP_AVG_SQ, AdamW
from sparseray.actors.state.tree import TreeSum
from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import DSELayout
from sparseray.model.transformer import Transformer


class Twin:
    """A replica's weights once more, with gradients of their own: parts beside one another do not meet in them.

    Args:
        model: whose weights and buffers are shared.
    """

    def __init__(self, model: Transformer) -> None:
        shared: dict[int, object] = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
        shared |= {id(kept): kept for kept in (*model.buffers(), model.config, model.layout, model.ops)}
        self.model = copy.deepcopy(model, shared)
        self.parameters = list(self.model.parameters())

    def take_gradients(self) -> list[Tensor]:
        """As of `DenseState`."""
        return _take_gradients(self.parameters)


def _take_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return [flat]


class DenseState:
    """Dense parameters, router biases and AdamW moments of one replica.

    Args:
        config: the model.
        layout: DSE identity, None without memory layers.
        seed: initialisation seed.
        num_parts: logical parts of a step.
        betas, eps, weight_decay: of `AdamW`.
        ops: what the model computes with.
        recompute: as in `Transformer`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: DSELayout | None,
        *,
        seed: int,
        num_parts: int,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ops: Ops = REFERENCE,
        recompute: bool = False,
    ) -> None:
        self.model = Transformer(config, layout, seed=seed, ops=ops, recompute=recompute)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = list(self.model.parameters())
        self.biases = {name: b for name, b in self.model.named_buffers() if name.endswith("router_bias")}
        self.num_parts, self.device = num_parts, torch.device("cpu")
        self.adamw = AdamW(betas=betas, eps=eps, weight_decay=weight_decay)
        self.reduced: Tensor | None = None
        self.tree = self._new_tree()

    def _new_tree(self) -> TreeSum[Tensor]:
        return TreeSum(self.num_parts, lambda left, right: left.add_(right))

    def take_gradients(self) -> list[Tensor]:
        """Flatten the parameters' gradients of one logical part and clear them; one tensor, fp32 [P]."""
        return _take_gradients(self.parameters)

    def norms(self) -> dict[str, float]:
        """Squared norm of the reduced gradient of every parameter, by name."""
        return {
            name: float(torch.linalg.vector_norm(part)) ** 2
            for name, part in zip(self.names, self.cut(self.reduced_gradient))
        }

    def digest(self) -> int:
        """CRC-32 of the reduced gradient, to compare replicas."""
        return crc32(self.reduced_gradient.cpu().numpy().data)

    @property
    def reduced_gradient(self) -> Tensor:
        """The gradient summed over all logical parts."""
        assert self.reduced is not None, "no reduced gradient yet"
        return self.reduced

    @property
    def is_reduced(self) -> bool:
        """Whether the gradient of the step is complete."""
        return self.reduced is not None

    def apply(self, *, lr: float, scale: float, counts_LE: Tensor) -> None:
        """Update the weights and the router biases once; forgets the gradient.

        Args:
            lr: learning rate of this step.
            scale: factor on the gradient (global-norm clipping).
            counts_LE: int64, tokens per expert over the whole global batch.
        """
        self.adamw.step(self.parameters, self.cut(self.reduced_gradient.mul_(scale)), lr=lr)
        if counts_LE.numel():
            self.model.update_router_bias(counts_LE)
        self.discard()

    def pass_over(self) -> None:
        """Count a step whose gradient is dropped."""
        self.adamw.pass_over(self.parameters)
        self.discard()

    def discard(self) -> None:
        """Forget the gradients of the step; the weights stay."""
        self.reduced, self.tree = None, self._new_tree()
        for parameter in self.parameters:
            parameter.grad = None

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Views of all parameters' shapes, one after another."""
        parts = torch.split(flat, [p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters)]

    def tensor_names(self, *, with_optimizer: bool = True) -> list[str]:
        """Logical names of everything that `tensors` gives."""
        suffixes = ("", EXP_AVG, EXP_AVG_SQ) if with_optimizer else ("",)
        return [*self.biases, *(name + suffix for name in self.names for suffix in suffixes)]

    def tensors(self, *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by logical name; on request without the moments."""
        found: dict[str, Tensor] = {name: p.detach() for name, p in zip(self.names, self.parameters)}
        found |= self.biases
        return found | (self.adamw.tensors(self.names, self.parameters) if with_optimizer else {})

    def begin_load(self, step: int, *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Tensors to fill, as `tensors` gives them; they count from `end_load` on.

        Args:
            step: optimizer step that they will be from.
            with_optimizer: the moments too; otherwise these are zero.
        """
        self.adamw.clear()
        if with_optimizer:
            self.adamw.begin_load(self.parameters, step)
        return self.tensors(with_optimizer=with_optimizer)

    def end_load(self) -> None:
        """Compute with what has been filled."""
