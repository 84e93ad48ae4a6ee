"""All routed experts in one slot and on one device: a layer's slabs go to the operation as they lie.

The twin of an expert shard that answers rows for others: same weights, names and checkpoints, but a layer is one
call of `Ops.experts`, its gradients are two tensors, and an update reads and writes each slab once.
DeepSeekMoE, arXiv 2401.06066.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.gradient_sum import Determinism, GradientSum
from sparseray.actors.state.pieces import Key
from sparseray.kernels.ops import Ops
from sparseray.model.config import ModelConfig


class WholeExperts(ExpertShard):
    """`ExpertShard` of a slot that holds and computes every expert.

    Args:
        config, seed, num_parts, betas, eps, weight_decay, device, compute_dtype, moments: as in `ExpertShard`.
        ops: computes and updates.
        determinism: order of the sum over parts.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int,
        num_parts: int,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        device: torch.device,
        compute_dtype: torch.dtype | None,
        moments: torch.dtype,
        ops: Ops,
        determinism: Determinism,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.sum = GradientSum(num_parts, determinism)
        self._leaves: list[tuple[Tensor, Tensor]] = []
        super().__init__(
            config,
            seed=seed,
            num_parts=num_parts,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            device=device,
            compute_dtype=compute_dtype,
            moments=moments,
            ops=ops,
        )

    def assign(
        self, owned: Sequence[Key], primary: Sequence[Key], computed: Sequence[Key] | None = None
    ) -> None:
        """Follow the updates of all experts, or of none.

        Args:
            owned: (MoE layer, expert) pairs that follow the updates.
            primary, computed: those of them that answer here; all of them, or none.
        """
        super().assign(owned, primary, computed)
        every = [(layer, e) for layer in range(len(self.slabs)) for e in range(self.config.moe.num_experts)]
        assert not owned or list(owned) == every, "one slot has every expert here"
        self._leaves = []
        if owned:
            self._leaves = [self._differentiable(layer) for layer in range(len(self.slabs))]

    def _differentiable(self, layer: int) -> tuple[Tensor, Tensor]:
        """What the operation reads, in the experts' order, as leaves of the graph."""
        slab = self.slabs[layer]
        assert list(slab.rows) == list(range(self.config.moe.num_experts))
        gate_up, down = (tensor.detach().requires_grad_() for tensor in slab.compute)
        return gate_up, down

    def weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """(gate_up_E2IH, down_EHI) of the MoE layer with index `layer`, for `Ops.experts`."""
        return self._leaves[layer]

    def take_gradients(self) -> list[Tensor]:
        """Take the gradients that the last backward pass left: gate_up and down of every layer."""
        leaves = [leaf for pair in self._leaves for leaf in pair]
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found

    @property
    def is_reduced(self) -> bool:
        """Whether the gradients of the step are complete."""
        return not self.owned or self.sum.total is not None

    def discard(self) -> None:
        """Forget the gradients of the step; the weights stay."""
        self.sum.clear()
        for pair in self._leaves:
            for leaf in pair:
                leaf.grad = None
        super().discard()

    def apply(self, *, lr: float, scale: float) -> None:
        """Update every slab once; forgets the gradients.

        Args:
            lr: learning rate of this step.
            scale: factor on the gradient (global-norm clipping).
        """
        self.updates += 1
        gradients = self.sum.total
        if self.owned:
            assert gradients is not None, "no reduced gradient yet"
            self._update_slabs(gradients, lr, torch.full((), scale, device=self.device))
        self.discard()

    def _update_slabs(self, gradients: Sequence[Tensor], lr: float, scale: Tensor) -> None:
        for layer, slab in enumerate(self.slabs):
            first, second = slab.moments()
            for matrix in range(2):
                master, copy = slab.weights[matrix], slab.compute[matrix]
                self.ops.adamw_step(
                    master,
                    first[matrix],
                    second[matrix],
                    gradients[2 * layer + matrix],
                    copy=None if copy is master else copy,
                    scale=scale,
                    lr=lr,
                    betas=self.betas,
                    eps=self.eps,
                    weight_decay=self.weight_decay,
                    step=self.updates,
                )
