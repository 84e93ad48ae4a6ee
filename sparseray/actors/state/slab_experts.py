"""The routed experts of a slot that computes in slabs on one device: a layer goes to the operation as it lies.

The twin of an expert shard that answers rows for others: same weights, names and checkpoints, but a layer is one
call, its gradients are two tensors, and an update reads and writes each slab once. Where one slot holds all experts,
autograd finds the gradients (exchange/on_device.py), elsewhere the exchange gives them (peers/across.py).
DeepSeekMoE, arXiv 2401.06066.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.gradient_sum import Determinism, GradientSum
from sparseray.actors.state.pieces import Key
from sparseray.kernels.ops import Ops
from sparseray.model.config import ModelConfig


class SlabExperts(ExpertShard):
    """`ExpertShard` whose gradients are those of whole slabs.

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
        """Follow the updates of some experts.

        Args:
            owned: (MoE layer, expert) pairs that follow the updates.
            primary, computed: those of them whose rows are computed here.
        """
        super().assign(owned, primary, primary)
        self._leaves = []

    def trim(self) -> None:
        """Forget experts that are held and not assigned; the gradients of the others stay."""
        before, total = [slab.rows for slab in self.slabs], self.sum.total
        super().trim()
        if total is None or all(slab.rows is old for slab, old in zip(self.slabs, before)):
            return
        kept = [[old[expert] for expert in slab.rows] for slab, old in zip(self.slabs, before)]
        self.sum.complete([gradient[kept[index // 2]] for index, gradient in enumerate(total)])

    def weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """(gate_up_E2IH, down_EHI) of all experts of a layer as leaves of the graph, for `Ops.experts`.

        Args:
            layer: index among the MoE layers.
        """
        if not self._leaves:
            every = list(range(self.config.moe.num_experts))
            assert all(list(slab.rows) == every for slab in self.slabs), "not every expert is here"
            self._leaves = [
                (gate_up.detach().requires_grad_(), down.detach().requires_grad_())
                for gate_up, down in (slab.compute for slab in self.slabs)
            ]
        return self._leaves[layer]

    def expert_norms(self, norms: Sequence[float]) -> list[float]:
        """Squared norms of the experts' gradients, of one layer after another in the order of their rows.

        Args:
            norms: of every row of every gradient, in their order.
        """
        found, start = list[float](), 0
        for slab in self.slabs:
            middle, end = start + len(slab.rows), start + 2 * len(slab.rows)
            found += map(operator.add, norms[start:middle], norms[middle:end])
            start = end
        return found

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
            if not slab.rows:
                continue
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
