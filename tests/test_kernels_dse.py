"""DSE kernels against their plain reference: hashing, rows, gate and convolution, sums, Adam."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)

from sparseray.kernels.dse import cpu, fetch, fusion, gather, reference, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LAYOUT = {
    "multipliers": [2**40 + 15, 2**41 + 9, 2**39 + 7],
    "orders": (2, 3),
    "primes": [[5003, 5009], [5011, 5021]],
    "offsets": [[0, 5003], [10012, 15023]],
    "pad": 2,
}
SMALL_PRIMES = {**LAYOUT, "primes": [[11, 13], [17, 19]], "offsets": [[0, 11], [24, 41]]}


def python_rows(tokens: list[int], starts: list[bool], layout: dict) -> list[list[int]]:
    """The definition, one token at a time, in Python integers."""
    rows = []
    for t in range(len(tokens)):
        begin = max((i for i in range(t + 1) if starts[i]), default=0)
        row, mix = [], tokens[t] * layout["multipliers"][0]
        for distance in (1, 2):
            previous = tokens[t - distance] if t - distance >= begin else layout["pad"]
            mix ^= previous * layout["multipliers"][distance]
            heads = zip(layout["primes"][distance - 1], layout["offsets"][distance - 1])
            row += [mix % prime + offset for prime, offset in heads]
        rows.append(row)
    return rows


@pytest.mark.parametrize("layout", [LAYOUT, SMALL_PRIMES])
def test_hash_equals_its_definition_at_sequence_and_document_starts(layout: dict) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2**20, (2, 37))
    starts = rng.random((2, 37)) < 0.2
    want = np.array([python_rows(t.tolist(), s.tolist(), layout) for t, s in zip(tokens, starts)])
    fast = cpu.ngram_hash(tokens, document_starts_BT=starts, **layout)
    plain = reference.ngram_hash(
        torch.from_numpy(tokens), document_starts_BT=torch.from_numpy(starts), **layout
    )
    np.testing.assert_array_equal(fast, want)
    np.testing.assert_array_equal(plain.numpy(), want)


def test_hash_of_chunks_with_history_equals_the_whole() -> None:
    tokens = np.random.default_rng(1).integers(0, 2**20, (2, 41))
    whole = cpu.ngram_hash(tokens, **LAYOUT)
    history = np.full((2, 2), LAYOUT["pad"])
    parts = []
    for first, last in ((0, 1), (1, 2), (2, 17), (17, 41)):
        chunk = tokens[:, first:last]
        parts.append(cpu.ngram_hash(chunk, history_BL=history, **LAYOUT))
        history = np.concatenate([history, chunk], axis=1)[:, -2:]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_hash_equals_the_reference_on_a_million_tokens() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 99092, (2, 500_000))
    starts = rng.random(tokens.shape) < 0.01
    half = (2**63 - 1) // 99092 // 2
    layout = {**LAYOUT, "multipliers": (rng.integers(0, half, 3) * 2 + 1).tolist()}
    layout["primes"] = [[2262413, 2262419], [4099, 2147483647]]
    plain = reference.ngram_hash(
        torch.from_numpy(tokens), document_starts_BT=torch.from_numpy(starts), **layout
    )
    fast = cpu.ngram_hash(tokens, document_starts_BT=starts, **layout)
    np.testing.assert_array_equal(fast, plain.numpy())


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("width", [1, 3, 8, 40, 83])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("streaming", [None, True])
def test_gathered_rows_are_the_tables_rows(dtype: type, width: int, threads: int, streaming: bool) -> None:
    rng = np.random.default_rng(3)
    table = rng.integers(0, 1000, (57, width)).astype(dtype)
    rows, how = rng.integers(0, 57, 1001), {"threads": threads, "streaming": streaming}
    np.testing.assert_array_equal(cpu.gather_rows(table, rows, **how), table[rows])
    np.testing.assert_array_equal(cpu.gather_rows(table[:, ::-1], rows, **how), table[rows][:, ::-1])
    assert cpu.gather_rows(table, rows[:0], **how).shape == (0, width)
    rows[:: 1000 // threads] = 57
    with pytest.raises(IndexError, match="outside"):
        cpu.gather_rows(table, rows, **how)


@pytest.mark.parametrize("part_rows", [1, 300, 5000])
def test_parts_are_complete_and_in_order_when_they_are_handed_over(part_rows: int) -> None:
    rng = np.random.default_rng(12)
    table, rows = rng.standard_normal((57, 40), dtype=np.float32), rng.integers(0, 57, 3001)
    out, last = np.full((3001, 40), np.nan, dtype=np.float32), 0
    with ThreadPoolExecutor(3) as pool:
        for part in gather.gather_parts(
            table, rows, out, part_rows=part_rows, threads=4, pool=pool, streaming=True
        ):
            assert part.start == last
            np.testing.assert_array_equal(out[part], table[rows[part]])
            last = part.stop
    assert last == 3001


def test_rows_are_gathered_from_a_read_only_memory_map(tmp_path: Path) -> None:
    table = np.arange(60, dtype=np.float32).reshape(15, 4)
    np.save(tmp_path / "table.npy", table)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    wanted = np.array([14, 0, 3, 3])
    np.testing.assert_array_equal(cpu.gather_rows(mapped, wanted), table[wanted])


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_segment_sums_equal_the_reference_bit_for_bit(count: int) -> None:
    rng = np.random.default_rng(4)
    rows = rng.integers(5, 2**33, 50)[rng.integers(0, 50, count)]
    grads = rng.standard_normal((count, 5), dtype=np.float32)
    unique, sums = cpu.segment_sum_rows(rows, grads)
    want_unique, want_sums = reference.segment_sum_rows(torch.from_numpy(rows), torch.from_numpy(grads))
    np.testing.assert_array_equal(unique, want_unique.numpy())
    np.testing.assert_array_equal(sums.view(np.int32), want_sums.numpy().view(np.int32))


def test_sums_of_a_row_do_not_depend_on_the_other_rows() -> None:
    rng = np.random.default_rng(5)
    rows, grads = rng.integers(0, 40, 500), rng.standard_normal((500, 6), dtype=np.float32)
    unique, sums = cpu.segment_sum_rows(rows, grads)
    mine = rows % 3 == 0
    part_unique, part_sums = cpu.segment_sum_rows(rows[mine], grads[mine])
    np.testing.assert_array_equal(sums[np.isin(unique, part_unique)], part_sums)


def test_merged_rows_add_where_both_have_them_and_copy_elsewhere() -> None:
    a = (np.array([1, 4, 9]), np.array([[1.0], [2.0], [3.0]], dtype=np.float32))
    b = (np.array([4, 5]), np.array([[10.0], [20.0]], dtype=np.float32))
    empty = (np.empty(0, dtype=np.int64), np.empty((0, 1), dtype=np.float32))
    rows, sums = cpu.merge_rows(a, b)
    assert rows.tolist() == [1, 4, 5, 9]
    assert sums[:, 0].tolist() == [1.0, 12.0, 20.0, 3.0]
    assert cpu.merge_rows(a, empty)[0].tolist() == [1, 4, 9]
    assert cpu.merge_rows(empty, b)[1][:, 0].tolist() == [10.0, 20.0]


def adam_state(rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((rows, width), dtype=np.float32)
    return weight, np.zeros_like(weight), np.zeros(rows, np.float32), np.zeros(rows, np.int64)


def test_rowwise_adam_equals_the_reference() -> None:
    rng = np.random.default_rng(7)
    fast, plain = adam_state(30, 11), tuple(torch.from_numpy(a) for a in adam_state(30, 11))
    for _ in range(4):
        rows = np.sort(rng.choice(30, 12, replace=False))
        grads = rng.standard_normal((12, 11), dtype=np.float32)
        options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
        cpu.rowwise_adam_(*fast, rows, grads, **options)
        reference.rowwise_adam_(*plain, torch.from_numpy(rows), torch.from_numpy(grads), **options)
    for mine, want in zip(fast, plain):
        np.testing.assert_allclose(mine, want.numpy(), rtol=2e-6, atol=1e-6)


def test_rowwise_adam_with_one_column_is_torch_adam() -> None:
    weight, m, v, t = adam_state(5, 1)
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    rng = np.random.default_rng(8)
    for _ in range(100):
        grads = rng.standard_normal((5, 1), dtype=np.float32)
        parameter.grad = torch.from_numpy(grads)
        adam.step()
        cpu.rowwise_adam_(weight, m, v, t, np.arange(5), grads, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8)
    assert np.abs(weight - parameter.detach().numpy()).max() <= 1e-6


def test_rowwise_adam_of_a_row_does_not_depend_on_the_call_it_is_in() -> None:
    grads = np.random.default_rng(9).standard_normal((20, 7), dtype=np.float32)
    together, apart = adam_state(20, 7), adam_state(20, 7)
    cpu.rowwise_adam_(*together, np.arange(20), grads, lr=0.1)
    for row in reversed(range(20)):
        cpu.rowwise_adam_(*apart, np.array([row]), grads[row : row + 1], lr=0.1)
    for mine, want in zip(apart, together):
        np.testing.assert_array_equal(mine, want)
    with pytest.raises(IndexError, match="outside"):
        cpu.rowwise_adam_(*together, np.array([20]), grads[:1], lr=0.1)


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_short_convolution_of_chunks_with_history_equals_the_whole(cut: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 13, 3), torch.randn(3, 4)
    whole = reference.short_conv(x, weight, dilation=2)
    left = reference.short_conv(x[:, :cut], weight, dilation=2)
    history = torch.cat([torch.zeros(2, 6, 3), x[:, :cut]], dim=1)
    right = reference.short_conv(x[:, cut:], weight, dilation=2, history_BLC=history)
    assert torch.equal(torch.cat([left, right], dim=1), whole)


def test_short_convolution_equals_torch_and_stops_at_documents() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 13, 3), torch.randn(3, 4)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (9, 0))
    want = torch.nn.functional.conv1d(padded, weight[:, None], dilation=3, groups=3).transpose(1, 2)
    torch.testing.assert_close(reference.short_conv(x, weight, dilation=3), want)
    starts = torch.zeros(1, 13, dtype=torch.bool)
    starts[0, 6] = True
    cut = reference.short_conv(x, weight, dilation=3, document_starts_BT=starts)
    assert torch.equal(cut[:, 6:], reference.short_conv(x[:, 6:], weight, dilation=3))


@pytest.mark.parametrize("first", [0, 1, 19])
def test_fused_hash_with_token_map_equals_the_reference(first: int) -> None:
    rng = np.random.default_rng(10)
    raw, token_map = rng.integers(0, 60, (2, 37)), rng.integers(0, 40, 60)
    starts = rng.random((2, 37)) < 0.15
    mapped = np.concatenate([np.full((2, 2), LAYOUT["pad"]), token_map[raw]], axis=1)
    starts[:, first] |= first > 0
    want = cpu.ngram_hash(token_map[raw], document_starts_BT=starts, **LAYOUT)[:, first:]
    tables = {k: torch.tensor(LAYOUT[k], device=DEVICE) for k in ("multipliers", "primes", "offsets")}
    got = rows.ngram_hash(
        torch.from_numpy(raw[:, first:]).to(DEVICE),
        multipliers=tables["multipliers"],
        orders=(2, 3),
        primes_OH=tables["primes"],
        offsets_OH=tables["offsets"],
        pad=LAYOUT["pad"],
        token_map_V=torch.from_numpy(token_map).to(DEVICE),
        history_BL=torch.from_numpy(mapped[:, first : first + 2]).to(DEVICE),
        document_starts_BT=torch.from_numpy(starts[:, first:]).to(DEVICE),
    )
    np.testing.assert_array_equal(got.cpu().numpy(), want)


@pytest.mark.parametrize("width", [4, 20])
def test_gather_kernel_copies_the_tables_rows(width: int) -> None:
    table = torch.randn(23, width, device=DEVICE)
    wanted = torch.randint(0, 23, (57,), device=DEVICE)
    out = torch.full((57, width), float("nan"), device=DEVICE)
    rows.gather_rows(table, wanted, out, programs=2, block=32, warps=1)
    assert torch.equal(out, table[wanted])
    ascending, order = torch.sort(wanted)
    out = torch.full_like(out, float("nan"))
    rows.gather_rows(table, ascending, out, order_N=order, programs=2, block=32, warps=1)
    assert torch.equal(out, table[wanted])
    with pytest.raises(ValueError, match="16 bytes"):
        rows.gather_rows(table[:, :3].contiguous(), wanted)


def test_a_host_table_is_an_ordinary_tensor() -> None:
    table = rows.host_table(5, 3, torch.bfloat16)
    table.copy_(torch.arange(15.0).view(5, 3))
    assert table[4].tolist() == [12.0, 13.0, 14.0]


@pytest.mark.parametrize("count", [0, 1, 90, 1100])
def test_segment_sum_kernel_equals_the_reference_bit_for_bit(count: int) -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 7, (count,))
    grads = torch.randn(count, 37)
    unique, sums = rows.segment_sum_rows(index.to(DEVICE), grads.to(DEVICE))
    want_unique, want_sums = reference.segment_sum_rows(index, grads)
    assert torch.equal(unique.cpu(), want_unique)
    assert torch.equal(sums.cpu(), want_sums)


def fusion_of(tensors: list[torch.Tensor]) -> reference.Fusion:
    """Three different constants, so that one in another's place is seen."""
    names = ("conv_CK", "query_norm_C", "key_norm_C", "value_norm_C")
    return reference.Fusion(**dict(zip(names, tensors)), dilation=3, gate_eps=0.1, conv_eps=0.4)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("tokens", "channels", "taps"), [(11, 6, 4), (37, 5, 3)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("is_shared_out", [False, True])
def test_fused_gate_and_convolution_equal_the_reference(
    is_shared_out: bool,
    documents: bool,
    tokens: int,
    channels: int,
    taps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    if is_shared_out:
        # Every program goes over several tokens or walks, as it does with many of them.
        for name, size in (("TOKEN_PROGRAMS", 7), ("WALK_ROWS", 8), ("SUM_ROWS", 4)):
            monkeypatch.setattr(fusion, name, size)
    shapes = [(2, tokens, channels), (2, tokens, 2 * channels), (channels, taps)] + [(channels,)] * 3
    tensors = [torch.randn(*shape, device=DEVICE) for shape in shapes]
    # A hidden state whose gate is in the flat part of the signed square root.
    tensors[0][0, 3] = 0.0
    starts = torch.rand(2, tokens, device=DEVICE) < 0.2 if documents else None
    plain, fused = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))

    key, value = plain[1].chunk(2, dim=-1)
    want = reference.memory_output(plain[0], key, value, fusion_of(plain[2:]), document_starts_BT=starts)
    got = fusion.memory_output(*fused[:2], fusion_of(fused[2:]), document_starts_BT=starts)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    for mine, theirs in zip(fused, plain):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [80, 256])
