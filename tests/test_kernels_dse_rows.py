"""A step's memory rows: which they are, their sums, norms and update on a device, and their way back into a table."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)

from sparseray.kernels.dse import cpu, staging
from sparseray.kernels.row_ops import PlainRowOps
from sparseray.kernels.triton_ops import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = PlainRowOps()
TABLE_ROWS = 300_001
ADAM = {"scale": 0.7, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "seed": 7}


def addresses(count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    return rng.integers(5, TABLE_ROWS, 60)[rng.integers(0, 60, count)]


def found(wanted: list[np.ndarray]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """(distinct rows, of each part the places, order and beginnings), from a set that had other rows before."""
    rows = staging.RowSet(TABLE_ROWS)
    rows.open([np.arange(0, TABLE_ROWS, 7)])
    rows.close()
    ids = np.empty(rows.open(wanted), np.int64)
    rows.list(ids)
    parts = []
    for part in wanted:
        parts.append(tuple(np.empty(size, np.int32) for size in (len(part), len(part), len(ids) + 1)))
        rows.segments(part, *parts[-1])
    return ids, parts


@pytest.mark.parametrize("counts", [(1,), (7, 1, 30), (5000, 3)])
def test_distinct_rows_are_rising_and_every_address_finds_its_own(counts: tuple[int, ...]) -> None:
    wanted = [addresses(count) for count in counts]
    rows, parts = found(wanted)
    np.testing.assert_array_equal(rows, np.unique(np.concatenate(wanted)))
    for part, (places, order, first) in zip(wanted, parts):
        np.testing.assert_array_equal(rows[places], part)
        assert first[0] == 0 and first[-1] == len(part)
        for u, row in enumerate(rows):
            np.testing.assert_array_equal(order[first[u] : first[u + 1]], np.flatnonzero(part == row))


@pytest.mark.parametrize("row", [-1, TABLE_ROWS])
def test_a_row_outside_the_table_is_told_and_leaves_nothing_in_the_set(row: int) -> None:
    rows = staging.RowSet(TABLE_ROWS)
    with pytest.raises(IndexError, match=rf"rows\[2\]={row} is outside the table's {TABLE_ROWS} rows"):
        rows.open([np.array([5, 3, row, 4])])
    assert rows.open([np.array([TABLE_ROWS - 1, 0])]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_have_the_bits_of_a_shards_and_absent_rows_have_none(dtype: torch.dtype) -> None:
    wanted, grads = addresses(900), torch.randn(900, 13).to(dtype)
    _, ((_, order, first),) = found([wanted])
    # Rows 1 and 2 are read by another part of the step.
    order, first = torch.from_numpy(order), torch.from_numpy(np.insert(first, [1, 1], first[1]))
    _, sums = cpu.segment_sum_rows(wanted, grads.float().numpy())
    expected = np.insert(sums, [1, 1], 0.0, axis=0)
    np.testing.assert_array_equal(PLAIN.row_sums(grads, order, first).numpy(), expected)
    summed = TRITON.row_sums(grads.to(DEVICE), order.to(DEVICE), first.to(DEVICE))
    np.testing.assert_array_equal(summed.cpu().numpy(), expected)


def test_norms_of_ranges_are_those_of_their_rows() -> None:
    x, first = torch.randn(700, 11), torch.tensor([0, 3, 3, 650, 700])
    expected = torch.stack(
        [x[a:b].double().square().sum() for a, b in ((0, 3), (3, 3), (3, 650), (650, 700))]
    )
    for found in (PLAIN.range_norms(x, first), TRITON.range_norms(x.to(DEVICE), first.to(DEVICE))):
        torch.testing.assert_close(found.cpu(), expected.float())


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(5, torch.bfloat16), (16, torch.bfloat16), (33, torch.float32), (300, torch.bfloat16)],
)
def test_the_update_is_that_of_a_shard_and_rounds_by_the_same_noise(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows = torch.from_numpy(np.unique(addresses(90)) + 2**40)
    count = len(rows)
    sums = torch.randn(count, width)
    state = [
        torch.randn(count, width).to(dtype),
        0.1 * torch.randn(count, width),
        torch.rand(count),
        torch.randint(0, 9, (count,)),
    ]
    plain, kernel = [x.clone() for x in state], [x.to(DEVICE, copy=True) for x in state]
    PLAIN.row_adam(*plain, rows, sums, **ADAM)
    TRITON.row_adam(*kernel, rows.to(DEVICE), sums.to(DEVICE), **ADAM)
    for mine, theirs in zip(kernel[1:], plain[1:]):
        torch.testing.assert_close(mine.cpu(), theirs)
    if dtype == torch.float32:
        torch.testing.assert_close(kernel[0].cpu(), plain[0])
    else:
        # With other noise a third of them would be one of the other two neighbours.
        assert (kernel[0].cpu() != plain[0]).float().mean() < 0.005
        assert (plain[0] != state[0]).any()


def test_what_is_no_number_stays_so_and_what_is_infinite_is_not_rounded() -> None:
    weight = torch.tensor(
        [[float("inf"), -float("inf"), float("nan"), 1.0]], dtype=torch.bfloat16, device=DEVICE
    )
    m, v, t, ids = (torch.zeros(*s, device=DEVICE) for s in ((1, 4), (1,), (1,), (1,)))
    TRITON.row_adam(weight, m, v, t.long(), ids.long(), torch.zeros_like(m), **ADAM)
    assert weight[0, [0, 1, 3]].tolist() == [float("inf"), -float("inf"), 1.0] and weight[0, 2].isnan()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("width", [1, 24])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_leave_their_places_and_go_back_there_alone(width: int, dtype: type, threads: int) -> None:
    rng = np.random.default_rng(0)
    shapes = ((width, dtype), (width, np.float32), (1, np.float32), (1, np.int64))
    tables = [
        [rng.integers(0, 1000, (size, columns)).astype(kind) for columns, kind in shapes]
        for size in (9000, 50)
    ]
    rows = [np.sort(rng.permutation(len(table[0]))[: len(table[0]) // 2]) for table in tables]
    copies = [[np.empty_like(field[: len(ids)]) for field in table] for ids, table in zip(rows, tables)]
    with ThreadPoolExecutor(3) as pool:
        staging.gather_fields(list(zip(rows, tables, copies)), threads=threads, pool=pool)
        for ids, table, fields in zip(rows, tables, copies):
            for of_all, field in zip(table, fields):
                np.testing.assert_array_equal(of_all[ids], field)
        changed = [[field + 1 for field in fields] for fields in copies]
        wanted = [[field.copy() for field in table] for table in tables]
        staging.scatter_fields(list(zip(rows, tables, changed)), threads=threads, pool=pool)
    for ids, table, fields, before in zip(rows, tables, changed, wanted):
        for of_all, field, want in zip(table, fields, before):
            want[ids] = field
            np.testing.assert_array_equal(of_all, want)


@pytest.mark.parametrize(("width", "dtype"), [(16, torch.bfloat16), (5, torch.float32)])
def test_tokens_read_their_rows(width: int, dtype: torch.dtype) -> None:
    rows, places = torch.randn(37, width).to(dtype), torch.randint(0, 37, (101,), dtype=torch.int32)
    found = TRITON.take_rows(rows.to(DEVICE), places.to(DEVICE))
    assert torch.equal(found.cpu(), rows[places]) and torch.equal(PLAIN.take_rows(rows, places), rows[places])


@pytest.mark.parametrize(("ours", "theirs"), [(50, 70), (33, 1), (1, 40), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_a_later_commit_are_taken_over_and_no_others(
    ours: int, theirs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(ours)

    def listed(count: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        ids = torch.randperm(100)[:count].sort().values + 2**33
        return ids, (
            torch.randn(count, 12).to(dtype),
            torch.randn(count, 12),
            torch.rand(count),
            torch.arange(count),
        )

    (own_ids, own), (new_ids, new) = listed(ours), listed(theirs)
    wanted = [field.clone() for field in own]
    for here, row in enumerate(own_ids.tolist()):
        for there in (new_ids == row).nonzero().flatten().tolist():
            for field, newer in zip(wanted, new):
                field[here] = newer[there]
    for ops, device in ((PLAIN, "cpu"), (TRITON, DEVICE)):
        fields, newer = (tuple(x.to(device, copy=True) for x in of) for of in (own, new))
        ops.take_newer(fields, own_ids.to(device), newer, new_ids.to(device))
        for field, want in zip(fields, wanted):
            assert torch.equal(field.cpu(), want)
