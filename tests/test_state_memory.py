"""Memory tables: what is given away gives its memory back, bfloat16 rows train, peers read without asking."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loads import load_keys

from sparseray.actors.exchange.neighbours import NeighbourTables
from sparseray.actors.state import tables
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.state.tables import SharedTable, TableView
from sparseray.actors.wire.messages import TableHandle
from sparseray.kernels.dse import cpu
from sparseray.model.config import DSEConfig, ModelConfig
from sparseray.model.presets import preset

UPDATE = {"lr": 0.01, "scale": 1.0}


def model_of(*, width: int = 16, buckets: int = 4, row_dtype: str = "float32") -> ModelConfig:
    dse = DSEConfig(layers=(1,), head_dim=width, num_buckets=buckets, row_dtype=row_dtype)
    return replace(preset("tiny"), dse=dse)


def shard_of(model: ModelConfig, num_rows: int = 1000) -> MemoryShard:
    return MemoryShard(model, [num_rows], seed=5, num_parts=1, betas=(0.9, 0.95), eps=1e-8)


def holding(shard: MemoryShard, buckets: list[int]) -> MemoryShard:
    keys = [(0, bucket) for bucket in buckets]
    shard.initialize(keys)
    shard.assign(keys, keys, generation=1)
    return shard


def update(shard: MemoryShard, step: int) -> None:
    """The update of a step: the same for a row whoever holds it."""
    for layer, bucket in shard.owned:
        start, stop = shard.bounds[layer][bucket : bucket + 2]
        rows = np.arange(start, stop, 3)
        generator = np.random.default_rng([step, bucket])
        shard.reduced[(layer, bucket)] = (
            rows,
            generator.standard_normal((len(rows), shard.config.head_dim), dtype=np.float32),
        )
    shard.apply(**UPDATE)


def resident_bytes() -> int:
    """Memory of this process by the kernel's count."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_falls_when_buckets_are_given_away() -> None:
    shard = holding(shard_of(model_of(width=64), 200_000), [0, 1, 2, 3])
    full, before = shard.num_bytes, resident_bytes()
    assert full > 100e6 and abs(shard.tables[0].num_bytes - full) < 1e6
    kept = shard.gather(0, torch.arange(50_000, 100_000, 7)).clone()
    shard.assign([(0, 1)], [(0, 1)])
    assert shard.tables[0].num_bytes > 0.99 * full, "a peer can still copy what is no longer assigned"
    shard.trim()
    assert abs(shard.tables[0].num_bytes - full / 4) < 1e6
    assert before - resident_bytes() > 0.7 * full
    assert torch.equal(shard.gather(0, torch.arange(50_000, 100_000, 7)), kept)
    shard.assign([], [])
    shard.trim()
    assert shard.tables[0].num_bytes < 1e5
    holding(shard, [0, 1, 2, 3])
    assert torch.equal(shard.gather(0, torch.arange(50_000, 100_000, 7)), kept)


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_rows_have_the_same_bits_however_buckets_are_spread_and_moved(row_dtype: str) -> None:
    model = model_of(width=11, row_dtype=row_dtype)
    whole = holding(shard_of(model), [0, 1, 2, 3])
    left, right = holding(shard_of(model), [0, 2]), holding(shard_of(model), [1, 3])
    for shard in (whole, left, right):
        update(shard, 1)
    moved = [(0, 2), (0, 3)]
    load_keys(right, moved[:1], {k: v.clone() for k, v in left.tensors(moved[:1]).items()}, 1)
    right.assign([(0, 1), *moved], moved, generation=2)
    left.assign([(0, 0)], [(0, 0)], generation=2)
    for shard in (whole, left, right):
        update(shard, 2)
        shard.trim()
    for key in whole.owned:
        holder = left if key in left.held else right
        for name, tensor in whole.tensors([key]).items():
            assert torch.equal(holder.tensors([key])[name], tensor), name


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_without_optimizer_state_its_memory_is_not_taken(row_dtype: str) -> None:
    model = model_of(width=64, row_dtype=row_dtype)
    source, served = holding(shard_of(model, 40_000), [0, 1]), shard_of(model, 40_000)
    tensors = source.tensors(source.owned, with_optimizer=False)
    assert list(tensors) == ["dse.1.bucket.0", "dse.1.bucket.1"]
    assert all(tensor.dtype == getattr(torch, row_dtype) for tensor in tensors.values())
    load_keys(served, source.owned, tensors, 0, with_optimizer=False)
    weights = sum(tensor.nbytes for tensor in tensors.values())
    assert weights == 20_000 * 64 * (2 if row_dtype == "bfloat16" else 4)
    assert abs(served.tables[0].num_bytes - weights) < 20_000
    rows = np.array([5, 19_999, 5])
    assert torch.equal(served.gather(0, torch.from_numpy(rows)), source.gather(0, torch.from_numpy(rows)))


