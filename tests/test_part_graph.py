"""Parts that are recorded once and replayed, with a recorder that stands in for CUDA graphs: no bit changes."""

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from local_cluster import LocalFleet, tiny_run, train
from torch import Tensor

from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.exchange.protocol import FetchedRows
from sparseray.actors.training import part_graph
from sparseray.actors.training.objective import DeviceBatch, next_token
from sparseray.actors.training.part_graph import PartGraph, graph_of
from sparseray.platform.config import RunConfig
from sparseray.platform.trainer import Trainer
from test_state_slabs import dense_slabs, whole_experts


class Recorded:
    """A `Recorder` that replays by calling again; as with CUDA, recording computes nothing that lasts.

    Args:
        error: raised where something is to be recorded.
    """

    def __init__(self, error: RuntimeError | None = None) -> None:
        self.firsts = self.records = self.replays = 0
        self.error = error

    def first(self, run: part_graph.Run) -> list[Tensor]:
        self.firsts += 1
        return run()

    def record(self, run: part_graph.Run, beside: int) -> tuple[Callable[[], object], list[Tensor]]:
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


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """Every recorder that is made; what is in `errors` makes the recordings fail."""
    made: list[Recorded] = []

    def recorder_of(device: torch.device) -> Recorded:
        made.append(Recorded())
        return made[-1]

    monkeypatch.setattr(part_graph, "recorder_of", recorder_of)
    yield made


def whole_run(data: Path, *, steps: int = 12, parts: int = 4, **train_keys: object) -> RunConfig:
    config = tiny_run(data, steps=steps, colocated=True)
    keys: dict[str, object] = {"dtype": "bfloat16", "logical_shards": parts, "eval_every": 3, **train_keys}
    return replace(config, train=replace(config.train, **keys))


@pytest.mark.parametrize("keys", [{}, {"parts": 1}, {"recompute": True, "steps": 4}], ids=str)
def test_replayed_parts_change_no_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, int]
) -> None:
    """With memory rows, evaluations between steps, and the tenth step, which notes statistics."""
    config = whole_run(corpus, **keys)
    plain = train(tmp_path / "plain", config)
    recorder = Recorded()
    monkeypatch.setattr(part_graph, "recorder_of", lambda device: recorder)
    replayed = train(tmp_path / "replayed", config)
    assert (recorder.firsts, recorder.records) == (1, 1)
    assert recorder.replays == config.train.steps * config.train.logical_shards - 1
    assert replayed.curve == plain.curve and replayed.digest == plain.digest
    assert replayed.evaluations == plain.evaluations
