"""AdamW: torch's fused update as a function, and moments by parameter for the dense weights."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

EXP_AVG, EXP_AVG_SQ = "@exp_avg", "@exp_avg_sq"


@torch.no_grad()
def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update parameters, moments and step counts in place.

    An element's bits depend on its place in its tensor: torch computes what is left over after whole vector
    registers in another way (0.3 % of the second moments differ). So one expert's matrix stays one tensor, a view of
    its slab, however many lie beside it.

    Args:
        parameters, gradients, first, second: fp32 tensors of equal shapes, in the same order.
        counts: updates that each parameter has seen, scalars; every one a tensor of its own.
        lr, betas, eps, weight_decay: as in Loshchilov and Hutter, arXiv 1711.05101.
    """
    adamw(
        list(parameters),
        list(gradients),
        list(first),
        list(second),
        [],
        list(counts),
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


class AdamW:
    """Moments of parameters that come and go, and their update; matrices decay, vectors do not.

    Only the function of torch's optimizer: its class loads torch's compiler when it is built, 1.3 s of processor
    time and some 100 MB in every slot that starts.

    Args:
        betas, eps, weight_decay: as in Loshchilov and Hutter, arXiv 1711.05101.
    """

    def __init__(self, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self._moments: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}

    def _of(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step count, first and second moment; zeros before the first step."""
        known = self._moments.get(parameter)
        if known is None:
            first, second = (torch.zeros_like(parameter, requires_grad=False) for _ in range(2))
            known = (torch.tensor(0.0, device=parameter.device), first, second)
            self._moments[parameter] = known
        return known

    def step(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float) -> None:
        """Update parameters in place, each with the gradient of its shape.

        Args:
            parameters: fp32.
            gradients: one for each, in the same order.
            lr: learning rate of this step.
        """
        for decays in (True, False):
            chosen = [(p, g) for p, g in zip(parameters, gradients) if (p.ndim >= 2) == decays]
            if not chosen:
                continue
            counts, first, second = zip(*(self._of(parameter) for parameter, _ in chosen))
            adamw_(
                [parameter for parameter, _ in chosen],
                [gradient for _, gradient in chosen],
                first,
                second,
                counts,
                lr=lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay if decays else 0.0,
            )

    def pass_over(self, parameters: Sequence[Tensor]) -> None:
        """Count an update that is left out: counts are the step's number, as `load` has it."""
        for parameter in parameters:
            self._of(parameter)[0].add_(1.0)

    def clear(self) -> None:
        """Forget all moments."""
        self._moments.clear()

    def tensors(self, names: Sequence[str], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return both moments by the parameter's name.

        Args:
            names: logical names.
            parameters: one for each name.
        """
        found = {}
        for name, parameter in zip(names, parameters):
            _, found[name + EXP_AVG], found[name + EXP_AVG_SQ] = self._of(parameter)
        return found

    def begin_load(self, parameters: Sequence[Tensor], step: int) -> None:
        """Make room for moments, undefined until what `tensors` gives is filled.

        Args:
            parameters: whose moments they are.
            step: updates that they have seen.
        """
        for parameter in parameters:
            first, second = (torch.empty_like(parameter, requires_grad=False) for _ in range(2))
            count = torch.tensor(float(step), device=parameter.device)
            self._moments[parameter] = (count, first, second)
