"""The registry is what is recorded, exported and documented; recording never stops a step."""

import ast
import json
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from background import ROOT
from local_cluster import tiny_run, train
from watching import MISSING, PROMTOOL, lint

from sparseray.actors.training import worker as attention_worker
from sparseray.platform.metrics.discovery import (
    TARGETS,
    entries,
    merged_targets,
    publish,
    state_directory,
    write_targets,
)
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.metrics.registry import PREFIX, REGISTRY, Source, table
from sparseray.platform.metrics.training import balance, peak_flops


def recorded_names() -> set[str]:
    """Every literal name that the code records."""
    found = set()
    for path in (ROOT / "sparseray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
            if is_call and ast.unparse(node.func).split(".")[-1] in ("record", "observe"):  # type: ignore[attr-defined]
                found.add(node.args[0].value)  # type: ignore[attr-defined]
    return {name for name in found if isinstance(name, str)}


def test_only_names_of_the_registry_are_recorded() -> None:
    assert not recorded_names() - set(REGISTRY)
    assert len(recorded_names()) > 30


def test_the_table_in_the_docs_is_the_registry() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == table()


def test_the_number_of_series_is_bounded() -> None:
    unbounded = {"layer", "expert", "branch", "role", "state", "peer", "direction", "tier", "reason", "phase"}
    # The places of a draft are as many as the model has modules.
    unbounded |= {"place"}
    labels = {label for metric in REGISTRY.values() for label in metric.labels if not metric.values}
    assert labels <= unbounded, "labels must not grow with steps, requests or time"


@pytest.mark.skipif(PROMTOOL is None, reason=MISSING)
@pytest.mark.parametrize("source", ["scheduler", "slot", "server"])
def test_promtool_finds_nothing_in_all_that_a_process_can_export(source: Source) -> None:
    metrics = Metrics({"slot": "0"} if source != "server" else {}, declare=source)
    for name, metric in REGISTRY.items():
        if metric.source == source:
            metrics.record(name, 1.0, **dict.fromkeys(metric.labels, "1"))
    text = metrics.exposition()
    assert all(
        f"# TYPE {PREFIX}{name}".encode() in text for name, m in REGISTRY.items() if m.source == source
    )
    assert lint(text) == ""


def test_counters_with_known_labels_stand_at_zero_from_the_start() -> None:
    text = Metrics({}, declare="server").exposition().decode()
    assert 'sparseray_requests_finished_total{finished_reason="length"} 0.0' in text
    assert "sparseray_time_to_first_token_seconds_count 0.0" in text


def test_histograms_are_exact_and_labels_may_come_in_any_order() -> None:
    metrics = Metrics({"slot": "3"})
    for _ in range(1000):
        metrics.record("train_step_seconds", 0.03)
    metrics.record("nsa_branch_gate_mean", 0.25, branch="window", layer="7")
    metrics.record("nsa_branch_gate_mean", 0.5, layer="7", branch="select")
    text = metrics.exposition().decode()
    line = next(x for x in text.splitlines() if x.startswith("sparseray_train_step_seconds_sum"))
    assert float(line.split()[1]) == pytest.approx(30.0, rel=1e-9)
    assert 'sparseray_nsa_branch_gate_mean{branch="window",layer="7",slot="3"} 0.25' in text
    assert 'sparseray_nsa_branch_gate_mean{branch="select",layer="7",slot="3"} 0.5' in text


def test_a_value_that_a_histogram_has_several_times_counts_as_often() -> None:
    together, apart = Metrics({}), Metrics({})
    for value in (0.0, 0.001, 0.0037, 0.05, 1e6):
        together.record("inter_token_latency_seconds", value, 3)
        for _ in range(3):
            apart.record("inter_token_latency_seconds", value)

    def shown(metrics: Metrics) -> list[str]:
        return [line for line in metrics.exposition().decode().splitlines() if "inter_token" in line]

    assert shown(together) == shown(apart) and any(line.endswith("_count 15.0") for line in shown(apart))


def test_what_cannot_be_recorded_is_told_once_and_costs_no_step(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics({})
    for _ in range(3):
        metrics.record("no_such_metric", 1.0)
        metrics.record("train_loss", 1.0, layer="1")
    told = caplog.text
    assert told.count("no_such_metric is not recorded") == 1 and told.count("train_loss is not recorded") == 1


def test_an_exporter_that_cannot_listen_is_told_and_another_takes_a_free_port(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert Metrics({}).serve("192.0.2.1") == ""
    assert "no metrics from this process: cannot listen on 192.0.2.1" in caplog.text
    first, second = Metrics({}), Metrics({})
    first.record("train_step", 5)
    addresses = [one.serve("127.0.0.1") for one in (first, second)]
    assert len(set(addresses)) == 2
    with urllib.request.urlopen(f"http://{addresses[0]}/metrics") as answer:
        assert b"sparseray_train_step 5.0" in answer.read()


def test_statistics_change_no_bit_of_a_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for every in (1 << 30, 1):
        monkeypatch.setitem(attention_worker.SAMPLE_EVERY, "cpu", every)
        curves.append(train(tmp_path / str(every), tiny_run(corpus, steps=4)).curve)
    assert curves[0] == curves[1]


def test_balance_of_known_loads() -> None:
    assert balance([5, 5, 5, 5]) == {
        "load_max_violation": 0.0,
        "load_variation": 0.0,
        "load_entropy_ratio": pytest.approx(1.0),
        "dead_experts": 0.0,
    }
    one = balance([0, 8, 0, 0])
    assert (one["load_max_violation"], one["dead_experts"]) == (3.0, 3.0)
    assert one["load_entropy_ratio"] == 0.0
    assert balance([0, 0])["load_max_violation"] == -1.0
    before = torch.get_num_threads()
    assert peak_flops(1) > 1e8 and torch.get_num_threads() == before


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSERAY_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def merged(state: Path) -> list[str]:
    return sorted(e["targets"][0] for e in json.loads((state / TARGETS).read_text()))


def test_the_merged_file_has_all_live_runs_and_forgets_those_that_ended(state: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    write_targets(one, {"slot-0": "127.0.0.1:1", "slot-1": "127.0.0.1:2", "slot-2": ""}, "one")
    write_targets(two, {"scheduler": "127.0.0.1:3"}, "two")
    assert merged(state) == ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
    assert json.loads(one.read_text())[0]["labels"] == {"job": "sparseray", "run": "one", "process": "slot-0"}
    write_targets(one, {"slot-0": "127.0.0.1:1"}, "one")
    assert merged(state) == ["127.0.0.1:1", "127.0.0.1:3"]
    write_targets(two, {}, "two")
    assert merged(state) == ["127.0.0.1:1"] and json.loads(two.read_text()) == []


def test_a_run_whose_process_was_killed_leaves_the_merged_file(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("killed", entries({"slot-0": "127.0.0.1:1"}, "killed"))
    publish("alive", entries({"slot-0": "127.0.0.1:2"}, "alive"))
    part = state / "runs" / "killed.json"
    part.write_text(json.dumps(json.loads(part.read_text()) | {"pid": 1 << 30}))
    (state / "runs" / "broken.json").write_text("{")
    assert merged_targets() == state / TARGETS
    assert merged(state) == ["127.0.0.1:2"] and not part.exists()


def test_many_writers_at_once_lose_nothing(state: Path) -> None:
    threads = [
        threading.Thread(target=publish, args=(f"run{i}", entries({"slot-0": f"127.0.0.1:{i}"}, f"run{i}")))
        for i in range(1, 13)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(merged(state)) == 12


def test_a_state_folder_that_cannot_be_written_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSERAY_STATE_DIR", str(tmp_path / "file"))
    write_targets(tmp_path / "t.json", {"slot-0": "127.0.0.1:1"}, "run")
    assert "target file is not written" in caplog.text
    assert json.loads((tmp_path / "t.json").read_text())
    monkeypatch.delenv("SPARSERAY_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_directory() == tmp_path / "sparseray"
