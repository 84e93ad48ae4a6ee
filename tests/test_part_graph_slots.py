"""Parts of slots that exchange in step, recorded once and replayed: to the bit those that are launched."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import LocalFleet, Trained, train
from recorded_slots import Slots, TapeLink, record_slots
from test_across_slots import Dies, resize_at, slabs_run

from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.peers.token_exchange import TokenExchange
from sparseray.actors.training import worker
from sparseray.model.config import DSEConfig, MTPConfig
from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig

STEPS = 5


def slots_run(
    data: Path, *, slots: int = 2, parts: int = 4, determinism: str = "bitwise", **keys: Any
) -> RunConfig:
    """As `slabs_run`; keys of `train`, and `replication`, `mtp`, `memory` and `roles`."""
    replication, roles = keys.pop("replication", 1), keys.pop("roles", {})
    config = slabs_run(data, slots=slots, replication=replication, **roles)
    model = replace(config.model, mtp=MTPConfig(depth=keys.pop("mtp", 0)))
    if not keys.pop("memory", True):
        model = replace(model, dse=DSEConfig(layers=()))
    trained = replace(config.train, logical_shards=parts, steps=20, eval_every=2, checkpoint_every=0, **keys)
    return replace(config, model=model, train=trained, determinism=determinism)


def run(
    folder: Path,
    config: RunConfig,
    *,
    is_graph: bool = True,
    error: RuntimeError | None = None,
    at_step: Callable[[int, Run, LocalFleet], None] = lambda *_: None,
    steps: int = STEPS,
) -> tuple[Trained, Slots]:
    with pytest.MonkeyPatch.context() as patch:
        slots = record_slots(patch, error, is_graph=is_graph)
        return train(folder, config, at_step=at_step, stop_after=steps), slots


def same(one: Trained, other: Trained) -> None:
    assert one.curve == other.curve and one.digest == other.digest
    assert one.evaluations == other.evaluations


def some(every: Sequence[Any], first: Sequence[Any]) -> list[Any]:
    """Variants of a test, of which all but some are long."""
    return [one if one in first else pytest.param(one, marks=pytest.mark.long) for one in every]


CASES: dict[str, dict[str, Any]] = {
    "two slots": {},
    "two slots, fast": {"determinism": "fast"},
    "a part each": {"parts": 2},
    "a part each, fast, replicas": {"parts": 2, "determinism": "fast", "replication": 2},
    "replicas": {"replication": 2, "memory": False},
    "three slots": {"slots": 3},
    "three slots, fast": {"slots": 3, "determinism": "fast", "replication": 2},
    "two attend, three have experts": {"slots": 3, "parts": 2, "roles": {"attention_workers": 2}},
    "one part": {"parts": 1, "roles": {"attention_workers": 1}},
    "recomputed": {"recompute": True},
    "further tokens": {"mtp": 2, "memory": False},
    "one attends": {"roles": {"attention_workers": 1}},
    "three attend, two have experts": {"slots": 3, "parts": 6, "roles": {"expert_shards": 2}},
}


SHORT = ("two slots", "a part each, fast, replicas", "three slots, fast")


@pytest.mark.parametrize("case", some(list(CASES), SHORT))
def test_replayed_parts_of_several_slots_change_no_bit(case: str, corpus: Path, tmp_path: Path) -> None:
    config = slots_run(corpus, **CASES[case])
    launched, by_hand = run(tmp_path / "launched", config, is_graph=False)
    replayed, slots = run(tmp_path / "replayed", config)
    same(replayed, launched)
    assert slots.num_bytes == by_hand.num_bytes and slots.num_bytes["dispatch"] > 0
    # Two steps are launched, the first of which counts rows, and rounds that not all take part in.
    attention, parts = config.cluster.attention_workers, config.train.logical_shards
    rounds = parts // attention if parts >= attention else 1
    of_slots = min(attention, parts)
    assert slots.total("records") == slots.total("firsts") == of_slots
    assert slots.total("replays") == of_slots * (STEPS - 2) * rounds


@pytest.mark.long
def test_a_number_of_slots_changes_no_bit_where_parts_are_replayed(corpus: Path, tmp_path: Path) -> None:
    alone = train(tmp_path / "one", slots_run(corpus, slots=1), stop_after=STEPS)
    for slots in (2, 3):
        same(run(tmp_path / str(slots), slots_run(corpus, slots=slots))[0], alone)


@pytest.mark.long
def test_launched_and_replayed_slots_meet_in_one_round(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them counts its rows for good, as where there is no room for all."""
    config = slots_run(corpus, slots=3, parts=6)
    launched, _ = run(tmp_path / "launched", config, is_graph=False)
    built_in = DeviceExchange.built_in
    monkeypatch.setattr(DeviceExchange, "built_in", lambda me: None if me.me == 1 else built_in(me))
    replayed, slots = run(tmp_path / "replayed", config)
    same(replayed, launched)
    assert slots.total("records") == 2


