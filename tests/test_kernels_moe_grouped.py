"""Experts on the rows of all at once, against the reference on one expert after another: to the bit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparseray.kernels.moe import grouped, reference

COUNTS = (1, 16, 200, 31, 128, 129)


@pytest.fixture
def few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _experts(num: int, hidden: int, inner: int) -> list[grouped.Matrices]:
    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) * columns**-0.5

    return [(draw(inner, hidden), draw(inner, hidden), draw(hidden, inner)) for _ in range(num)]


def _both_ways(
    x_RH: Tensor, dy_RH: Tensor, counts: tuple[int, ...], experts: list[grouped.Matrices]
) -> tuple[Tensor, Tensor, list[grouped.Matrices]]:
    rows, every = grouped.Rows.of(counts, x_RH.device), torch.arange(len(x_RH))
    x_PH, dy_PH = rows.gather(x_RH, every), rows.gather(dy_RH, every)
    y_PH, saved = grouped.forward(x_PH, rows, experts)
    gradients = [tuple(torch.full_like(matrix, torch.nan) for matrix in three) for three in experts]
    dx_PH = grouped.backward(dy_PH, x_PH, saved, rows, experts, gradients)  # type: ignore[arg-type]
    return y_PH[rows.places_R], dx_PH[rows.places_R], gradients  # type: ignore[return-value]


@pytest.mark.parametrize(("hidden", "inner"), [(128, 64), (32, 16), (40, 20)])
@pytest.mark.usefixtures("few_threads")
def test_all_experts_at_once_have_the_bits_of_one_after_another(hidden: int, inner: int) -> None:
    torch.manual_seed(0)
    experts = _experts(len(COUNTS), hidden, inner)
    x, dy = torch.randn(sum(COUNTS), hidden), torch.randn(sum(COUNTS), hidden)
    y, dx, gradients = _both_ways(x, dy, COUNTS, experts)
    start = 0
    for count, matrices, found in zip(COUNTS, experts, gradients):
        mine = slice(start, start + count)
        want, saved = reference.swiglu_forward(x[mine], *matrices)
        dwant, *wanted = reference.swiglu_backward(dy[mine], x[mine], saved, *matrices)
        assert torch.equal(y[mine], want)
        assert torch.equal(dx[mine], dwant)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted))
        start += count


@pytest.mark.usefixtures("few_threads")
def test_an_expert_has_the_same_bits_beside_others_on_several_threads() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(3)
    counts = (400, 700, 48)
    experts = _experts(3, 64, 64)
    x, dy = torch.randn(sum(counts), 64), torch.randn(sum(counts), 64)
    y, dx, gradients = _both_ways(x, dy, counts, experts)
    alone = slice(counts[0], sum(counts[:2]))
    y_alone, dx_alone, (only,) = _both_ways(x[alone], dy[alone], counts[1:2], experts[1:2])
    assert torch.equal(y[alone], y_alone)
    assert torch.equal(dx[alone], dx_alone)
    assert all(torch.equal(one, other) for one, other in zip(gradients[1], only))
