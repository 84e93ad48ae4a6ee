"""A ready prometheus.yml, dashboards for a Grafana, and how they are generated: what `dashboard ACTION` does.

The JSON and the rules ship with the package; nothing here needs Grafana's SDK but `generate`.
"""

import importlib.util
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sparseray.dashboards.rules import rules_yaml
from sparseray.errors import ClusterError, ConfigError
from sparseray.platform.metrics.discovery import TARGETS, merged_targets
from sparseray.platform.metrics.registry import PREFIX, REGISTRY, table

PACKAGE = Path(__file__).resolve().parents[2] / "dashboards"
FOLDER = PACKAGE / "json"
RULES = "sparseray.rules.yml"
DEFAULT_PROMETHEUS = "http://127.0.0.1:9090"


def write_prometheus(out: Path, runs: Sequence[Path], ray: str) -> None:
    """Write prometheus.yml and the rules.

    Raises:
        ConfigError: a run folder holds no run, or the folder cannot be written.
        ClusterError: the Ray head does not answer or refuses the token.
    """
    for run in runs:
        if not (run / "config.yaml").exists():
            raise ConfigError(
                f"--run {run} is not the folder of a run: it has no config.yaml; give a run_dir"
            )
    try:
        files = [str((run / TARGETS).absolute()) for run in runs] or [str(merged_targets().absolute())]
        out.mkdir(parents=True, exist_ok=True)
        jobs: list[dict[str, Any]] = [
            {
                "job_name": "sparseray",
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "file_sd_configs": [{"files": files, "refresh_interval": "1s"}],
            },
            _ray_job(ray, out),
        ]
        content = {
            "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
            "rule_files": [RULES],
            "scrape_configs": jobs,
        }
        (out / RULES).write_text(rules_yaml())
        (out / "prometheus.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}; give a folder of yours") from None
    print(f"written: {out / 'prometheus.yml'}, {out / RULES}; it scrapes what {' and '.join(files)} name")
    print(
        f"start: prometheus --config.file={out / 'prometheus.yml'} --storage.tsdb.path={out / 'data'} "
        "--web.listen-address=127.0.0.1:9090"
    )


def _ray_job(ray: str, out: Path) -> dict[str, Any]:
    """Ray's own targets: the file that a head on this host writes, or its HTTP discovery with the token."""
    if not ray:
        folder = os.environ.get("RAY_TMPDIR", "/tmp/ray")
        file = f"{folder}/prom_metrics_service_discovery.json"
        return {"job_name": "ray", "file_sd_configs": [{"files": [file]}]}
    token, file = ray_token(out)
    url = ray.rstrip("/") + "/api/prometheus/sd"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5.0) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        cure = "set RAY_AUTH_TOKEN or put the cluster's token into ~/.ray/auth_token"
        raise ClusterError(f"--ray {ray} answers {error.code} to {url}; {cure}") from None
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"--ray {ray} gives no list of targets ({error}); give the address of a Ray head's dashboard"
        ) from None
    discovery: dict[str, Any] = {"url": url, "refresh_interval": "5s"}
    if file:
        # Without its type, Prometheus 2.42 sends the bare token to a discovery address, and Ray refuses it.
        discovery["authorization"] = {"type": "Bearer", "credentials_file": file}
    return {"job_name": "ray", "http_sd_configs": [discovery]}


