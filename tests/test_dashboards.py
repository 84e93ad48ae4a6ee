"""Dashboards, rules and page without a cluster: what is committed is current, and mistakes are told in a sentence."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from background import ROOT, Background, environment
from browser import CHROMIUM, NO_CHROMIUM, cards, document
from local_cluster import tiny_run, train
from watching import MISSING, PROMTOOL

from sparseray.dashboards.generate import DASHBOARDS, EVENTS
from sparseray.dashboards.panels import series
from sparseray.dashboards.rules import ALERTS, RECORDS
from sparseray.jobs.dashboard import main
from sparseray.jobs.http.server import App, HttpServer
from sparseray.jobs.watch.figures import Key, Readings, lines
from sparseray.jobs.watch.page import PrometheusSource, RecordSource, create_app, source_of
from sparseray.jobs.watch.records import QUERIES
from sparseray.jobs.watch.setup import FOLDER, generated, names_in, ray_token, read_dashboards
from sparseray.platform.metrics.registry import REGISTRY


@pytest.fixture(scope="module")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of twelve steps with evaluations."""
    return train(tmp_path_factory.mktemp("drawn") / "run", tiny_run(corpus, steps=12)).folder.path


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Iterator[str]:
    app = create_app(RecordSource(run_dir), read_dashboards())
    with HttpServer(App(app)) as server:
        yield server.url


def test_the_committed_files_are_what_the_generator_writes() -> None:
    stale = [name for name, text in generated().items() if (ROOT / name).read_text() != text]
    assert not stale, "run `python -m sparseray dashboard generate`"
    assert len(list(FOLDER.glob("*.json"))) == len(DASHBOARDS)


def test_every_metric_of_dashboards_and_rules_is_registered_and_every_metric_is_shown_somewhere() -> None:
    panels = [q.expr for board in DASHBOARDS for panel in board.panels for q in panel.queries]
    rules = [a.value + a.condition for a in ALERTS] + list(RECORDS.values()) + [EVENTS]
    named = {name for expr in panels + rules for name in names_in(expr)}
    assert named <= set(REGISTRY)
    unseen = {"process_virtual_memory_bytes"}
    assert set(REGISTRY) - named == unseen
    with pytest.raises(KeyError):
        series("train_lost")


def test_panels_follow_the_conventions_of_grafana() -> None:
    for board in read_dashboards():
        variables = {v["name"]: v for v in board["templating"]["list"]}
        assert variables["datasource"]["type"] == "datasource" and variables["run"]["includeAll"]
        assert board["annotations"]["list"][0]["expr"] == EVENTS
        panels = [panel for panel in board["panels"] if panel["type"] != "row"]
        assert len({panel["title"] for panel in panels}) == len(panels) >= 8
        for panel in panels:
            assert panel["description"].endswith((".", "?")) and panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all('run=~"$run"' in target["expr"] for target in panel["targets"])


@pytest.mark.skipif(PROMTOOL is None, reason=MISSING)
def test_the_rules_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    rules = ROOT / "sparseray" / "dashboards" / "sparseray.rules.yml"
    text = (ROOT / "tests" / "rules.test.yml").read_text()
    (tmp_path / "test.yml").write_text(text.replace("RULES", str(rules)))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"Sparseray{alert.name}\n" in text or f"Sparseray{alert.name}," in text for alert in ALERTS)


def test_every_alert_has_its_lines_in_the_runbook() -> None:
    headings = [x[3:] for x in (ROOT / "docs" / "runbook.md").read_text().splitlines() if x.startswith("## ")]
    assert headings == [alert.name for alert in ALERTS]