def test_rows_fetched_from_host_memory_are_the_tables_rows(width: int) -> None:
    table = rows.host_table(50_000, width, torch.bfloat16)
    table.copy_(torch.randn(50_000, width))
    wanted = torch.randint(0, 50_000, (9, 4099), device="cuda")
    for ascending in (False, True):
        direct = fetch.RowFetcher(table, programs=4, ascending=ascending).fetch(wanted)
        assert torch.equal(direct.wait().cpu(), table[wanted.flatten().cpu()])
    device = torch.device("cuda")
    staged = fetch.StagedRowFetcher(table, max_rows=9 * 4099, threads=2, device=device, part_bytes=1 << 20)
    for _ in range(3):
        got = staged.fetch(wanted.flatten().cpu().numpy()).result().wait()
        assert torch.equal(got.cpu(), table[wanted.flatten().cpu()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_hash_on_the_gpu_equals_the_cpu_on_a_million_tokens() -> None:
    rng = np.random.default_rng(11)
    tokens, starts = rng.integers(0, 99092, (2, 500_000)), rng.random((2, 500_000)) < 0.01
    half = (2**63 - 1) // 99092 // 2
    layout = {**LAYOUT, "multipliers": (rng.integers(0, half, 3) * 2 + 1).tolist()}
    want = cpu.ngram_hash(tokens, document_starts_BT=starts, **layout)
    tables = {k: torch.tensor(layout[k], device="cuda") for k in ("multipliers", "primes", "offsets")}
    got = rows.ngram_hash(
        torch.from_numpy(tokens).cuda(),
        multipliers=tables["multipliers"],
        orders=(2, 3),
        primes_OH=tables["primes"],
        offsets_OH=tables["offsets"],
        pad=layout["pad"],
        document_starts_BT=torch.from_numpy(starts).cuda(),
    )
    np.testing.assert_array_equal(got.cpu().numpy(), want)
