"""Every panel and every rule against a real Prometheus that watches a real training run and a real server.

Then one actor of the run is killed: its series must be gone within two seconds, and the panels that are
rightly empty in health must show the fault.
"""

import json
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from background import Background, end_leftovers, environment, free_ports, sparseray
from browser import CHROMIUM, NO_CHROMIUM, cards, document
from local_cluster import tiny_run, train
from processes import resting
from watching import MISSING, PROMETHEUS, Prometheus, lint

from sparseray.dashboards.cluster import CLUSTER
from sparseray.dashboards.generate import EVENTS
from sparseray.dashboards.panels import Dashboard
from sparseray.dashboards.rules import ALERTS, RECORDS
from sparseray.dashboards.serving import SERVING
from sparseray.dashboards.sparse import SPARSE
from sparseray.dashboards.training import TRAINING
from sparseray.jobs.http.server import App, HttpServer
from sparseray.jobs.watch.page import PrometheusSource, create_app
from sparseray.jobs.watch.setup import read_dashboards, write_prometheus
from sparseray.model.config import MTPConfig
from sparseray.platform.config import save_yaml
from sparseray.platform.metrics.registry import PREFIX, REGISTRY

PROMPT = "rain river stone bread light house under winter green north seven learn sparse hold move rain"
pytestmark = [pytest.mark.ray, pytest.mark.skipif(PROMETHEUS is None, reason=MISSING)]
BOARDS = (TRAINING, SPARSE, SERVING, CLUSTER)


@dataclass
class Live:
    """What runs: a server at `url`, a run in `run_dir`, a Prometheus; requests stop while `quiet` is set."""

    url: str
    run: Background
    run_dir: Path
    prometheus: Prometheus
    quiet: threading.Event
    env: dict[str, str]


