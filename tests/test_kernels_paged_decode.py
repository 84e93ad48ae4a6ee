"""Full attention over paged caches against its plain reference: decoding, alone and in a batch, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.attention import decode
from sparseray.kernels.attention.decode import PagedDecodeWorkspace, paged_decode
from sparseray.kernels.dense.reference import paged_attention_reference

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
    ),
]


class Case:
    """Queries, shuffled pages with NaN wherever no token is, table and lengths."""

    def __init__(
        self, lens: list[int], query_len: int, heads: tuple[int, int], dims: tuple[int, int], page: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        (HQ, H), per = heads, -(-max(1, *lens) // page)
        self.q = torch.randn(len(lens), query_len, HQ, dims[0]).to(DEVICE, dtype)
        self.table = torch.randperm(len(lens) * per).int().view(len(lens), per)
        self.caches = []
        for width in dims:
            cache = torch.randn(len(lens) * per, page, H, width)
            for b, length in enumerate(lens):
                for i in range(per):
                    cache[int(self.table[b, i]), max(0, length - i * page) :] = torch.nan
            self.caches.append(cache.to(DEVICE, dtype))
        self.table, self.lens = self.table.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE)

    def wanted(self) -> Tensor:
        k, v = (c.double() for c in self.caches)
        scale = self.q.shape[3] ** -0.5
        return paged_attention_reference(self.q.double(), k, v, self.table, self.lens, scale=scale)

    def run(self, rows: slice = slice(None), longest: int = 300) -> Tensor:
        q = self.q[rows].contiguous()
        (batch, query_len, heads, _), width = q.shape, self.caches[1].shape[3]
        work = PagedDecodeWorkspace.create(batch, query_len, heads, width, longest, DEVICE)
        for buffer in (work.part_max, work.part_sum, work.part_out):
            buffer.fill_(torch.nan)
        out = torch.full((batch, query_len, heads, width), torch.nan, dtype=q.dtype, device=DEVICE)
        table = self.table[rows].contiguous()
        return paged_decode(q, *self.caches, table, self.lens[rows].contiguous(), work, out)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans and tiles so small that short contexts have many."""
    sizes = {"SPLITS": 5, "SPAN": 32, "TILE": 256, "PROGRAMS": 8, "MERGE_COLUMNS": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(decode, name, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lens", "query_len", "heads", "dims", "page"),
    [
        ([1, 33, 200], 1, (6, 2), (16, 16), 16),
        ([8, 150], 8, (4, 4), (16, 24), 48),
        ([5, 70], 3, (5, 1), (24, 16), 7),
        ([3, 0, 64], 2, (16, 1), (48, 16), 32),
    ],
)
@pytest.mark.usefixtures("small")
def test_decoding_equals_the_reference(
    lens: list[int],
    query_len: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    page: int,
    dtype: torch.dtype,
) -> None:
    case = Case(lens, query_len, heads, dims, page, dtype)
    found, wanted = case.run(), case.wanted()
    assert float((found.double() - wanted).norm() / wanted.norm()) < (
        1e-5 if dtype == torch.float32 else 1e-2
    )
    for b, length in enumerate(lens):
        assert length or not found[b].any()


@pytest.mark.usefixtures("small")
def test_bits_of_a_sequence_depend_neither_on_its_company_nor_on_the_workspace() -> None:
    case = Case([200, 33, 90, 7], 2, (4, 2), (16, 16), 16)
    together = case.run()
    for b in range(4):
        assert torch.equal(case.run(slice(b, b + 1), longest=200 + 300 * b)[0], together[b])


@pytest.mark.parametrize("dims", [(32, 32), (80, 80), (192, 128)], ids=str)
def test_decoding_with_the_spans_as_they_are(dims: tuple[int, int]) -> None:
    """Also of widths that are no power of two."""
    case = Case([300, 257], 1, (2, 1), dims, 64)
    torch.testing.assert_close(case.run().double(), case.wanted(), rtol=1e-4, atol=1e-5)


def test_queries_that_decoding_does_not_take_are_refused() -> None:
    case = Case([20], 9, (2, 2), (16, 16), 16)
    with pytest.raises(ConfigError, match="1 to 8 query tokens"):
        case.run()
    case = Case([20], 1, (3, 2), (16, 16), 16)
    with pytest.raises(ConfigError, match="multiple of 2 heads"):
        case.run()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_captured_step_serves_contexts_that_grow() -> None:
    case = Case([900, 2000], 1, (16, 4), (128, 128), 64, torch.bfloat16)
    full, out = case.lens.clone(), torch.empty_like(case.q)
    work = PagedDecodeWorkspace.create(2, 1, 16, 128, 2048, DEVICE)
    step = (case.q, *case.caches, case.table, case.lens, work, out)
    paged_decode(*step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode(*step)
    for less in (800, 300, 0):
        case.lens.copy_(full - less)
        out.fill_(torch.nan)
        graph.replay()
        wanted = case.wanted()
        assert float((out.double() - wanted).norm() / wanted.norm()) < 1e-2
