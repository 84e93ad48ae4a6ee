"""Latent attention over paged caches against the plain operations: one to eight query tokens, alone, in a batch, in a graph."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.attention import latent_decode as module
from sparseray.kernels.attention.latent_decode import LatentDecodeWorkspace, latent_decode
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.paged import Pages

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


class Case:
    """Queries, shuffled pages with NaN wherever no token is, table and lengths."""

    def __init__(
        self, lens: list[int], query_len: int, heads: int, widths: tuple[int, int], page: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        per, self.latent = -(-max(1, *lens) // page), widths[0]
        both = torch.randn(len(lens), query_len, heads, sum(widths)).to(DEVICE, dtype)
        # Apart from one another, as a product by heads and a rotated projection leave them.
        self.q = both[..., : widths[0]].flatten(0, 1).transpose(0, 1).contiguous().transpose(0, 1)
        self.q, self.turned = self.q.unflatten(0, both.shape[:2]), both[..., widths[0] :]
        self.table = torch.randperm(len(lens) * per).int().view(len(lens), per).to(DEVICE)
        self.cache = torch.randn(len(lens) * per, page, 1, sum(widths), device=DEVICE).to(dtype)
        self.lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        self.spoil()
        self.scale = 0.7 * sum(widths) ** -0.5

    def spoil(self) -> None:
        """NaN behind every sequence."""
        page = self.cache.shape[1]
        for pages, length in zip(self.table.tolist(), self.lens.tolist()):
            for i, at in enumerate(pages):
                self.cache[at, max(0, length - i * page) :] = torch.nan

    def wanted(self) -> Tensor:
        """By the plain operation, in fp64, which sees the query tokens as a chunk."""
        batch, new = self.q.shape[:2]
        chunks, rows = [], []
        for b, length in enumerate(self.lens.tolist()):
            count = min(new, length)
            chunks.append((b * new + new - count, b * new + new, length))
            rows += list(range(*chunks[-1][:2]))
        pages = Pages(
            page=self.cache.shape[1],
            table_BW=self.table,
            context_lens_B=self.lens,
            places_R=torch.zeros(batch * new),
            chunks=tuple(chunks),
        )
        q, turned = (x.double().flatten(0, 1) for x in (self.q, self.turned))
        found = REFERENCE.paged_latent_attend(q, turned, self.cache.double(), self.scale, pages)
        return found.unflatten(0, (batch, new))

    def workspace(self, rows: slice = slice(None), longest: int = 300) -> LatentDecodeWorkspace:
        work = LatentDecodeWorkspace.create(self.q[rows], self.cache, max_context=longest)
        for buffer in (work.part_max, work.part_sum, work.part_out):
            buffer.fill_(torch.nan)
        return work

    def run(self, rows: slice = slice(None), work: LatentDecodeWorkspace | None = None) -> Tensor:
        q, turned = self.q[rows], self.turned[rows]
        work = self.workspace(rows) if work is None else work
        out = torch.full((*q.shape[:3], self.latent), torch.nan, dtype=q.dtype, device=DEVICE)
        table, lens = self.table[rows].contiguous(), self.lens[rows].contiguous()
        return latent_decode(q, turned, self.cache, table, lens, work, out, scale=self.scale)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("lens", "query_len", "heads", "widths", "page"),
    [
        ([1, 33, 200], 1, 6, (24, 8), 16),
        ([8, 150], 8, 4, (16, 16), 48),
        ([5, 70], 3, 5, (20, 12), 7),
        ([3, 0, 64, 2], 2, 17, (48, 16), 32),
        ([290, 2], 4, 16, (32, 8), 64),
    ],
)
def test_decoding_equals_the_plain_operation(
    lens: list[int], query_len: int, heads: int, widths: tuple[int, int], page: int
) -> None:
    case = Case(lens, query_len, heads, widths, page)
    found, wanted = case.run(), case.wanted()
    assert error(found, wanted) < 1e-5
    for b, length in enumerate(lens):
        assert not found[b, : max(0, query_len - length)].any(), "a query before the first token"


@pytest.mark.parametrize(
    "limits", [{"PARTS": 3}, {"MERGE_COLUMNS": 8}, {}], ids=["parts", "columns", "as it is"]
)
def test_sizes_of_a_launch_change_nothing_but_rounding(
    limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(module, name, value)
    case = Case([250, 31, 0, 128], 2, 12, (32, 16), 32)
    assert error(case.run(), case.wanted()) < 1e-5


def test_bits_of_a_sequence_do_not_depend_on_its_company() -> None:
    case = Case([200, 33, 90, 7], 2, 4, (16, 16), 16)
    together = case.run()
    for b in range(4):
        order = [*range(b, 4), *range(b)]
        other = Case([200, 33, 90, 7], 2, 4, (16, 16), 16)
        other.q, other.turned, other.table = case.q[order], case.turned[order], case.table[order]
        other.lens = torch.tensor([case.lens[b], 41, 2, 0], dtype=torch.int32, device=DEVICE)
        other.cache = case.cache.nan_to_num(1.0)
        assert torch.equal(other.run()[0], together[b])


def test_queries_that_decoding_does_not_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 8 query tokens"):
        Case([20], 9, 2, (16, 16), 16).run()


@pytest.mark.gpu
@needs_gpu
class TestOnAGPU:
    """bf16, at the sizes of DeepSeek-V2-Lite and V3."""

    @pytest.mark.parametrize("heads", [16, 128])
    @pytest.mark.parametrize("query_len", [1, 2, 4, 8])
    def test_decoding_equals_the_plain_operation(self, heads: int, query_len: int) -> None:
        case = Case([1, 300, 0, 2500, 64, 900, 8, 1024], query_len, heads, (512, 64), 256, torch.bfloat16)
        work = case.workspace(longest=2560)
        assert error(case.run(work=work), case.wanted()) < 1e-2

    def test_a_captured_step_serves_contexts_that_grow(self) -> None:
        case = Case([900, 2000], 2, 16, (512, 64), 64, torch.bfloat16)
        case.cache.nan_to_num_(1.0)
        full, work = case.lens.clone(), case.workspace(longest=2048)
        out = torch.empty(2, 2, 16, 512, dtype=torch.bfloat16, device=DEVICE)
        step = (case.q, case.turned, case.cache, case.table, case.lens, work, out)
        latent_decode(*step, scale=case.scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            latent_decode(*step, scale=case.scale)
        for less in (800, 300, 0):
            case.lens.copy_(full - less)
            out.fill_(torch.nan)
            graph.replay()
            assert error(out, case.wanted()) < 1e-2
