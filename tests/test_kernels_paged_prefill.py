"""Full attention of packed chunks over paged caches against its plain reference, each chunk alone and in company."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from test_kernels_paged_decode import DEVICE, DTYPES, Case
from torch import Tensor

from sparseray.kernels.attention import prefill
from sparseray.kernels.attention.prefill import paged_prefill


def run(case: Case, q_RQD: Tensor, sizes: list[int], rows: list[int]) -> Tensor:
    """Of some sequences of a case, whose chunks' queries are packed; NaN where nothing was written."""
    bounds = torch.tensor([0, *sizes]).cumsum(0).int().to(DEVICE)
    out = q_RQD.new_full((*q_RQD.shape[:2], case.caches[1].shape[3]), torch.nan)
    table, lens = case.table[rows].contiguous(), case.lens[rows].contiguous()
    return paged_prefill(q_RQD, *case.caches, table, bounds, lens, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lens", "sizes", "heads", "dims", "page"),
    [
        ([40, 33, 100], [40, 1, 37], (6, 2), (16, 16), 16),
        ([150], [150], (2, 2), (16, 24), 48),
        ([5, 70, 0, 64], [5, 17, 0, 64], (5, 1), (24, 16), 64),
        ([96, 16], [16, 16], (4, 4), (48, 16), 32),
    ],
)
def test_chunks_equal_the_reference(
    lens: list[int],
    sizes: list[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    page: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill, "ROWS", 16)
    monkeypatch.setattr(prefill, "KEYS", 32)
    case = Case(lens, max(sizes), heads, dims, page, dtype)
    # A shorter chunk is the end of the longest one's queries.
    cut = [case.q[b, max(sizes) - size :] for b, size in enumerate(sizes)]
    padding = torch.full_like(case.q[0, :1], torch.nan)
    found = run(case, torch.cat([*cut, padding]), sizes, list(range(len(lens))))
    wanted = case.wanted()
    for b, (part, size) in enumerate(zip(found.split([*sizes, 1]), sizes)):
        if size:
            exact = wanted[b, max(sizes) - size :]
            error = float((part.double() - exact).norm() / exact.norm())
            assert error < (1e-5 if dtype == torch.float32 else 2e-2)
            assert torch.equal(run(case, cut[b].contiguous(), [size], [b]), part)
    assert found[-1].isnan().all()
