"""A real Prometheus beside a test, and what is asked of it."""

import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from background import free_ports

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
MISSING = "no prometheus here (apt-get install prometheus): NO PANEL, RULE OR EXPOSITION WAS CHECKED AGAINST A REAL ONE"


class Prometheus:
    """A Prometheus server on a free port of the loopback interface.

    Args:
        config: prometheus.yml.
        data: folder for its data.
    """

    def __init__(self, config: Path, data: Path) -> None:
        assert PROMETHEUS is not None
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={data}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        self._log = (data.parent / "prometheus.log").open("wb")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)
        self._log.close()

    def _get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def rules(self) -> list[dict[str, Any]]:
        """All rules with their health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def now(self, expr: str) -> list[dict[str, Any]]:
        """Result of an instant query."""
        found: list[dict[str, Any]] = self._get("query", query=fill(expr))["result"]
        return found

    def values(self, expr: str, seconds: float = 20.0) -> list[float]:
        """All finite values of the last seconds."""
        end = time.time()
        result = self._get("query_range", query=fill(expr), start=str(end - seconds), end=str(end), step="1")
        numbers = [float(value) for series in result["result"] for _, value in series["values"]]
        return [number for number in numbers if math.isfinite(number)]

    def wait_for(self, expr: str, seconds: float = 30.0) -> None:
        """Wait until a query has samples."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.now(expr):
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, f"no samples of {expr}"
            time.sleep(0.1)


def fill(expr: str) -> str:
    """Replace Grafana's variables."""
    return expr.replace("$__rate_interval", "10s").replace("$__interval", "10s").replace("$run", ".*")


def lint(exposition: bytes) -> str:
    """What `promtool check metrics` finds."""
    assert PROMTOOL is not None
    command = [PROMTOOL, "check", "metrics"]
    done = subprocess.run(command, input=exposition, capture_output=True, check=False)
    return (done.stdout + done.stderr).decode() if done.returncode else ""