def test_bfloat16_rows_take_half_the_bytes_of_rows() -> None:
    exact, half = (model_of(width=64, row_dtype=kind) for kind in ("float32", "bfloat16"))
    bytes_of = [holding(shard_of(model, 40_000), [0, 1, 2, 3]).num_bytes for model in (exact, half)]
    assert bytes_of[0] - bytes_of[1] == 40_000 * 64 * 2
    assert bytes_of[1] == 40_000 * (64 * 2 + 64 * 4 + 4 + 8)


def test_stochastic_rounding_is_one_of_two_neighbours_and_exact_in_the_mean() -> None:
    rows, width = 20_000, 8
    exact = np.float32(1.0 + 2**-8 * 0.3)
    drawn = np.empty((rows, width), np.float32)
    for seed in (0, 1):
        weight = np.full((rows, width), 0x3F80, np.uint16)
        state = np.zeros((rows, width), np.float32), np.zeros(rows, np.float32), np.zeros(rows, np.int64)
        # The first step of Adam is lr in the direction of the gradient.
        gradient = np.full((rows, width), -1.0, np.float32)
        cpu.rowwise_adam_(weight, *state, np.arange(rows), gradient, lr=float(exact) - 1, eps=0.0, seed=seed)
        found = cpu.widen(weight)
        assert set(np.unique(found)) == {np.float32(1), np.float32(1 + 2**-7)}
        assert abs(found.mean() - exact) < 4 * 2**-7 * (0.15 * 0.85 / found.size) ** 0.5
        assert seed == 0 or not np.array_equal(found, drawn)
        drawn = found
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.03


def test_tiny_updates_of_bfloat16_rows_add_up() -> None:
    """To the nearest, none of them would ever count: a step is a hundredth of the distance of two numbers."""
    rows, steps, lr = 500, 1000, 2**-7 / 100
    weight = np.full((rows, 8), 0x3F80, np.uint16)
    state = np.zeros((rows, 8), np.float32), np.zeros(rows, np.float32), np.zeros(rows, np.int64)
    for _ in range(steps):
        cpu.rowwise_adam_(weight, *state, np.arange(rows), np.full((rows, 8), -1.0, np.float32), lr=lr)
    assert abs(cpu.widen(weight).mean() - (1 + steps * lr)) < 0.05 * steps * lr


def test_what_is_exact_or_no_number_is_not_rounded() -> None:
    weight = np.array([[0x3F80, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x8000]], np.uint16)
    before = weight.copy()
    state = np.zeros((1, 6), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int64)
    cpu.rowwise_adam_(weight, *state, np.array([0]), np.zeros((1, 6), np.float32), lr=0.0)
    np.testing.assert_array_equal(weight, before)


# -- rows read by another process ------------------------------------------------------------------


def open_view(table: SharedTable) -> TableView:
    view = TableView.open(table.handle)
    assert view is not None
    return view


def test_a_reader_gets_rows_of_the_wanted_commit_or_none() -> None:
    shard = holding(shard_of(model_of()), [0, 1, 2, 3])
    view, rows = open_view(shard.tables[0]), np.array([3, 999, 3, 0])
    out = np.empty((4, 16), np.float32)
    first = shard.gather(0, torch.from_numpy(rows)).numpy()
    assert not view.gather(rows, out, generation=2, step=0), "of a plan that is not installed at the owner"
    assert not view.gather(rows, out, generation=1, step=1), "the owner has still to apply the commit"
    assert view.gather(rows, out, generation=1, step=0)
    np.testing.assert_array_equal(out, first)
    update(shard, 1)
    assert not view.gather(rows, out, generation=1, step=0), "the owner is ahead"
    assert view.gather(rows, out, generation=1, step=1)
    np.testing.assert_array_equal(out, shard.gather(0, torch.from_numpy(rows)).numpy())
    assert not np.array_equal(out, first)
    load_keys(shard, [(0, 0)], shard.tensors([(0, 0)]), 1)
    assert not view.gather(rows, out, generation=1, step=1), "rows are coming, no plan says yet what they are"


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_tables_of_a_neighbour_are_read_until_its_rows_are_others(row_dtype: str) -> None:
    shard = holding(shard_of(model_of(row_dtype=row_dtype)), [0, 1])
    rows, near = torch.tensor([3, 0, 499]), NeighbourTables(generation=1)
    assert near.gather(7, [rows], 0) is None, "nobody has said yet where its tables are"
    near.introduce(7, shard.handles)
    (found,) = near.gather(7, [rows], 0) or ()
    assert found.dtype == getattr(torch, row_dtype) and torch.equal(found, shard.gather(0, rows))
    update(shard, 1)
    assert near.gather(7, [rows], 0) is None
    (found,) = near.gather(7, [rows], 1) or ()
    assert torch.equal(found, shard.gather(0, rows))
    shard.assign(shard.owned, shard.owned, generation=2)
    assert near.gather(7, [rows], 1) is None, "of a later plan"
    near.introduce(8, [replace(handle, namespace="elsewhere") for handle in shard.handles])
    assert near.gather(8, [rows], 1) is None, "on another host"


