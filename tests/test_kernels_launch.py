"""Launches that skip Triton's own lookup find the right kernel: by type, alignment and the integers' values."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # Must come before anything that imports Triton.

# isort: split
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from sparseray.kernels.launch import launch_kernel

assert triton_interpreter
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


@triton.jit
def scaled_kernel(p_x, p_add, p_out, n, factor, SIZE: tl.constexpr, TWICE: tl.constexpr):
    o_i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b = tl.load(p_x + o_i, mask=o_i < n, other=0.0).to(tl.float32) * factor
    if p_add is not None:
        b += tl.load(p_add + o_i, mask=o_i < n, other=0.0)
    if TWICE:
        b *= 2
    tl.store(p_out + o_i, b.to(p_out.dtype.element_ty), mask=o_i < n)


def check(x: torch.Tensor, add: torch.Tensor | None, factor: float, size: int, twice: bool) -> None:
    out = torch.empty(x.shape, dtype=torch.float64, device=DEVICE)
    n = x.numel()
    launch_kernel(
        scaled_kernel, (-(-n // size),), x, add, out, n, factor, SIZE=size, TWICE=twice, num_warps=1
    )
    wanted = (x.float() * factor + (0 if add is None else add)) * (2 if twice else 1)
    torch.testing.assert_close(out.float(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_call_gets_the_kernel_of_its_own_arguments(dtype: torch.dtype) -> None:
    x = torch.randn(200, device=DEVICE, dtype=dtype)
    add = torch.randn(200, device=DEVICE)
    for _ in range(2):  # The second time everything is compiled.
        for start, count in ((0, 160), (1, 160), (0, 161), (3, 1), (0, 1), (8, 17)):
            part = slice(start, start + count)
            for factor in (2.5, 3, 16, 1, 1 << 33):
                check(x[part], None, factor, 16, False)
            check(x[part], add[part], 0.5, 32, True)
            check(x[part], add[part], 0.5, 32, False)


@triton.jit
def integers_kernel(p_x, p_y, p_out, NAME: tl.constexpr):
    x, y = tl.load(p_x), tl.load(p_y)
    if NAME == "add":
        tl.store(p_out, x + y)
    elif NAME == "sub":
        tl.store(p_out, x - y)
    else:
        tl.store(p_out, x * y)


@pytest.mark.skipif(HAS_GPU, reason="the interpreter looks for overflows, a GPU does not")
@pytest.mark.parametrize(
    ("name", "x", "fits", "too_large"),
    [("add", 2**31 - 4, 3, 4), ("sub", 3 - 2**31, 3, 4), ("mul", 1 << 16, 2**15 - 1, 2**15)],
)
def test_the_interpreter_refuses_integers_that_overflow(name: str, x: int, fits: int, too_large: int) -> None:
    def run(y: int, dtype: torch.dtype) -> int:
        out = torch.zeros(1, dtype=dtype)
        integers_kernel[(1,)](torch.tensor([x], dtype=dtype), torch.tensor([y], dtype=dtype), out, NAME=name)
        return int(out)

    exact = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}[name]
    assert run(fits, torch.int32) == exact(x, fits)
    with pytest.raises(InterpreterError, match=f"int32 overflow detected for operation {name}"):
        run(too_large, torch.int32)
    assert run(too_large, torch.int64) == exact(x, too_large)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_compile_time_argument_by_position_is_refused() -> None:
    x = torch.zeros(16, device=DEVICE)
    with pytest.raises(AssertionError, match=r"SIZE.*go by name"):
        launch_kernel(scaled_kernel, (1,), x, None, x, 16, 1.0, 16, TWICE=False)
