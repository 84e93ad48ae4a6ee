"""A change of plan in the middle of a checkpoint that is written beside the steps: nobody waits, and no bit differs."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from local_cluster import LocalFleet, Trained, train
from test_across_slots import slabs_run
from test_kept_rows import interrupt_runs

from sparseray.actors.roles import Roles as SlotRoles
from sparseray.actors.state import kept_rows
from sparseray.actors.wire.messages import SavedTensor
from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig
from sparseray.platform.fleet.job import SlotJob
from sparseray.platform.planning.inventory import Roles
from sparseray.platform.run import checkpoint

STEPS, SAVED, CHANGED, OPENED = 14, 4, 6, 9
"""Of a run; the checkpoint that is cut off; when; and when its files may be closed."""


def run_of(corpus: Path, *, slots: int, **cluster: object) -> RunConfig:
    config = slabs_run(corpus, slots=slots, **cluster)
    train_config = replace(config.train, steps=STEPS, checkpoint_every=SAVED, keep_checkpoints=99)
    return replace(config, train=train_config)


def digests(found: Trained) -> dict[int, str]:
    """Of every checkpoint that counts, by its step."""
    manifests = map(checkpoint.read_manifest, checkpoint.list_finished(found.folder.checkpoints))
    return {manifest["step"]: manifest["digest"] for manifest in manifests}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One slot that waits for a checkpoint of every step."""
    config = run_of(corpus, slots=1)
    config = replace(config, train=replace(config.train, checkpoint_every=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparseray.platform.device.host_bytes", lambda: 1000)
        return train(tmp_path_factory.mktemp("undisturbed") / "run", config)


def kill(run: Run, fleet: LocalFleet) -> None:
    fleet.kill(1)


def grow(run: Run, fleet: LocalFleet) -> None:
    run.generations.ask(roles=Roles(attention=4, experts=4, memory=4))


def shrink(run: Run, fleet: LocalFleet) -> None:
    run.generations.ask(roles=Roles(attention=2, experts=2, memory=2))


def check(found: Trained, undisturbed: Trained) -> None:
    assert found.curve == undisturbed.curve
    written, wanted = digests(found), digests(undisturbed)
    assert written == {step: wanted[step] for step in written} and SAVED not in written
    # The one in its place, and those that fell due later.
    assert len(written) >= 2 and min(written) < STEPS
    assert "postponed" in found.events
    # Those of a run of a few steps fall due faster than they are written.
    unsaved = [event["text"] for event in found.folder.event_lines() if event["kind"] == "unsaved"]
    assert all("is still being written" in text for text in unsaved)
    assert not list(found.folder.checkpoints.glob("*.unfinished"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("change", [kill, grow, shrink])
def test_a_file_that_is_not_written_yet_holds_no_change_of_plan_up(
    change: Callable[[Run, LocalFleet], None],
    corpus: Path,
    undisturbed: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, gate, write = threading.Event(), threading.Event(), SlotJob.write
    seen: list[int] = []

    def slow(
        me: SlotJob, directory: str, name: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, SavedTensor]:
        if f"step_{SAVED}" in directory:
            begun.set()
            assert gate.wait(30.0), "nobody opened"
        return write(me, directory, name, tensors)

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == CHANGED:
            assert begun.wait(10.0)
            change(run, fleet)
        if step == OPENED:
            seen.append(run.generations.generation)
            gate.set()

    monkeypatch.setattr(SlotJob, "write", slow)
    found = train(tmp_path / "run", run_of(corpus, slots=3, replication=2, standby=1), at_step=at_step)
    # Steps were committed in another generation while no file was there.
    assert seen and seen[0] > 1
    check(found, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("change", [kill, grow])
def test_tables_that_are_not_copied_yet_hold_no_change_of_plan_up(
    change: Callable[[Run, LocalFleet], None],
    corpus: Path,
    undisturbed: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that steps write over are kept meanwhile, until the copy is given up between two pieces of some rows."""
    is_slow, copying, pieces = True, threading.Event(), 0

    def between() -> None:
        nonlocal pieces
        if is_slow:
            pieces += 1
            copying.set()
            time.sleep(0.2)

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        nonlocal is_slow
        if step == CHANGED:
            assert copying.wait(10.0)
            change(run, fleet)
        if step == CHANGED + 1:
            is_slow = False

    shards = interrupt_runs(monkeypatch, between)
    monkeypatch.setattr(kept_rows, "PIECE_BYTES", 1)
    config = run_of(corpus, slots=3, replication=2, standby=1)
    found = train(tmp_path / "run", config, at_step=at_step)
    rows = config.model.dse.num_buckets * config.model.dse.rows_per_head
    assert 0 < pieces < rows, "the copy went on to its end"
    assert not any(shard._kept and any(kept.is_open for kept in shard._kept) for shard in shards)
    check(found, undisturbed)


@pytest.mark.long
def test_a_scheduler_that_dies_in_the_middle_of_a_checkpoint_makes_another(
    corpus: Path, undisturbed: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, gate, write = 6, threading.Event(), SlotJob.write

    def slow(
        me: SlotJob, directory: str, name: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, SavedTensor]:
        assert gate.wait(30.0), "nobody opened"
        return write(me, directory, name, tensors)

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == every + 1:
            gate.set()

    monkeypatch.setattr(SlotJob, "write", slow)
    config = run_of(corpus, slots=2)
    config = replace(config, train=replace(config.train, checkpoint_every=every))
    found = train(tmp_path / "run", config, at_step=at_step, scheduler_dies=(every + 1,))
    assert found.curve == undisturbed.curve and found.events.count("scheduler") == 2
    written, wanted = digests(found), digests(undisturbed)
    assert written == {step: wanted[step] for step in written}
    assert every + 1 < min(written) < 2 * every


def test_slots_with_rows_alone_say_when_they_have_written(corpus: Path, tmp_path: Path) -> None:
    # A step that takes long is no loss here.
    config = run_of(corpus, slots=1, memory_shards=2, deadline_s=30.0)
    found = train(tmp_path / "run", config, stop_after=2 * SAVED)
    assert set(digests(found)) == {SAVED, 2 * SAVED} and "unsaved" not in found.events


@pytest.mark.long
def test_a_slot_takes_no_host_memory_beside_what_it_still_writes_from(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan with other pieces needs memory of another kind, and that begins to be taken only when the old is free."""
    reserve, is_busy = SlotRoles._reserve, list[bool]()

    def noted(me: SlotRoles, plan: object) -> None:
        before = me.saving._host
        reserve(me, plan)  # type: ignore[arg-type]
        if me.saving._host is not before:
            is_busy.append(me.saving.is_busy)

    monkeypatch.setattr(SlotRoles, "_reserve", noted)
    write, gate = SlotJob.write, threading.Event()

    def slow(
        me: SlotJob, directory: str, name: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, SavedTensor]:
        if f"step_{SAVED}" in directory:
            assert gate.wait(30.0), "nobody opened"
        return write(me, directory, name, tensors)

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == CHANGED:
            shrink(run, fleet)
        if step == OPENED:
            assert len(is_busy) == 3, "nothing was taken meanwhile"
            gate.set()

    monkeypatch.setattr(SlotJob, "write", slow)
    train(tmp_path / "run", run_of(corpus, slots=3, replication=2), at_step=at_step)
    assert len(is_busy) == 5 and not any(is_busy)