def test_prometheus_is_set_up_for_all_live_runs_for_given_ones_and_with_rays_token(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSERAY_STATE_DIR", str(tmp_path / "state"))
    assert main(["prometheus", "--out", str(tmp_path / "p")]) == 0
    ours, ray = yaml.safe_load((tmp_path / "p" / "prometheus.yml").read_text())["scrape_configs"]
    assert ours["file_sd_configs"][0]["files"] == [str(tmp_path / "state" / "prometheus_targets.json")]
    assert ray["file_sd_configs"][0]["files"][0].endswith("prom_metrics_service_discovery.json")
    if PROMTOOL is not None:
        config = str(tmp_path / "p" / "prometheus.yml")
        assert subprocess.run([PROMTOOL, "check", "config", config], capture_output=True).returncode == 0
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    token, file = ray_token(tmp_path)
    assert token == "given" and Path(file).read_text() == "given" and Path(file).stat().st_mode & 0o77 == 0
    assert main(["prometheus", "--out", str(tmp_path / "p"), "--run", str(run_dir)]) == 0
    written = yaml.safe_load((tmp_path / "p" / "prometheus.yml").read_text())
    files = written["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert files == [str(run_dir / "prometheus_targets.json")]


def test_dashboards_are_installed_where_grafana_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "grafana"
    (own / "provisioning").mkdir(parents=True)
    assert main(["install", "--grafana", str(own)]) == 0
    provider = yaml.safe_load((own / "provisioning" / "dashboards" / "sparseray.yml").read_text())[
        "providers"
    ]
    assert len(list(Path(provider[0]["options"]["path"]).glob("*.json"))) == len(DASHBOARDS)
    source = yaml.safe_load((own / "provisioning" / "datasources" / "sparseray.yml").read_text())
    assert source["datasources"][0]["url"] == "http://127.0.0.1:9090"

    # As Ray lays it out: a provider with its folder, and a data source.
    ray = tmp_path / "ray"
    for name in ("dashboards", "datasources"):
        (ray / "provisioning" / name).mkdir(parents=True)
    path = ray / "dashboards"
    content = {
        "apiVersion": 1,
        "providers": [{"name": "Ray", "type": "file", "options": {"path": str(path)}}],
    }
    (ray / "provisioning" / "dashboards" / "default.yml").write_text(yaml.safe_dump(content))
    sources = {
        "apiVersion": 1,
        "datasources": [{"name": "Prometheus", "type": "prometheus", "url": "http://x"}],
    }
    (ray / "provisioning" / "datasources" / "default.yml").write_text(yaml.safe_dump(sources))
    path.mkdir()
    (path / "sparseray-training.json").write_text("{}")
    capsys.readouterr()
    assert main(["install", "--grafana", str(ray)]) == 0
    assert "replaced an older" in capsys.readouterr().out
    assert len(list(path.glob("*.json"))) == len(DASHBOARDS)
    assert [p.name for p in sorted((ray / "provisioning").rglob("*.yml"))] == ["default.yml"] * 2


def test_figures_of_two_looks_are_rates_and_a_restarted_process_counts_from_zero() -> None:
    def look(tokens: float, count: float, total: float) -> dict[Key, float]:
        server, of = "server", frozenset[tuple[str, str]]()
        return {
            (server, "requests_open", of): 2.0,
            (server, "generation_tokens_total", of): tokens,
            (server, "time_to_first_token_seconds_count", of): count,
            (server, "time_to_first_token_seconds_sum", of): total,
        }

    before, now = look(100.0, 4.0, 1.0), look(140.0, 6.0, 1.1)
    later = Readings("served", now, before, 2.0, 1)
    assert later.rate("generation_tokens_total") == 20.0
    assert later.mean("time_to_first_token_seconds") == pytest.approx(0.05)
    assert later.values("requests_open", model="other") == []
    text = "\n".join(lines(later))
    assert "20.0 tokens/s" in text and "first token 50.0 ms" in text and "1 silent" in text
    first = Readings("served", now, {}, 0.0, 0)
    assert first.rate("generation_tokens_total") is None
    assert first.mean("time_to_first_token_seconds") == pytest.approx(1.1 / 6)
    tiers = {
        ("slot-0", "dse_lookups_total", frozenset({("tier", t)})): n
        for t, n in (("local", 3.0), ("remote", 9.0))
    }
    assert Readings("run", tiers, {}, 0.0, 0).share("dse_lookups_total", tier="local") == 0.25
    assert Readings("served", look(5.0, 0.0, 0.0), now, 2.0, 0).rate("generation_tokens_total") is None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_mistakes_are_told_in_one_sentence_with_their_cure(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr("sparseray.jobs.watch.page.DEFAULT_PROMETHEUS", nobody)
    (tmp_path / "old").mkdir()
    board = json.loads((FOLDER / "sparseray-training.json").read_text())
    board["panels"][1]["targets"][0]["expr"] = "sparseray_loss_of_old"
    (tmp_path / "old" / "training.json").write_text(json.dumps(board))
    shutil.copytree(run_dir, tmp_path / "young")
    (tmp_path / "young" / "metrics.jsonl").write_text("")
    shutil.copytree(run_dir, tmp_path / "torn")
    (tmp_path / "torn" / "metrics.jsonl").unlink()
    (tmp_path / "torn" / "metrics.jsonl").mkdir()
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    cases = (
        (["--prometheus", nobody], "no Prometheus answers at", "dashboard prometheus --out"),
        ([], "no Prometheus answers at", "--run RUN_DIR"),
        (["--prometheus", "localhost"], "is not an address", "http://127.0.0.1"),
        (["--run", str(tmp_path)], "is not the folder of a run", "give a run_dir"),
        (["--run", str(tmp_path / "young")], "holds no step yet", "wait"),
        (["--run", str(tmp_path / "torn")], "cannot be read", "check its rights"),
        (["--run", str(run_dir), "--port", port], f":{port}", "choose another port"),
        (["--dashboards", str(tmp_path / "old")], "sparseray_loss_of_old", "install"),
        (["--dashboards", str(tmp_path)], "holds no dashboards", "leave the option out"),
        (["install", "--grafana", str(tmp_path)], "has no folder provisioning/", "/etc/grafana"),
        (["prometheus", "--out", str(run_dir / "config.yaml")], "cannot be written", "folder of yours"),
        (["prometheus", "--out", str(tmp_path), "--run", str(tmp_path)], "no config.yaml", "run_dir"),
        (
            ["prometheus", "--out", str(tmp_path), "--ray", nobody],
            "gives no list of targets",
            "Ray head",
        ),
    )
    for arguments, what, cure in cases:
        assert main(arguments) == 2, arguments
        _, err = capsys.readouterr()
        assert err.startswith("sparseray: error: ") and err.count("\n") == 1, err
        assert what in err and cure in err, err
    taken.close()


def test_the_page_shows_the_run_that_was_named_whoever_answers_on_the_usual_port(
    page: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PrometheusSource, "_get", lambda *_args, **_parameters: [])
    assert isinstance(source_of(None, None), PrometheusSource)
    assert isinstance(source_of(None, str(run_dir)), RecordSource)
    with pytest.raises(SystemExit):
        main(["--run", str(run_dir), "--prometheus", page])
    assert "not allowed with" in capsys.readouterr().err


def test_the_page_answers_only_its_own_questions_on_its_own_name(page: str, run_dir: Path) -> None:
    expr = next(expr for expr, record in QUERIES.items() if record == "loss")
    state = httpx.get(f"{page}/api/state").json()
    start, end = state["span"]
    asked = {"query": expr, "run": "", "start": start, "end": end + 1, "step": 0.001 + (end - start) / 500}
    (curve,) = httpx.get(f"{page}/api/query", params=asked).json()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [float(value) for _, value in curve["values"]] == [record["loss"] for record in records]
    for change in ({"query": "up"}, {"step": "0"}, {"step": "nan"}, {"start": "x"}, {"step": "1e-9"}):
        assert httpx.get(f"{page}/api/query", params=asked | change).status_code == 400, change
    assert httpx.get(f"{page}/api/state", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{page}/page/../../jobs/serve.py").status_code == 404
    assert "default-src 'self'" in httpx.get(page).headers["content-security-policy"]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for path in (ROOT / "sparseray" / "dashboards" / "page").iterdir():
        text = path.read_text()
        assert "http://" not in text and "https://" not in text.replace(
            "https://github.com/leeoniya/uPlot", ""
        )


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_browser_draws_the_records_of_a_run_wide_and_narrow(page: str) -> None:
    shown = cards(document(f"{page}/?theme=dark#sparseray-training", (390, 844)))
    assert len(shown) == len(DASHBOARDS[0].panels)
    drawn = {title for title, state in shown.items() if state == "drawn"}
    recorded = {p.title for p in DASHBOARDS[0].panels if any(q.record for q in p.queries)}
    assert drawn == recorded
    shown = cards(document(f"{page}/#sparseray-sparse"))
    assert {"drawn", "unrecorded"} == set(shown.values()) and shown["Tokens per expert"] == "drawn"


@pytest.mark.long
def test_the_dashboard_command_serves_until_ctrl_c(run_dir: Path) -> None:
    command = [sys.executable, "-m", "sparseray", "dashboard", "--run", str(run_dir), "--port", "0"]
    process = Background([*command], environment())
    try:
        process.wait_for("Ctrl-C stops", 60.0)
        assert process.interrupt() == 0
        assert process.output.rstrip().endswith("stopped") and "Traceback" not in process.output
    finally:
        process.terminate()
