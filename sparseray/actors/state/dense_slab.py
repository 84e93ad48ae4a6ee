"""The dense weights as flat slabs on one device: what a slot holds that plays all roles there.

The network computes with views of a copy in `dtype`; fp32 masters and moments lie behind one another in slabs of
their own, and an update reads and writes each of them once. Names and checkpoints are those of dense.py. Routers
compute in fp32, from their masters, and so do biases of theirs.
"""

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from sparseray.actors.state.adamw import EXP_AVG, EXP_AVG_SQ
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.flat_tensors import FlatTensors
from sparseray.actors.state.gradient_sum import Determinism, GradientSum
from sparseray.kernels.ops import Ops
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import DSELayout


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
        in_fp32 = [dtype == torch.float32 or computes_in_fp32(name) for name in self.names]
        kinds = [(parameter.ndim >= 2, whole) for parameter, whole in zip(self.parameters, in_fp32)]
        self.flat = FlatTensors([parameter.shape for parameter in self.parameters], kinds)
        self._in_fp32, self.moments_dtype = in_fp32, moments
        self._master = self.flat.slab(torch.float32, device)
        self._copy = self.flat.slab(dtype, device) if dtype != torch.float32 else self._master
        self._first_second: tuple[Tensor, Tensor] | None = None
        self.masters = self.flat.views(self._master)
        self.copies: list[Tensor | None] = [
            None if whole else copy for whole, copy in zip(in_fp32, self.flat.views(self._copy))
        ]
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

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Slabs of both moments; zeros before the first step."""
        if self._first_second is None:
            first, second = (self.flat.slab(self.moments_dtype, self.device) for _ in range(2))
            self._first_second = first, second
        return self._first_second

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """First and second moments, one of each for every parameter; zeros before the first step."""
        first, second = self._moments()
        return self.flat.views(first), self.flat.views(second)

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
        first, second = self._moments()
        for run in self.flat.runs:
            member = run.members[0]
            self.ops.adamw_step(
                run.of(self._master),
                run.of(first),
                run.of(second),
                self.flat.gather(run, self.total),
                copy=None if self._in_fp32[member] else run.of(self._copy),
                scale=scale_,
                lr=lr,
                betas=self.adamw.betas,
                eps=self.adamw.eps,
                weight_decay=self.adamw.weight_decay if self.masters[member].ndim >= 2 else 0.0,
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

    def begin_load(self, step: int, *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """As in `DenseState`.

        Args:
            step, with_optimizer: as there.
        """
        self.updates = step
        if not with_optimizer:
            self._first_second = None
        return self.tensors(with_optimizer=with_optimizer)

    def end_load(self) -> None:
        """Take over into what the network computes with."""
        self._refresh()
