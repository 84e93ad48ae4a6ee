"""The dense weights as flat slabs on one device: what a slot holds that plays all roles there.

The network computes with views of a copy in `dtype`; fp32 masters and moments lie behind one another in slabs of
their own, and an update reads and writes each of them once. Names and checkpoints are those of dense.py. Routers
compute in fp32, from their masters, and so do biases of theirs.

Shapes: P parameters, each tensor's first one on a boundary of ALIGNMENT.
"""

from collections.abc import Callable, Sequence
from zlib import crc32

import torch
from torch import Tensor

from sparseray.actors.state.adamw import EXP_AVG, EXP_AVG_SQ
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.gradient_sum import Determinism, GradientSum
from sparseray.kernels.ops import Ops
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import DSELayout

ALIGNMENT = 128
"""Elements; what descriptors and vector loads of any dtype ask for."""


def computes_in_fp32(name: str) -> bool:
    """Whether a parameter is read in fp32 whatever `train.dtype` is."""
    return name.endswith("router.weight")


class DenseSlabs(DenseState):
    """`DenseState` on one device, with a copy of the weights to compute with.

    Args:
        config, layout, seed, num_parts, betas, eps, weight_decay, ops, recompute: as in `DenseState`.
        device: where everything lies.
        dtype: that the network computes in.
        moments: dtype of both moments.
        determinism: order of the sum over parts.
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
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
        moments: torch.dtype,
        determinism: Determinism,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            config,
            layout,
            seed=seed,
            num_parts=num_parts,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            ops=ops,
            recompute=recompute,
        )
        self.device, self.dtype, self.ops, self.updates = device, dtype, ops, 0
        self.sum = GradientSum(num_parts, determinism)
        starts, end = [], 0
        for parameter in self.parameters:
            starts.append(end)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        shapes = [parameter.shape for parameter in self.parameters]

        def views(of: torch.dtype) -> list[Tensor]:
            slab = torch.zeros(end, dtype=of, device=device)
            return [slab[s : s + shape.numel()].view(shape) for s, shape in zip(starts, shapes)]

        self.masters, copies = views(torch.float32), views(dtype) if dtype != torch.float32 else None
        self.copies: list[Tensor | None] = [
            None if copies is None or computes_in_fp32(name) else copies[i]
            for i, name in enumerate(self.names)
        ]
        self.moments_dtype = moments
        self._new_moments: Callable[[], list[Tensor]] = lambda: views(moments)
        self._moments: tuple[list[Tensor], list[Tensor]] | None = None
        with torch.no_grad():
            for parameter, master, copy in zip(self.parameters, self.masters, self.copies):
                master.copy_(parameter)
                parameter.data = master if copy is None else copy
        self._refresh()
        self.model.to(device)
        self.biases = {name: b for name, b in self.model.named_buffers() if name.endswith("router_bias")}

    @torch.no_grad()
    def _refresh(self) -> None:
        """Take the masters over into what the network computes with."""
        for master, copy in zip(self.masters, self.copies):
            if copy is not None:
                copy.copy_(master)

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """First and second moments, one of each for every parameter; zeros before the first step."""
        if self._moments is None:
            self._moments = self._new_moments(), self._new_moments()
        return self._moments

    def take_gradients(self) -> list[Tensor]:
        """Take the gradients that the last backward pass left, one for every parameter."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return found

    @property
    def num_elements(self) -> int:
        """Parameters in all."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def total(self) -> Sequence[Tensor]:
        """The gradients summed over all parts."""
        assert self.sum.total is not None, "no reduced gradient yet"
        return self.sum.total

    def digest(self) -> int:
        """CRC-32 of the reduced gradient, to compare replicas."""
        found = 0
        for gradient in self.total:
            found = crc32(gradient.float().cpu().numpy().data, found)
        return found

    @property
    def is_reduced(self) -> bool:
        """Whether the gradient of the step is complete."""
        return self.sum.total is not None

    def apply(self, *, lr: float, scale: float, counts_LE: Tensor) -> None:
        """Update the weights and the router biases once; forgets the gradient.

        Args:
            lr: learning rate of this step.
            scale: factor on the gradient (global-norm clipping).
            counts_LE: int64, tokens per expert over the whole global batch.
        """
        self.updates += 1
        scale_ = torch.full((), scale, device=self.device)
        first, second = self.moments()
        for index, gradient in enumerate(self.total):
            master = self.masters[index]
            self.ops.adamw_step(
                master,
                first[index],
                second[index],
                gradient,
                copy=self.copies[index],
                scale=scale_,
                lr=lr,
                betas=self.adamw.betas,
                eps=self.adamw.eps,
                weight_decay=self.adamw.weight_decay if master.ndim >= 2 else 0.0,
                step=self.updates,
            )
        if counts_LE.numel():
            self.model.update_router_bias(counts_LE.to(self.device, non_blocking=True))
        self.discard()

    def pass_over(self) -> None:
        """Count a step whose gradient is dropped."""
        self.updates += 1
        self.discard()

    def discard(self) -> None:
        """Forget the gradient of the step."""
        self.sum.clear()
        super().discard()

    def tensors(self, *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by logical name: the masters, and on request the moments."""
        found = dict(zip(self.names, self.masters)) | self.biases
        if with_optimizer:
            for suffix, moments in zip((EXP_AVG, EXP_AVG_SQ), self.moments()):
                found |= {name + suffix: moment for name, moment in zip(self.names, moments)}
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], step: int, *, with_optimizer: bool = True) -> None:
        """Take over what `tensors` gave, on any device and with moments of any dtype.

        Args:
            tensors: by logical name.
            step: optimizer step that they are from.
            with_optimizer: take over the moments too.
        """
        for name, own in self.tensors(with_optimizer=with_optimizer).items():
            own.copy_(tensors[name])
        self.updates = step
        if not with_optimizer:
            self._moments = None
        self._refresh()