def ray_token(out: Path) -> tuple[str, str]:
    """Return Ray's token and a file that holds it, both empty without token authentication.

    Args:
        out: where a token of the environment is written, for the user alone to read.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return "", ""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        path = out / "ray_token"
        path.touch(mode=0o600)
        path.write_text(token)
    elif path.exists():
        token = path.read_text().strip()
    return (token, str(path.absolute())) if token else ("", "")


def install(grafana: Path, prometheus: str) -> None:
    """Copy the dashboards to where this Grafana reads, with a provider and a data source where there are none.

    Raises:
        ConfigError: no Grafana is configured there, or it cannot be written.
    """
    provisioning = grafana / "provisioning"
    if not provisioning.is_dir():
        raise ConfigError(
            f"--grafana {grafana} has no folder provisioning/; give the one that Grafana was started with, such as "
            "/etc/grafana, or metrics/grafana in the session folder of a running Ray"
        )
    try:
        target = _provider(grafana, provisioning / "dashboards")
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted(FOLDER.glob("*.json")):
            place = target / source.name
            stale = place.exists() and place.read_text() != source.read_text()
            shutil.copyfile(source, place)
            print(f"{'replaced an older' if stale else 'written:'} {place}")
        _data_source(provisioning / "datasources", prometheus)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--grafana {grafana} cannot be used: {error}; check its files and rights"
        ) from None
    print("Grafana shows them after its next scan of the folder (10 s by default), or a restart")


def _provider(grafana: Path, folder: Path) -> Path:
    """Folder of the first provider of dashboard files; a provider of ours where there is none."""
    for file in sorted(folder.glob("*.y*ml")):
        for provider in (yaml.safe_load(file.read_text()) or {}).get("providers", []):
            if path := provider.get("options", {}).get("path"):
                return Path(path)
    folder.mkdir(exist_ok=True)
    target = (grafana / "dashboards" / "sparseray").absolute()
    content = {"name": "sparseray", "folder": "sparseray", "type": "file", "options": {"path": str(target)}}
    file = folder / "sparseray.yml"
    file.write_text(yaml.safe_dump({"apiVersion": 1, "providers": [content]}, sort_keys=False))
    print(f"written: {file}")
    return target


def _data_source(folder: Path, prometheus: str) -> None:
    for file in sorted(folder.glob("*.y*ml")):
        if any(
            s.get("type") == "prometheus" for s in (yaml.safe_load(file.read_text()) or {})["datasources"]
        ):
            return
    folder.mkdir(exist_ok=True)
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus}
    file = folder / "sparseray.yml"
    file.write_text(yaml.safe_dump({"apiVersion": 1, "datasources": [source]}, sort_keys=False))
    print(f"written: {file}")


def generated() -> dict[str, str]:
    """Return every generated file by its path in the repository.

    Raises:
        ConfigError: Grafana's SDK is not installed.
    """
    if importlib.util.find_spec("grafana_foundation_sdk") is None:
        raise ConfigError(
            "generating dashboards needs Grafana's SDK: pip install -c constraints.txt -e '.[dev]' "
            "(users need not: the JSON comes with the package)"
        )
    from sparseray.dashboards.generate import DASHBOARDS, to_json

    files = {f"sparseray/dashboards/json/{board.uid}.json": to_json(board) for board in DASHBOARDS}
    files[f"sparseray/dashboards/{RULES}"] = rules_yaml()
    files["docs/metrics.md"] = table()
    return files


def generate(root: Path, *, check: bool) -> None:
    """Write the generated files, or say which are stale.

    Raises:
        ConfigError: a file is stale and `check` was asked for, or the SDK is missing.
    """
    files = generated()
    stale = [name for name, text in files.items() if not _same(root / name, text)]
    if check and stale:
        raise ConfigError(f"stale: {', '.join(stale)}; run `python -m sparseray dashboard generate`")
    for name in stale:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(files[name])
        print(f"written: {name}")
    print("all generated files are current")


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def read_dashboards(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Read dashboards, training first.

    Raises:
        ConfigError: a file is no dashboard, or asks for a metric that is not recorded (any more).
    """
    order = ["training", "sparse", "serving", "cluster"]
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            board = json.loads(path.read_text())
            expressions = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a dashboard of ours ({error}); remove it") from None
        unknown = sorted({name for expr in expressions for name in names_in(expr)} - set(REGISTRY))
        if unknown:
            raise ConfigError(
                f"{path} asks for {PREFIX}{unknown[0]}, which this version does not record: it is of another version; "
                "put the present ones there with `python -m sparseray dashboard install --grafana DIR`, or remove it"
            )
        found.append(board)
    if not found:
        raise ConfigError(f"{folder} holds no dashboards; give a folder with *.json, or leave the option out")
    rank = {f"sparseray-{name}": index for index, name in enumerate(order)}
    return sorted(found, key=lambda board: rank.get(board["uid"], len(rank)))


def names_in(expr: str) -> set[str]:
    """Names of the registry's kind that PromQL mentions, without prefix and without a histogram's suffix."""
    found = set()
    for word in "".join(c if c.isalnum() or c == "_" else " " for c in expr).split():
        if word.startswith(PREFIX):
            name = word.removeprefix(PREFIX)
            base = name
            for suffix in ("_bucket", "_sum", "_count"):
                base = base.removesuffix(suffix)
            is_histogram = base in REGISTRY and REGISTRY[base].kind == "histogram"
            found.add(base if is_histogram else name)
    return found
