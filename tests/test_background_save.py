"""Checkpoints beside the steps: whose memory they are copied to, and what it costs where there is none."""

import threading
import time
from contextlib import nullcontext

import pytest
import torch

from sparseray.actors.state.kept_rows import KeptRows
from sparseray.actors.training import background_save
from sparseray.actors.training.background_save import BackgroundSave, Files
from sparseray.actors.wire.messages import Saved, SavedTensor


def files(scale: float, generation: int = 1) -> Files:
    return {
        f"dense_0_{generation}": {
            "a": torch.full((3, 5), scale),
            "b": torch.full((), 2 * scale),
            "c": torch.full((7,), scale, dtype=torch.bfloat16),
        },
        f"expert_0_{generation}": {
            "d": torch.full((0, 4), scale),
            "e": torch.full((9,), 3, dtype=torch.int64),
        },
    }


def finish(saving: BackgroundSave) -> Saved:
    """Wait for a checkpoint."""
    deadline = time.monotonic() + 10.0
    while (found := saving.take()) is None:
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.001)
    return found[1]


class NoStream:
    """In the place of a GPU's."""

    device = torch.device("cpu")

    def synchronize(self) -> None:
        """All is done."""


class Taken:
    """Counts how often host memory is taken, and keeps what was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.written: list[tuple[str, dict[str, torch.Tensor], list[int]]] = []
        take = background_save._host_memory

        def counted(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            self.count += 1
            return take(tensors)

        monkeypatch.setattr(background_save, "_host_memory", counted)

    def write(self, file: str, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self.written.append((file, copies, [tensor.data_ptr() for tensor in tensors.values()]))
        return {}

    def save(self, saving: BackgroundSave, step: int, what: Files) -> None:
        saving.start(step, what, self.write)
        saving.wait_until_copied()
        for tensors in what.values():
            for tensor in tensors.values():
                tensor.zero_()
        finish(saving)


def test_memory_is_taken_once_and_holds_what_was_there_when_the_copy_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, saving = Taken(monkeypatch), BackgroundSave()
    saving.reserve(files(0.0))
    for step, generation in ((1, 1), (2, 1), (3, 2)):
        # Another generation has other names for the same tensors.
        saving.reserve(files(0.0, generation))
        taken.save(saving, step, files(float(step), generation))
    assert taken.count == 1
    wanted = [
        found
        for step, generation in ((1, 1), (2, 1), (3, 2))
        for found in files(float(step), generation).items()
    ]
    assert [name for name, _, _ in taken.written] == [name for name, _ in wanted]
    for (_, found, _), (_, tensors) in zip(taken.written, wanted):
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    places = [at for _, _, at in taken.written]
    assert places[:2] == places[2:4] == places[4:]


def test_other_tensors_take_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, saving = Taken(monkeypatch), BackgroundSave()
    saving.reserve(files(0.0))
    larger = files(1.0) | {"memory_0_1": {"f": torch.ones(2)}}
    taken.save(saving, 1, larger)
    assert taken.count == 2 and torch.equal(taken.written[-1][1]["f"], torch.ones(2))
    saving.reserve(larger)
    taken.save(saving, 2, larger)
    assert taken.count == 3


def test_tensors_that_are_larger_than_a_block_lie_beside_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_save, "BLOCK_BYTES", 256)
    what = [torch.arange(count, dtype=torch.float32) for count in (3, 100, 5, 60, 1)]
    host = background_save._host_memory(what)
    for own, tensor in zip(host, what):
        own.copy_(tensor)
    assert all(torch.equal(own, tensor) for own, tensor in zip(host, what))
    assert len({own.untyped_storage().data_ptr() for own in host}) < len(host)


def slab_files(step: float) -> Files:
    """Tensors of one slab in another order, with gaps; others are alone, or not contiguous."""
    slab = torch.arange(5000, dtype=torch.float32) + step
    views = [slab[64:128], slab[0:60].view(6, 10), slab[200:201].view(()), slab[4000:4100].view(25, 4)]
    alone = [slab[300:304].view(2, 2).t(), torch.full((3,), step), slab.view(torch.int32)[128:130]]
    return {
        "dense_0": {f"v{i}": view for i, view in enumerate(views)},
        "experts_0": {f"a{i}": tensor for i, tensor in enumerate(alone)},
    }


def test_neighbours_in_one_memory_are_copied_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_save, "_joins", lambda tensor: tensor.is_contiguous())
    taken, saving = Taken(monkeypatch), BackgroundSave()
    stretches = background_save._stretches(background_save._flat(slab_files(0.0)))
    assert [stretch.members for stretch in stretches] == [(4,), (1, 0, 2), (3,), (5,), (6,)]
    assert stretches[1].starts == (0, 64, 200) and stretches[1].length == 201
    saving.reserve(slab_files(0.0))
    for step in (1.0, 2.0):
        saving.start(int(step), slab_files(step), taken.write)
        finish(saving)
        wanted = slab_files(step)
        for file, found, _ in taken.written[-2:]:
            assert list(found) == list(wanted[file])
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted[file].items())
    assert taken.count == 1
    monkeypatch.setattr(background_save, "PIECE_BYTES", 600)
    stretches = background_save._stretches(background_save._flat(slab_files(0.0)))
    assert [stretch.members for stretch in stretches] == [(4,), (1, 0), (2,), (3,), (5,), (6,)]
    # As many bytes, but apart.
    moved = {file: {name: t.clone() for name, t in found.items()} for file, found in slab_files(3.0).items()}
    taken.save(saving, 3, moved)
    assert taken.count == 2


def test_a_host_without_memory_to_pin_costs_the_checkpoint_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(background_save, "_host_memory", full)
    saving = BackgroundSave()
    saving.reserve(files(0.0))
    saving.start(4, files(1.0), lambda file, tensors: {})
    saving.wait_until_copied()
    done = threading.Event()
    saving._pool.submit(done.set)
    assert done.wait(10.0)
    found = saving.take()
    assert found is not None and found[0] == 4 and "out of memory" in found[1].error


def test_who_keeps_copies_on_the_device_does_not_wait_for_host_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_pinned, pin = threading.Event(), background_save._host_memory

    def slow(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        assert is_pinned.wait(10.0)
        return pin(tensors)

    taken, saving = Taken(monkeypatch), BackgroundSave()
    monkeypatch.setattr(background_save, "_host_memory", slow)
    monkeypatch.setattr(background_save, "_has_room", lambda tensors, device: True)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(background_save, "PIECE_BYTES", 16)
    saving._stream = NoStream()  # type: ignore[assignment]
    what = files(5.0)
    saving.reserve(what)
    saving.start(5, what, taken.write)
    saving.wait_until_copied()
    assert not is_pinned.is_set()
    for tensors in what.values():
        for tensor in tensors.values():
            tensor.zero_()
    is_pinned.set()
    finish(saving)
    found = {name: tensor for _, copies, _ in taken.written for name, tensor in copies.items()}
    wanted = {name: tensor for tensors in files(5.0).values() for name, tensor in tensors.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("has_room", [True, False])
def test_a_gpu_may_change_what_is_saved_as_soon_as_it_is_copied(
    monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """With room for a copy on the device, and without."""
    monkeypatch.setattr(background_save, "_has_room", lambda tensors, device: has_room)
    taken, saving = Taken(monkeypatch), BackgroundSave()
    for step in (1, 2):
        what = files(float(step))
        what["dense_0_1"] = {name: tensor.cuda() for name, tensor in what["dense_0_1"].items()}
        taken.save(saving, step, what)
        for (_, found, _), (_, wanted) in zip(taken.written[-2:], files(float(step)).items()):
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert not any(tensor.is_cuda for tensor in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("has_room", [True, False])
def test_a_gpu_may_free_what_was_to_be_saved_as_soon_as_that_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """With room for a copy on the device, and without: in many pieces then, of which few are copied."""
    monkeypatch.setattr(background_save, "_has_room", lambda tensors, device: has_room)
    monkeypatch.setattr(background_save, "PIECE_BYTES", 1 << 16)
    taken, saving, before = Taken(monkeypatch), BackgroundSave(), torch.cuda.memory_allocated()
    for step in range(1, 6):
        what = {"dense_0_1": {"a": torch.full((1 << 24,), float(step), device="cuda")}}
        saving.start(step, what, taken.write)
        saving.forget()
        what["dense_0_1"]["a"].fill_(-1.0)
    what = {"dense_0_1": {"a": torch.full((1 << 24,), 6.0, device="cuda")}}
    saving.start(6, what, taken.write)
    saving.wait_until_copied()
    what["dense_0_1"]["a"].fill_(-1.0)
    finish(saving)
    # A file of a step that was written before it was forgotten is whole.
    values = [found["a"].unique().tolist() for _, found, _ in taken.written]
    assert all(len(value) == 1 and value != [-1.0] for value in values) and values[-1] == [6.0]
    del what
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("fails", [True, False])
def test_rows_are_kept_no_longer_than_they_are_copied(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    kept, is_open = KeptRows([], []), list[bool]()

    def write(file: str, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
        is_open.append(kept.is_open)
        return {}

    def full(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("CUDA error: out of memory")

    if fails:
        monkeypatch.setattr(background_save, "_host_memory", full)
    saving = BackgroundSave()
    saving.start(1, files(1.0), write, kept)
    finish(saving)
    assert not kept.is_open and is_open == ([] if fails else [False, False])


def test_what_is_forgotten_reads_nothing_more_and_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 40 bytes; it is forgotten within the second one."""
    monkeypatch.setattr(background_save, "PIECE_BYTES", 40)
    taken, saving, kept = Taken(monkeypatch), BackgroundSave(), KeptRows([], [])
    begun, gate, copied = threading.Event(), threading.Event(), list[torch.Tensor]()
    copy = torch.Tensor.copy_

    def slow(own: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied.append(source)
        if len(copied) == 2:
            begun.set()
            assert gate.wait(10.0)
        return copy(own, source)

    what = {"dense_0_1": {"a": torch.ones(100)}}
    monkeypatch.setattr(torch.Tensor, "copy_", slow)
    saving.start(1, what, taken.write, kept)
    assert begun.wait(10.0)
    forgetting = threading.Thread(target=saving.forget)
    forgetting.start()
    forgetting.join(0.1)
    assert forgetting.is_alive(), "a piece is being read"
    gate.set()
    forgetting.join(10.0)
    assert not forgetting.is_alive() and not kept.is_open
    what["dense_0_1"]["a"].zero_()
    # The thread is through with it: what comes next is written, and nothing of the first.
    taken.save(saving, 2, {"dense_0_2": {"a": torch.full((100,), 2.0)}})
    assert not saving.is_busy and [name for name, _, _ in taken.written] == ["dense_0_2"]
    assert torch.equal(taken.written[0][1]["a"], torch.full((100,), 2.0))
    assert len(copied) == 2 + 10


def test_a_file_that_is_being_written_is_the_last_and_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, saving, begun, gate = Taken(monkeypatch), BackgroundSave(), threading.Event(), threading.Event()

    def slow(file: str, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
        begun.set()
        assert gate.wait(10.0)
        return taken.write(file, tensors)

    what = files(1.0)
    saving.start(1, what, slow)
    assert begun.wait(10.0)
    saving.forget()
    assert saving.is_busy and saving.take() is None
    # Another one waits for the memory, and leaves what is being written as it was.
    saving.start(2, files(2.0, 2), taken.write)
    gate.set()
    finish(saving)
    assert not saving.is_busy
    assert [name for name, _, _ in taken.written] == ["dense_0_1", "dense_0_2", "expert_0_2"]
    assert torch.equal(taken.written[0][1]["a"], what["dense_0_1"]["a"])


def test_what_servers_are_offered_is_not_offered_once_it_was_forgotten() -> None:
    offering, given, gate = BackgroundSave(is_brief=True), list[str](), threading.Event()
    begun = threading.Event()

    def offer(file: str, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
        begun.set()
        assert gate.wait(10.0)
        given.append(file)
        return {}

    offering.start(1, files(1.0), offer)
    assert begun.wait(10.0)
    threading.Timer(0.1, gate.set).start()
    offering.forget()
    assert given == ["dense_0_1"]
    offering.start(2, {"": {}}, offer)
    finish(offering)
    assert given == ["dense_0_1", ""]