def test_rows_that_change_while_they_are_read_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = holding(shard_of(model_of()), [0, 1])
    view, out = open_view(shard.tables[0]), np.empty((1, 16), np.float32)
    plain = tables.gather_rows

    def slowly(*arguments: np.ndarray) -> np.ndarray:
        found = plain(*arguments)
        update(shard, 1)
        return found

    monkeypatch.setattr(tables, "gather_rows", slowly)
    assert not view.gather(np.array([0]), out, generation=1, step=0)


def read_until_told(handle: TableHandle, pipe: Connection) -> None:
    """In another process: gather all rows as often as possible, and report a mixture of two commits."""
    view = TableView.open(handle)
    assert view is not None
    rows, out = np.arange(handle.num_rows), np.empty((handle.num_rows, handle.width), np.float32)
    seen, taken, refused = set(), 0, 0
    assert view.gather(rows, out, generation=1, step=0)
    pipe.send("ready")
    while not pipe.poll():
        step = int(view._words[tables.VERSION]) & 0xFFFFFFFF
        if view.gather(rows, out, generation=1, step=step):
            seen.add(step)
            taken += 1
            if not (out == step).all():
                pipe.send(f"rows of step {step} are {np.unique(out)}")
                return
        else:
            refused += 1
    pipe.send((len(seen), taken, refused))


def test_another_process_never_sees_a_mixture_of_two_commits() -> None:
    table = SharedTable(20_000, 16, "float32")
    table.weight[:] = 0
    table.publish(tables.version_of(1, 0))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=read_until_told, args=(table.handle, theirs))
    reader.start()
    try:
        assert ours.poll(60) and ours.recv() == "ready"
        for step in range(1, 301):
            table.change()
            for start in range(0, table.num_rows, 2000):
                table.weight[start : start + 2000] = step
            table.publish(tables.version_of(1, step))
            assert not ours.poll(0.002), ours.recv()
        ours.send("enough")
        assert ours.poll(60)
        seen, taken, refused = ours.recv()
        assert seen > 3 and taken > 10 and refused > 3
    finally:
        reader.kill()
        reader.join()


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_without_memfd_tables_are_files_that_nobody_can_leave_behind(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tables.shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tables.log, "propagate", True)
    monkeypatch.setattr(tables.log.parent, "propagate", True)
    before = set(os.listdir(tables.SHARED_MEMORY))
    shard = holding(shard_of(model_of(width=64), 20_000), [0, 1, 2, 3])
    assert set(os.listdir(tables.SHARED_MEMORY)) <= before and not os.listdir(tmp_path)
    assert ("has room for 0 of" in caplog.text) == (room == 0)
    rows, out = np.array([19_999, 0]), np.empty((2, 64), np.float32)
    assert open_view(shard.tables[0]).gather(rows, out, generation=1, step=0)
    np.testing.assert_array_equal(out, shard.gather(0, torch.from_numpy(rows)).numpy())
    full = shard.tables[0].num_bytes
    shard.assign([(0, 0)], [(0, 0)])
    shard.trim()
    assert shard.tables[0].num_bytes < 0.3 * full


OWNER = (
    "import json, sys; from dataclasses import asdict; from sparseray.actors.state.tables import SharedTable;"
    "table = SharedTable(500_000, 16, 'float32'); table.weight[:] = 1; table.publish(0);"
    "print(json.dumps(asdict(table.handle)), flush=True); sys.stdin.read()"
)


def test_a_killed_owner_leaves_nothing_behind_and_its_readers_go_on(tmp_path: Path) -> None:
    def leftovers() -> set[str]:
        return {str(p) for root in ("/dev/shm", tmp_path) for p in Path(root).glob("*")}

    before = leftovers()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        assert owner.stdout is not None
        values = json.loads(owner.stdout.readline())
        view = TableView.open(TableHandle(**values))
        assert view is not None
        assert TableView.open(TableHandle(**{**values, "token": 1})) is None, "another table at that place"
        assert TableView.open(TableHandle(**{**values, "namespace": "elsewhere"})) is None
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert leftovers() <= before
    assert TableView.open(TableHandle(**values)) is None
    out = np.empty((2, 16), np.float32)
    assert view.gather(np.array([0, 499_999]), out, generation=0, step=0) and (out == 1).all()
