"""Table rows that are copied beside the steps: those of one commit, however many steps overwrite them meanwhile."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import LocalFleet, train
from test_across_slots import slabs_run
from test_background_save import finish
from test_staged_memory import KEYS, ROWS, addresses_of, plain_step, staged, staged_step
from test_whole_slot import whole_run

from sparseray.actors.state import kept_rows
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.state.reading import Reading
from sparseray.actors.state.staged_memory import StagedMemory
from sparseray.actors.training import background_save
from sparseray.actors.training.background_save import BackgroundSave
from sparseray.actors.wire.messages import SavedTensor
from sparseray.platform.composition import Run
from sparseray.platform.run import checkpoint

SPANS = {step: [(0, ROWS), (0, 40), (700, 800)][step % 3] for step in range(40)}
"""Steps read all of the tables, a few rows of the first bucket, or those on both sides of a bucket's end."""


def step_of(shard: StagedMemory, step: int) -> None:
    staged_step(shard, lambda of: addresses_of(SPANS, of), step)
    shard.apply(lr=0.01, scale=0.5)


def by_message(shard: StagedMemory, step: int) -> None:
    plain_step(shard, addresses_of(SPANS, step), step)
    shard.apply(lr=0.01, scale=0.5)


def cloned(shard: MemoryShard) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in shard.tensors(KEYS).items()}


class Interrupted(torch.Tensor):
    """Room for a copy: between its two halves, and before each, something else happens."""

    between: Callable[[], None]

    def __getitem__(self, rows: Any) -> "Interrupted":
        found: Interrupted = super().__getitem__(rows)  # type: ignore[assignment]
        if hasattr(self, "between"):
            found.between = self.between
        return found

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        own, half = self.as_subclass(torch.Tensor), len(source) // 2
        self.between()
        own[:half].copy_(source[:half])
        self.between()
        return own[half:].copy_(source[half:])


def room_for(tensors: dict[str, torch.Tensor], between: Callable[[], None]) -> dict[str, torch.Tensor]:
    rooms = {name: torch.empty_like(tensor).as_subclass(Interrupted) for name, tensor in tensors.items()}
    for room in rooms.values():
        room.between = between
    return rooms


def interrupt(
    monkeypatch: pytest.MonkeyPatch, shards: list[StagedMemory], between: Callable[[], None]
) -> None:
    """Have something else happen within every copy of a table in the background; others are copied at once."""
    take = background_save._host_memory

    def is_table(tensor: torch.Tensor) -> bool:
        tables = [table for shard in shards for table in shard.tables]
        fields = [field for table in tables for field in (table.weight, table.m, table.v, table.t)]
        return any(0 <= tensor.data_ptr() - field.ctypes.data < field.nbytes for field in fields)

    def rooms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        found = take(tensors)
        for index, tensor in enumerate(tensors):
            if is_table(tensor):
                found[index] = found[index].as_subclass(Interrupted)
                found[index].between = between  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(background_save, "_host_memory", rooms)


def interrupt_runs(monkeypatch: pytest.MonkeyPatch, between: Callable[[], None]) -> list[StagedMemory]:
    """As `interrupt`, for the memory of every slot that begins from now on, which is added to the result."""
    build, shards = StagedMemory.__init__, list[StagedMemory]()

    def noted(me: StagedMemory, *arguments: Any, **options: Any) -> None:
        build(me, *arguments, **options)
        shards.append(me)

    monkeypatch.setattr(StagedMemory, "__init__", noted)
    interrupt(monkeypatch, shards, between)
    return shards


