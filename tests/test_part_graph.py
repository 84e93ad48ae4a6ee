"""Parts that are recorded once and replayed, with a recorder that stands in for CUDA graphs: no bit changes."""

import logging
import weakref
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from local_cluster import LocalFleet, tiny_run, train
from test_state_slabs import dense_slabs, whole_experts
from torch import Tensor

from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.exchange.protocol import FetchedRows
from sparseray.actors.state.gradient_sum import Determinism
from sparseray.actors.training import part_graph
from sparseray.actors.training.objective import DeviceBatch, next_token
from sparseray.actors.training.part_graph import PartGraph, graph_of
from sparseray.actors.training.worker import AttentionWorker
from sparseray.errors import SlotLostError
from sparseray.model.config import DSEConfig, MTPConfig
from sparseray.platform.config import RunConfig
from sparseray.platform.trainer import Trainer


class Recorded:
    """A `Recorder` that replays by calling again; as with CUDA, recording computes nothing that lasts.

    Args:
        error: raised where something is to be recorded.
    """

    def __init__(self, error: RuntimeError | None = None) -> None:
        self.firsts = self.launches = self.records = self.replays = 0
        self.error = error

    def launch(self, run: part_graph.Run, *, is_new: bool) -> list[Tensor]:
        self.firsts += is_new
        self.launches += 1
        return run()

    def record(self, run: part_graph.Run, beside: int, *, again: bool) -> part_graph.Recording:
        self.records += 1
        if self.error is not None:
            raise self.error
        found = run()
        for tensor in found:
            tensor.fill_(-7 if tensor.dtype == torch.int64 else torch.nan)

        def replay() -> None:
            self.replays += 1
            for own, new in zip(found, run(), strict=True):
                own.copy_(new)

        return replay, found


def whole_run(data: Path, *, steps: int = 12, parts: int = 4, **train_keys: object) -> RunConfig:
    config = tiny_run(data, steps=steps, colocated=True)
    keys: dict[str, object] = {"dtype": "bfloat16", "logical_shards": parts, "eval_every": 3, **train_keys}
    return replace(config, train=replace(config.train, **keys))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("keys", "determinism"),
    [
        ({}, "bitwise"),
        ({"parts": 1}, "bitwise"),
        ({"recompute": True, "steps": 4}, "bitwise"),
        ({"parts": 3, "steps": 3}, "bitwise"),
        ({"parts": 3, "steps": 3}, "fast"),
    ],
    ids=str,
)
def test_replayed_parts_change_no_bit(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, int],
    determinism: Determinism,
) -> None:
    """With memory rows, evaluations between steps, and the tenth step, which notes statistics."""
    config = replace(whole_run(corpus, **keys), determinism=determinism)
    plain = train(tmp_path / "plain", config)
    recorder = Recorded()
    monkeypatch.setattr(part_graph, "recorder_of", lambda device: recorder)
    replayed = train(tmp_path / "replayed", config)
    parts = config.train.logical_shards
    assert (recorder.firsts, recorder.launches, recorder.records) == (1, parts, 1)
    assert recorder.replays == (config.train.steps - 1) * parts
    assert replayed.curve == plain.curve and replayed.digest == plain.digest
    assert replayed.evaluations == plain.evaluations


def test_modules_of_further_tokens_are_replayed_until_their_weight_changes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = whole_run(corpus, steps=6, parts=2)
    mtp = MTPConfig(depth=2, loss_weight=0.3, later_loss_weight=0.1, later_from=4)
    config = replace(config, model=replace(config.model, dse=DSEConfig(layers=()), mtp=mtp))
    plain = train(tmp_path / "plain", config)
    recorder = Recorded()
    monkeypatch.setattr(part_graph, "recorder_of", lambda device: recorder)
    replayed = train(tmp_path / "replayed", config)
    assert (recorder.firsts, recorder.records, recorder.replays) == (2, 2, 8)
    assert replayed.curve == plain.curve and replayed.digest == plain.digest
    assert [r["losses"] for r in replayed.records] == [r["losses"] for r in plain.records]


