"""Full attention whose gradients come in one order: those of plain attention, and the same whenever they are asked for."""

from collections.abc import Iterator

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from torch import Tensor

from sparseray.kernels import paged_triton_ops
from sparseray.kernels.attention.ordered import ordered_attention
from sparseray.kernels.ops import REFERENCE, ops_for
from sparseray.kernels.triton_ops import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
Shape = tuple[int, int, int, int, int, int, int]
"""Sequences, queries, keys, query heads, key/value heads, and their channels."""


@pytest.fixture(autouse=True)
def bitwise() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys, values and the gradient of the output."""
    B, T, S, Q, G, D, V = shape
    torch.manual_seed(0)
    *qkv, dout = (
        torch.randn(B, *of, device=device, dtype=dtype) for of in ((T, Q, D), (S, G, D), (S, G, V), (T, Q, V))
    )
    return *(x.requires_grad_() for x in qkv), dout


@pytest.mark.parametrize(
    "shape",
    [(2, 33, 33, 4, 4, 16, 16), (1, 70, 70, 4, 2, 20, 12), (2, 9, 41, 6, 1, 24, 16), (1, 1, 1, 2, 2, 16, 16)],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_plain_attention(shape: Shape) -> None:
    """Also of a few queries after earlier keys, and of values narrower than keys."""
    q, k, v, dout = tensors(shape, DEVICE, torch.float32)
    out, wanted = ordered_attention(q, k, v), REFERENCE.attend(q.cpu(), k.cpu(), v.cpu())
    torch.testing.assert_close(out.cpu(), wanted, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for own, theirs in zip(found, torch.autograd.grad(wanted, (q, k, v), dout.cpu())):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


def test_it_is_what_a_run_that_wants_an_order_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, q = list[int](), torch.randn(1, 5, 2, 16, device=DEVICE)

    def noted(*qkv: Tensor) -> Tensor:
        asked.append(len(qkv))
        return ordered_attention(*qkv)

    monkeypatch.setattr(paged_triton_ops, "ordered_attention", noted)
    TRITON.attend(q, q, q)
    torch.use_deterministic_algorithms(False)
    TRITON.attend(q, q, q)
    assert asked == [3]


@pytest.mark.parametrize(
    "shape", [(8, 4096, 16, 16, 64, 64), (2, 4096, 16, 4, 128, 128), (1, 8192, 16, 16, 192, 128)], ids=str
)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)])
def test_a_step_of_many_tokens_has_the_same_gradients_each_time(
    device: str, kernels: str, shape: tuple[int, ...]
) -> None:
    """As many blocks as end in any order: cuDNN's gradients differ here from call to call."""
    B, T, Q, G, D, V = shape
    B = B if kernels == "auto" else 1
    q, k, v, dout = tensors((B, T, T, Q, G, D, V), device, torch.bfloat16)
    attend = ops_for(kernels, q.device).attend  # type: ignore[arg-type]
    first = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    for _ in range(5):
        again = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