@pytest.mark.long
@pytest.mark.parametrize("replication", [1, 2])
def test_slots_come_and_go_between_replays(replication: int, corpus: Path, tmp_path: Path) -> None:
    """Each generation records anew, also after its slots have forgotten what they hold no more."""
    alone = train(tmp_path / "one", slots_run(corpus, slots=1), stop_after=18)
    changes = resize_at({1: 2, 6: 3, 12: 2})

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        changes(step, run, fleet)
        time.sleep(0.12)  # Else all is over before a slot has begun.

    config = slots_run(corpus, slots=2 if replication == 2 else 1, replication=replication)
    found, slots = run(tmp_path / "run", config, at_step=at_step, steps=18)
    same(found, alone)
    assert found.events.count("resized") >= 2
    # When a slot is ready is a matter of seconds; two generations at least have come to their third step.
    assert slots.total("records") >= 4 and slots.total("replays") > 20


MOMENTS = {
    "while others wait in a replay": (DeviceExchange, "begin", 4),
    "in a replay, rows half given": (TokenExchange, "_give_back", 2),
    "in a replay, between put and signal": (TapeLink, "signal", 3),
    "after its replays": (DeviceExchange, "_finish", 1),
}


@pytest.mark.long
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_kill_between_replays_or_in_one_changes_no_bit(
    moment: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, method, call = MOMENTS[moment]
    fault = Dies(of, method, slot=1, step=5, call=call)
    fault.patch(monkeypatch)
    config = slots_run(corpus, slots=3, replication=2, parts=6)
    alone = train(tmp_path / "alone", slots_run(corpus, slots=1, parts=6), stop_after=8)
    found, slots = run(tmp_path / "run", config, at_step=fault.at_step, steps=8)
    same(found, alone)
    assert fault.done and "recovered" in found.events and "restored" not in found.events
    assert slots.total("replays") > 10


@pytest.mark.one_in(2)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("not permitted")], ids=str)
def test_where_nothing_can_be_recorded_slots_go_on_launching(
    error: RuntimeError, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = slots_run(corpus)
    launched, by_hand = run(tmp_path / "launched", config, is_graph=False)
    with caplog.at_level(logging.WARNING):
        failed, slots = run(tmp_path / "failed", config, error=error)
    same(failed, launched)
    assert slots.num_bytes == by_hand.num_bytes
    assert (slots.total("records"), slots.total("replays")) == (2, 0)
    assert [str(error) in text for text in caplog.messages if "without a CUDA graph" in text] == [True, True]


@pytest.mark.parametrize("at", some(list(product((1, 2, 3, 4), (False, True))), [(2, False)]))
def test_a_recording_that_fails_half_way_leaves_nothing_behind(
    at: tuple[int, bool], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the device is full in the midst of a part: forward, backward, with what layers keep, and computed again."""
    call, recompute = at
    config = slots_run(corpus, recompute=recompute)
    launched, by_hand = run(tmp_path / "launched", config, is_graph=False, steps=3)
    give_back = TokenExchange._give_back

    def gives(me: TokenExchange, *arguments: Any, **named: Any) -> None:
        if me.link._is_dry:
            me.dry = getattr(me, "dry", 0) + 1
            if me.dry == call:
                raise torch.OutOfMemoryError("full")
        give_back(me, *arguments, **named)

    recorded, left = DeviceExchange.recorded, []

    def watched(me: DeviceExchange, *arguments: Any) -> Any:
        before, spans = me.across.count, len(me.meter._costs.spans)
        try:
            return recorded(me, *arguments)
        finally:
            left.append((me.across.count - before, len(me.meter._costs.spans) - spans))
            left.append((*me.across._kept, *me.across._gradients, *me.across._sending, *me._turn.passed))

    monkeypatch.setattr(DeviceExchange, "recorded", watched)
    monkeypatch.setattr(TokenExchange, "_give_back", gives)
    failed, slots = run(tmp_path / "failed", config, steps=3)
    same(failed, launched)
    assert slots.num_bytes == by_hand.num_bytes
    assert slots.total("records") == 2 and slots.total("replays") == 0
    assert sorted(left) == [(), (), (0, 0), (0, 0)]


@pytest.mark.long
def test_a_host_that_counts_rows_records_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = slots_run(corpus)
    with pytest.MonkeyPatch.context() as patch:
        slots = record_slots(patch)
        patch.setattr(TokenExchange, "settle", lambda *_: None)
        counted = train(tmp_path / "counted", config, stop_after=STEPS)
    launched, _ = run(tmp_path / "launched", config, is_graph=False)
    same(counted, launched)
    assert len(slots.recorders) == 2 and slots.total("firsts") == 0


def test_the_part_that_notes_statistics_is_launched_in_company(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of its own would be an exchange that nobody else makes."""
    monkeypatch.setitem(worker.SAMPLE_EVERY, "cpu", 4)
    noted: list[str] = []
    run_step = worker.AttentionWorker.run_step

    def kept(me: worker.AttentionWorker, *arguments: Any) -> None:
        run_step(me, *arguments)
        noted.extend(map(repr, me.noted))

    monkeypatch.setattr(worker.AttentionWorker, "run_step", kept)
    config = slots_run(corpus)
    launched, _ = run(tmp_path / "launched", config, is_graph=False)
    wanted = sorted(noted)
    noted.clear()
    replayed, slots = run(tmp_path / "replayed", config)
    same(replayed, launched)
    assert wanted and sorted(noted) == wanted
    assert slots.total("replays") == 2 * (2 * (STEPS - 2) - 1)
