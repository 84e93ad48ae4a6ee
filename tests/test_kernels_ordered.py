"""Full attention whose gradients come in one order: which of torch's ways it takes, and that it says so for its own step alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.kernels.attention import ordered
from sparseray.kernels.attention.ordered import ordered_attention
from sparseray.kernels.ops import ops_for

ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def bitwise() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def heads(tokens: int, dim: int, count: int, device: str, dtype: torch.dtype, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, tokens, dim, device=device, dtype=dtype).requires_grad_()


def is_strict() -> bool:
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("dim", [16, 5])
def test_gradients_are_those_of_plain_attention_and_only_its_own_step_is_strict(
    groups: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, k, v = (
        heads(33, dim, 4, "cpu", torch.float32),
        *(heads(33, dim, groups, "cpu", torch.float32) for _ in range(2)),
    )
    seen: list[bool] = []
    for name in ("_refuse", "_warn"):
        plain = getattr(ordered, name)

        def noted(*arguments: object, plain: Any = plain) -> None:
            plain(*arguments)
            seen.append(is_strict())

        monkeypatch.setattr(ordered, name, noted)
    named = {"is_causal": True, "enable_gqa": True}
    out = ordered_attention(q, k, v, **named)
    assert not is_strict() and not seen
    out.backward(torch.ones_like(out))
    assert seen == [True, False] and not is_strict()
    found = [x.grad for x in (q, k, v)]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, **named).sum(), (q, k, v))
    for own, theirs in zip(found, wanted):
        assert own is not None
        torch.testing.assert_close(own, theirs)


def test_without_gradients_there_is_nothing_to_order() -> None:
    with torch.no_grad():
        q = torch.randn(1, 2, 9, 8)
        assert torch.equal(ordered_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(
    "shape", [(8, 4096, 16, 16, 64, 64), (2, 4096, 16, 4, 128, 128), (1, 8192, 16, 16, 192, 128)], ids=str
)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)])
def test_a_step_of_many_tokens_has_the_same_gradients_each_time(device: str, shape: tuple[int, ...]) -> None:
    """As many blocks as end in any order: cuDNN's gradients differ here from call to call."""
    B, T, Q, G, D, V = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, T, *of, device=device, dtype=torch.bfloat16).requires_grad_()
        for of in ((Q, D), (G, D), (G, V))
    )
    dout = torch.randn(B, T, Q, V, device=device, dtype=torch.bfloat16)
    attend = ops_for("auto", q.device).attend
    first = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    for _ in range(5):
        again = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