@pytest.mark.long
def test_a_killed_slot_records_again_and_comes_to_the_same_bits(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = whole_run(corpus, steps=7, checkpoint_every=2)

    def kill(step: int, trainer: Trainer, fleet: LocalFleet) -> None:
        if step == 5 and fleet.used == 1:
            fleet.kill(0)

    plain = train(tmp_path / "plain", config)
    made: list[Recorded] = []
    monkeypatch.setattr(part_graph, "recorder_of", lambda device: made.append(Recorded()) or made[-1])
    killed = train(tmp_path / "killed", config, at_step=kill)
    assert "restored" in killed.events and [recorder.records for recorder in made] == [1, 1]
    assert killed.curve == plain.curve and killed.digest == plain.digest


@pytest.mark.one_in(2)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("not permitted")], ids=str)
def test_where_nothing_can_be_recorded_the_host_goes_on_launching(
    error: RuntimeError,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = whole_run(corpus, steps=3)
    plain = train(tmp_path / "plain", config)
    recorder = Recorded(error)
    monkeypatch.setattr(part_graph, "recorder_of", lambda device: recorder)
    with caplog.at_level(logging.WARNING):
        launched = train(tmp_path / "launched", config)
    assert (recorder.records, recorder.replays) == (1, 0)
    assert launched.curve == plain.curve and launched.digest == plain.digest
    assert [str(error) in text for text in caplog.messages if "without a CUDA graph" in text] == [True]


def test_a_neighbour_that_is_lost_is_no_part_that_cannot_be_recorded() -> None:
    graph = PartGraph(exchange(), Recorded(SlotLostError("slot 0 got nothing", [1])))
    gradients(graph, batch(0))
    with pytest.raises(SlotLostError):
        gradients(graph, batch(1))


def exchange() -> OnDeviceExchange:
    return OnDeviceExchange(dense_slabs(), whole_experts(), None, SimpleNamespace(post=lambda *a, **k: None))


def batch(seed: int, weights_BT: Tensor | None = None) -> DeviceBatch:
    tokens_BT = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(seed))
    return DeviceBatch(
        tokens_BT=tokens_BT[:, :-1],
        targets_BT=tokens_BT[:, 1:],
        weights_BT=weights_BT,
        document_starts_BT=torch.zeros(2, 32, dtype=torch.bool),
    )


NO_ROWS = FetchedRows(addresses={}, values={})
steps = count(1)


def gradients(graph: PartGraph, part: DeviceBatch, weight: float = 64.0) -> list[Tensor]:
    """Loss and gradients of a step's only part, taken as the exchange takes them."""
    loss = graph(part, NO_ROWS, step=next(steps), weight=weight)
    found = [*graph.dense.take_gradients(), *graph.exchange.whole.take_gradients()]
    return [x.clone() for x in (loss.sum, loss.aux, loss.counts_LE, *found)]


def test_a_recording_follows_weights_that_change_where_they_lie_and_is_thrown_away_where_they_move() -> None:
    recorder, here = Recorded(), exchange()
    graph, plain = PartGraph(here, recorder), PartGraph(here, Recorded(RuntimeError("none")))

    def same(seed: int, weight: float = 64.0) -> None:
        theirs = gradients(plain, batch(seed), weight)
        for own, other in zip(gradients(graph, batch(seed), weight), theirs, strict=True):
            assert torch.equal(own, other)

    for seed in range(3):
        same(seed)
    assert (recorder.firsts, recorder.records, recorder.replays) == (1, 1, 2)
    with torch.no_grad():
        for tensor in here.dense.parameters:
            tensor.mul_(1.5)
    same(3)
    assert (recorder.firsts, recorder.records, recorder.replays) == (1, 1, 3)
    recording = weakref.ref(graph._recording)
    here.whole.slabs[0]._compute = tuple(slab.clone() for slab in here.whole.slabs[0].compute)
    here.whole.slabs[0].compute_dtype = torch.float32
    here.whole.assign(here.whole.owned, here.whole.owned)
    same(4)
    assert recording() is None and (recorder.firsts, recorder.records) == (2, 1)
    same(5)
    same(6, weight=32.0)
    assert (recorder.firsts, recorder.records, recorder.replays) == (3, 2, 4)


class Source:
    """One part a step."""

    def __call__(self, step: int, part: int) -> DeviceBatch:
        return batch(step)

    def weight(self, step: int) -> float:
        return 64.0


def test_the_step_that_notes_statistics_is_replayed_and_notes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder, noted = Recorded(), []
    for made in (None, recorder):
        monkeypatch.setattr(part_graph, "recorder_of", lambda device, made=made: made)
        here = exchange()
        worker = AttentionWorker(here.dense, here)
        for step in (8, 9, 10):
            worker.run_step(step, [0], Source(), lambda part, done: None)
            here.dense.discard()
            here.whole.discard()
        noted.append(worker.noted)
    assert (recorder.firsts, recorder.records, recorder.replays) == (1, 1, 2)
    assert noted[0] and noted[1] == noted[0]


def test_batches_with_weights_of_their_own_are_launched_beside_a_recording() -> None:
    recorder = Recorded()
    graph = PartGraph(exchange(), recorder)
    first = gradients(graph, batch(0))
    weighted = gradients(graph, batch(0, torch.full((2, 32), 0.5)))
    assert torch.equal(weighted[0], first[0] / 2) and recorder.records == 0
    for own, other in zip(gradients(graph, batch(0)), first, strict=True):
        assert torch.equal(own, other)
    assert recorder.replays == 1


def test_there_is_a_graph_where_one_slot_has_everything_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = exchange()
    assert graph_of(here.dense, here, next_token) is None
    monkeypatch.setattr(part_graph, "recorder_of", lambda device: Recorded())
    assert graph_of(here.dense, here, next_token) is not None
    assert graph_of(here.dense, here, lambda *args, **keys: next_token(*args, **keys)) is None
