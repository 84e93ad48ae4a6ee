"""Checkpoints beside the steps: whose memory they are copied to, and what it costs where there is none."""

import threading
from contextlib import nullcontext

import pytest
import torch

from sparseray.actors.state.kept_rows import KeptRows
from sparseray.actors.training import background_save
from sparseray.actors.training.background_save import BackgroundSave, Files
from sparseray.actors.wire.messages import SavedTensor


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
        saving.forget()


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
    saving.forget()
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
    saving.forget()
    assert not kept.is_open and is_open == ([] if fails else [False, False])