@pytest.mark.one_in(3)
@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", [step_of, by_message])
@pytest.mark.parametrize("ranges", [1, 3])
def test_steps_in_the_middle_of_every_copy_leave_it_as_it_was(
    row_dtype: str, way: Callable[[StagedMemory, int], None], ranges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is written back before, within and after the copy of each field of each range of a bucket."""
    one, undisturbed = staged(row_dtype), staged(row_dtype)
    steps = iter(range(3, 200))
    for step in (1, 2):
        way(one, step)
    wanted = cloned(one)

    def between() -> None:
        way(one, next(steps))
        one.settle()

    row_bytes = sum(field[:1].nbytes for field in one.tensors(KEYS[:1]).values())
    monkeypatch.setattr(kept_rows, "PIECE_BYTES", row_bytes * (300 if ranges > 1 else ROWS))
    kept = one.begin_copy()
    assert kept is not None
    copies = room_for(wanted, between)
    assert kept.copy(one.tensors(KEYS), copies, Reading())
    kept.end()
    last = next(steps)
    assert last == 3 + 2 * 4 * len(KEYS) * ranges
    assert all(torch.equal(copies[name].as_subclass(torch.Tensor), wanted[name]) for name in wanted)
    for step in range(1, last):
        way(undisturbed, step)
    after, theirs = cloned(one), cloned(undisturbed)
    assert all(torch.equal(after[name], theirs[name]) for name in after)
    assert not all(torch.equal(after[name], wanted[name]) for name in wanted)


def test_a_row_is_kept_once_and_not_when_it_is_copied() -> None:
    shard = staged()
    kept = shard.begin_copy()
    assert kept is not None
    whole = torch.cat([rows[1].flatten() for rows in addresses_of({}, 1)]).unique()

    def step_again() -> list[int]:
        staged_step(shard, lambda of: addresses_of({}, 1), 1)
        shard.apply(lr=0.01, scale=0.5)
        shard.settle()
        return [len(rows) for rows, _ in kept._kept[0] if len(rows)]

    assert step_again() == step_again() == [len(whole)]
    live = shard.tensors(KEYS, with_optimizer=False)
    assert kept.copy(live, {name: tensor.clone() for name, tensor in live.items()}, Reading())
    step_of(shard, 3)
    assert step_again() == [len(whole)]
    kept.end()
    assert step_again() == [] and not shard._kept


def test_an_update_waits_for_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    shard, saving, dense = staged(), BackgroundSave(), torch.ones(3)
    begun, gate = threading.Event(), threading.Event()

    def between() -> None:
        begun.set()
        assert gate.wait(30.0), "nobody opened"

    interrupt(monkeypatch, [shard], between)
    written: dict[str, torch.Tensor] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
        written.update({name: tensor.as_subclass(torch.Tensor) for name, tensor in tensors.items()})
        return {}

    step_of(shard, 1)
    wanted = cloned(shard) | {"dense": torch.ones(3)}
    # Tensors of both kinds in one file, as servers are offered them.
    saving.start(1, {"": {**shard.tensors(KEYS), "dense": dense}}, write, shard.begin_copy())
    waited = threading.Thread(target=saving.wait_until_copied)
    waited.start()
    waited.join(10.0)
    assert not waited.is_alive()
    dense.zero_()
    assert begun.wait(10.0)
    for step in range(2, 6):
        step_of(shard, step)
    assert saving.take() is None
    gate.set()
    finish(saving)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in written.items())


def test_a_checkpoint_whose_tables_are_copied_over_four_steps_is_of_its_own(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of its copy waits for a later step's commit, which so cannot wait for the copy."""
    config = whole_run(corpus, steps=8, checkpoint_every=2)
    two = train(tmp_path / "two", whole_run(corpus, steps=8), stop_after=2)
    halves = 2 * 4 * config.model.dse.num_buckets
    committed, count, last = threading.Condition(), 0, 0

    def between() -> None:
        nonlocal count
        with committed:
            assert committed.wait_for(lambda: last >= 3 + 4 * count // halves, 20.0), "no step meanwhile"
        count += 1

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        nonlocal last
        with committed:
            last = step
            committed.notify()

    interrupt_runs(monkeypatch, between)
    saved = train(tmp_path / "saved", config, at_step=at_step)
    written = checkpoint.read_manifest(checkpoint.list_finished(saved.folder.checkpoints)[0])
    assert count >= halves and written["step"] == 2 and written["digest"] == two.digest


@pytest.mark.long
def test_a_copy_that_fails_costs_a_checkpoint_and_no_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, is_broken = train(tmp_path / "plain", whole_run(corpus, steps=8)), True

    def between() -> None:
        nonlocal is_broken
        if is_broken:
            is_broken = False
            raise RuntimeError("the rows cannot be copied")

    shards = interrupt_runs(monkeypatch, between)
    found = train(tmp_path / "run", whole_run(corpus, steps=8, checkpoint_every=4, keep_checkpoints=8))
    assert not is_broken and found.curve == plain.curve and found.digest == plain.digest
    assert not any(shard._kept for shard in shards), "no row is kept any longer"
    (unsaved,) = [event for event in found.folder.event_lines() if event["kind"] == "unsaved"]
    assert "the rows cannot be copied" in str(unsaved)
    assert [path.name for path in checkpoint.list_finished(found.folder.checkpoints)] == ["step_8"]


@pytest.mark.long
def test_a_change_of_plan_in_the_middle_of_a_copy_changes_no_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slots apply what came by message; one is killed while all copy their tables."""
    config = slabs_run(corpus, slots=3, replication=2)
    undisturbed = train(tmp_path / "undisturbed", slabs_run(corpus))
    copying, killed = threading.Event(), threading.Event()

    def between() -> None:
        copying.set()
        # Not for longer than the plan waits.
        killed.wait(1.0)
        time.sleep(0.005)

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == 5:
            assert copying.wait(10.0)
            fleet.kill(1)
            killed.set()

    interrupt_runs(monkeypatch, between)
    found = train(tmp_path / "run", config, at_step=at_step)
    assert killed.is_set() and "recovered" in found.events
    assert found.curve == undisturbed.curve and found.digest == undisturbed.digest
