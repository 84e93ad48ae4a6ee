"""Launching Triton kernels with less work on the host.

`kernel[grid](...)` finds the compiled kernel by all that it could depend on, which takes the host longer than many
kernels run for short sequences. `launch_kernel` finds it by what can differ between two calls here, and starts it.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled: dict[tuple[Any, ...], Any] = {}


def _kind(arg: Any) -> Any:
    """What of a run-time argument Triton compiles for: types, alignment, and integers that are 1 or 16-fold."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return type(arg), arg == 1, arg % 16 == 0, arg.bit_length() > 31
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, *arg.block_shape
    if isinstance(arg, LaidOutDescriptor):
        return arg.base.dtype, *arg.block_shape, arg.layout
    return type(arg)


def _compile(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    positional = [param.name for param in kernel.params[: len(args)] if param.is_constexpr]
    assert not positional, f"{kernel.__name__}: {positional} are compile-time arguments, which go by name"
    return kernel[grid](*args, **named)


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """`kernel[grid](*args, **named)` on the current device and stream.

    Args:
        kernel: what `triton.jit` made; under Triton's interpreter, it is interpreted.
        args: the run-time arguments, all of them: tensors, tensor descriptors, integers, floats or None.
        named: every compile-time argument, and options such as num_warps.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](*args, **named)
        return
    key = (kernel, torch.cuda.current_device(), *named.items(), *map(_kind, args))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _compile(kernel, grid, args, named)
    else:
        constants = [named[name] for name in kernel.arg_names[len(args) :]]
        compiled[*grid, *(1,) * (3 - len(grid))](*args, *constants)