def drive(url: str, stop: threading.Event, quiet: threading.Event) -> None:
    """Ask again and again until told to stop."""
    body = {"model": "served", "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True}
    with httpx.Client(timeout=20) as client:
        while not stop.wait(0.8):
            if quiet.is_set():
                continue
            try:
                client.post(f"{url}/v1/completions", json=body)
            except httpx.HTTPError:
                continue


@pytest.fixture(scope="module")
def live(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    # Two slots with every role and a replica of all state: the run goes on when one is killed.
    shared = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2}
    config = tiny_run(corpus, steps=100_000, colocated=True, **shared)
    config = replace(
        config,
        train=replace(config.train, checkpoint_every=5, eval_every=5),
        cluster=replace(config.cluster, deadline_s=20.0, hang_s=3.0),
        metrics=replace(config.metrics, per_expert=True),
    )
    save_yaml(config, folder / "run.yaml")
    env, (port,) = environment(SPARSERAY_STATE_DIR=str(folder / "state")), free_ports(1)
    command = [sys.executable, "-m", "sparseray"]
    pretrain = ["pretrain", "--config", str(folder / "run.yaml"), "--run_dir", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSERAY_STATE_DIR", str(folder / "state"))
        write_prometheus(folder / "prometheus", [], "")
    prometheus = Prometheus(folder / "prometheus" / "prometheus.yml", folder / "prometheus" / "data")
    # Everybody watches the run, and nobody waits for it.
    processes = [run := Background([*command, *pretrain], env | resting(1.0))]
    stop, quiet, url = threading.Event(), threading.Event(), f"http://127.0.0.1:{port}"
    clients = [threading.Thread(target=drive, args=(url, stop, quiet), daemon=True) for _ in range(2)]
    try:
        # While the run starts, a model that has learned to write whole characters.
        trained = tiny_run(corpus, steps=30, colocated=True)
        trained = replace(trained, model=replace(trained.model, mtp=MTPConfig(depth=1)))
        checkpoint = train(folder / "served", trained).folder.newest_checkpoint()
        serve = ["serve", "--checkpoint", str(checkpoint), "--port", str(port), "--model_name", "served"]
        serve += ["--serve.speculate", "mtp"]
        # Prompts are read token by token, so that a first token takes long enough to compare two clocks.
        processes.append(server := Background([*command, *serve, "--serve.prefill_chunk", "1"], env))
        server.wait_for("Ctrl-C stops", 120.0)
        run.wait_for("checkpoint ", 120.0)
        for client in clients:
            client.start()
        # A rate needs two scrapes of a series; these appear with the first answer and the first draft.
        prometheus.wait_for('sum(rate(sparseray_request_latency_seconds_count{run="served"}[10s])) > 0')
        prometheus.wait_for('sum(rate(sparseray_drafted_tokens_total{run="served"}[10s])) > 0')
        # The last of these is told of some steps only.
        for name in (*RECORDS, 'sparseray_moe_router_bias_range{run="run"}'):
            prometheus.wait_for(name)
        yield Live(url, run, folder / "run", prometheus, quiet, env)
    finally:
        stop.set()
        # The second signal does not wait for a slot that has gone.
        run.process.terminate()
        time.sleep(0.3)
        for process in processes:
            process.terminate(30.0)
        prometheus.close()
        left = end_leftovers(env)
    assert not left


def targets(live: Live) -> dict[str, str]:
    """Address of every process that Prometheus is told about, by run and name."""
    path = live.run_dir.parent / "state" / "prometheus_targets.json"
    entries = json.loads(path.read_text())
    return {f"{e['labels']['run']}/{e['labels']['process']}": e["targets"][0] for e in entries}


def unanswered(live: Live, board: Dashboard, *when: str) -> list[str]:
    """Queries without one finite value, of the panels that should have some."""
    wanted = [panel for panel in board.panels if panel.when in when]
    queries = [(panel.title, query.expr) for panel in wanted for query in panel.queries]
    return [f"{title}: {expr}" for title, expr in queries if not live.prometheus.values(expr)]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_every_panel_shows_data(live: Live, board: Dashboard) -> None:
    assert not unanswered(live, board, "always", "asked")


def test_the_committed_json_asks_what_was_checked(live: Live) -> None:
    asked = [t["expr"] for b in read_dashboards() for p in b["panels"] for t in p.get("targets", [])]
    assert sorted(asked) == sorted(q.expr for b in BOARDS for p in b.panels for q in p.queries)


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_browser_draws_every_panel_of_two_dashboards(live: Live) -> None:
    with HttpServer(App(create_app(PrometheusSource(live.prometheus.url), read_dashboards()))) as server:
        for board in (SPARSE, SERVING):
            shown = cards(document(f"{server.url}/?range=300#{board.uid}"))
            assert set(shown) == {panel.title for panel in board.panels}
            wanted = {panel.title for panel in board.panels if panel.when in ("always", "asked")}
            assert {title for title in wanted if shown[title] != "drawn"} == set()


def test_every_rule_is_healthy_and_has_something_to_judge(live: Live) -> None:
    rules = live.prometheus.rules()
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert len(rules) == len(RECORDS) + len(ALERTS)
    assert [name for name in RECORDS if not live.prometheus.now(name)] == []
    assert [alert.name for alert in ALERTS if not live.prometheus.now(alert.value)] == []
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert not firing


def test_every_metric_of_the_registry_is_exported_and_passes_promtool(live: Live) -> None:
    exported: set[str] = set()
    for name, address in targets(live).items():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            text = answer.read()
        assert lint(text) == "", name
        exported |= set(re.findall(rf"^# TYPE {PREFIX}(\w+)", text.decode(), re.MULTILINE))
    assert exported == set(REGISTRY)


def test_values_are_fresh_and_of_both_runs(live: Live) -> None:
    newest = live.prometheus.now('timestamp(sparseray_train_step{run="run"})')
    assert time.time() - float(newest[0]["value"][1]) < 2.0
    assert {n.split("/")[0] for n in targets(live)} == {"run", "served"}
    assert all(series["value"][1] == "1" for series in live.prometheus.now('up{job="sparseray"}'))


@pytest.mark.long
def test_the_terminal_shows_the_same_figures(live: Live) -> None:
    shown = sparseray("top", "--once", "--run_dir", str(live.run_dir), env=live.env, timeout=60.0)
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "figures of run" in text and "figures of served" in text
    wanted = "gradient norm, load at most, gate, selected, from the own slot, s old, in the batch, first token, answer"
    assert [word for word in wanted.split(", ") if word not in text] == []


def listener(address: str) -> psutil.Process:
    """The slot that listens at an address; nobody else, who may have got the port of a slot that is gone."""
    port = int(address.rsplit(":", 1)[1])
    for process in psutil.process_iter():
        try:
            if "SlotActor" not in " ".join(process.cmdline()):
                continue
            if any(c.status == "LISTEN" and c.laddr.port == port for c in process.net_connections("tcp")):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"nobody listens at {address}")


@pytest.mark.long
def test_a_killed_actor_takes_its_series_along_and_the_fault_is_shown(live: Live) -> None:
    # On a machine that is busy enough a slot may have been lost and replaced before.
    killed = max(name.removeprefix("run/") for name in targets(live) if name.startswith("run/slot-"))
    series = f'sparseray_process_cpu_seconds_total{{run="run",process="{killed}"}}'
    assert live.prometheus.now(series)
    listener(targets(live)[f"run/{killed}"]).kill()
    started = time.monotonic()
    while live.prometheus.now(series):
        assert time.monotonic() - started < 2.0, "the series of a killed actor stay"
        time.sleep(0.05)
    live.prometheus.wait_for('sum(sparseray_elastic_events_total{run="run",kind="recovered"}) > 0', 60.0)
    asked = sparseray("scale", "attention", "1", "--run_dir", str(live.run_dir), env=live.env, timeout=120.0)
    assert asked.returncode == 0, asked.stderr
    live.prometheus.wait_for('sum(sparseray_elastic_events_total{run="run",kind="resized"}) > 0', 60.0)
    time.sleep(2.0)
    for board in BOARDS:
        assert not unanswered(live, board, "fault", "resize")
    assert live.prometheus.values(EVENTS)


def stream(url: str, max_tokens: int) -> tuple[float, float]:
    """One streamed completion by the client's own clock: seconds to the first token, and from it to the last."""
    body: dict[str, Any] = {
        "model": "served",
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    body["temperature"] = 0.0
    with httpx.Client(timeout=20) as client:
        client.get(f"{url}/health")
        started, times = time.perf_counter(), []
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
    # Were a token's text held back, as part of a character is, the first chunk would not be the first token.
    assert len(times) == max_tokens
    return times[0] - started, times[max_tokens - 1] - times[0]


def histograms(url: str) -> dict[str, float]:
    """Sums and counts of the server's two latency histograms."""
    text = httpx.get(f"{url}/metrics").text
    pattern = r"^sparseray_(time_to_first_token|inter_token_latency)_seconds_(sum|count) (\S+)$"
    return {f"{n}_{part}": float(value) for n, part, value in re.findall(pattern, text, re.MULTILINE)}


@pytest.mark.long
def test_latencies_agree_with_the_clock_of_a_client(live: Live) -> None:
    """Last, when the run has ended, and alone: beside other tests the clocks' processes wait for each other."""
    requests, tokens, rounds = 4, 16, []
    live.quiet.set()
    live.run.terminate(60.0)
    live.prometheus.wait_for('sparseray_requests_open{run="served"} == 0')
    for _ in range(12):
        before = histograms(live.url)
        seen = [stream(live.url, tokens) for _ in range(requests)]
        after = histograms(live.url)
        found = {name: after[name] - before[name] for name in after}
        assert found["time_to_first_token_count"] == requests
        assert found["inter_token_latency_count"] == requests * (tokens - 1)
        first, rest = (sum(times) for times in zip(*seen))
        rounds.append((found["time_to_first_token_sum"] / first, found["inter_token_latency_sum"] / rest))
        if all(abs(ratio - 1.0) < 0.05 for ratio in rounds[-1]):
            return
    raise AssertionError(f"server over client, first token and rest, of every round: {rounds}")
