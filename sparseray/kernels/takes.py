"""What the Triton kernels take, asked before they are launched."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from sparseray.errors import ConfigError
from sparseray.kernels.nsa.gates import combine_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set before Triton was imported."""
    return not isinstance(combine_kernel, JITFunction)


def check(what: str, *tensors: Tensor) -> None:
    """See that the tensors are of one dtype that the kernels take, and on a device that runs them.

    Raises:
        ConfigError: they are not.
    """
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        found = ", ".join(sorted(str(d) for d in dtypes))
        raise ConfigError(
            f"kernels=triton: {what} got {found}; give all of it one of float32, bfloat16 and float16, or use"
            " kernels=reference"
        )
    if not (tensors[0].is_cuda or is_interpreted()):
        raise ConfigError(
            f"kernels=triton: {what} got a tensor on {tensors[0].device}; move the model to a GPU, or use"
            " kernels=reference"
        )
