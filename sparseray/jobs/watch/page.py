"""The page of the `dashboard` command: the dashboards on loopback, for people without a Grafana.

It draws the same JSON that Grafana reads, from a Prometheus or, where none runs, from a run folder's own
records. The page loads nothing from anywhere else; requests for other host names are refused.
"""

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sparseray.errors import ConfigError
from sparseray.jobs.watch.records import Records
from sparseray.jobs.watch.setup import DEFAULT_PROMETHEUS, PACKAGE

MAX_POINTS = 2000
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


def serve(app: Starlette, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: the port is taken.
    """
    from sparseray.jobs.http.server import App, HttpServer

    server = HttpServer(App(app), port=port)
    what = app.state.source.what
    server.run(lambda: print(f"the dashboards are at {server.url} ({what}; Ctrl-C stops)", flush=True))
    print("stopped", flush=True)


class Source(Protocol):
    """Where the page's figures come from.

    Attributes:
        what: for people.
        kind: "prometheus" or "records".
    """

    what: str
    kind: str

    def runs(self) -> list[str]: ...
    def span(self) -> tuple[float, float] | None: ...
    def query(
        self, expr: str, run: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]] | None: ...


class RecordSource:
    """A run folder as a source."""

    kind = "records"

    def __init__(self, folder: Path) -> None:
        self._records = Records(folder)
        self.what = f"from the records of {folder}"

    def runs(self) -> list[str]:
        """The folder's only run."""
        return [self._records.run]

    def span(self) -> tuple[float, float]:
        """First and last record."""
        return self._records.span

    def query(
        self, expr: str, run: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]] | None:
        """Answer from the records."""
        return self._records.query(expr, start, end, step)


class PrometheusSource:
    """A Prometheus as a source.

    Args:
        address: of its HTTP API.

    Raises:
        ConfigError: nothing that answers like a Prometheus is there.
    """

    kind = "prometheus"

    def __init__(self, address: str) -> None:
        if not re.match(r"^https?://[^/]+", address):
            raise ConfigError(
                f"--prometheus {address} is not an address; give one such as {DEFAULT_PROMETHEUS}"
            )
        self._address = address.rstrip("/")
        self.what = f"from the Prometheus at {address}"
        try:
            self._get("query", query="1")
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"no Prometheus answers at {address} ({error}); start one as `python -m sparseray dashboard "
                "prometheus --out DIR` says, give another --prometheus, or draw a run's records with --run RUN_DIR"
            ) from None

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10.0) as answer:
            return json.load(answer)["data"]

    def runs(self) -> list[str]:
        """Runs that were scraped."""
        found = self._get("label/run/values", **{"match[]": 'up{job="sparseray"}'})
        return sorted(str(run) for run in found)

    def span(self) -> None:
        """Now is the end, and the reader chooses the start."""

    def query(
        self, expr: str, run: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]] | None:
        """Answer an expression, with Grafana's variables filled in."""
        chosen = re.escape(run).replace("\\", "\\\\").replace('"', '\\"') if run else ".*"
        expr = expr.replace("$__rate_interval", f"{math.ceil(max(15.0, 2 * step))}s").replace("$run", chosen)
        result = self._get("query_range", query=expr, start=str(start), end=str(end), step=str(step))[
            "result"
        ]
        return list(result)


def source_of(prometheus: str | None, run: str | None) -> Source:
    """Return what was named, the run folder or the Prometheus; the usual Prometheus where neither was.

    Raises:
        ConfigError: it cannot be used.
    """
    return RecordSource(Path(run)) if run else PrometheusSource(prometheus or DEFAULT_PROMETHEUS)


def create_app(source: Source, boards: list[dict[str, Any]]) -> Starlette:
    """Return the ASGI application.

    Args:
        source: of the figures.
        boards: dashboards as Grafana reads them.
    """
    page = PACKAGE / "page"
    known = {t["expr"] for board in boards for panel in board["panels"] for t in panel.get("targets", [])}
    known |= {mark["expr"] for board in boards for mark in board["annotations"]["list"]}

    async def index(_: Request) -> Response:
        return FileResponse(page / "index.html", headers={"Content-Security-Policy": _POLICY})

    async def dashboards(_: Request) -> Response:
        return JSONResponse(boards)

    async def state(_: Request) -> Response:
        return await answer(
            lambda: {"kind": source.kind, "what": source.what, "runs": source.runs(), "span": source.span()}
        )

    async def query(request: Request) -> Response:
        expr, run = request.query_params.get("query", ""), request.query_params.get("run", "")
        try:
            start, end, step = (float(request.query_params[name]) for name in ("start", "end", "step"))
        except (KeyError, ValueError):
            return refuse("start, end and step must be numbers")
        if expr not in known:
            return refuse("only the dashboards' own expressions are answered")
        if not (step > 0 and 0 <= (end - start) / step <= MAX_POINTS):
            return refuse(f"start, end and step must give at most {MAX_POINTS} points")
        return await answer(partial(source.query, expr, run, start, end, step))

    made = Starlette(
        routes=[
            Route("/", index),
            Route("/api/dashboards", dashboards),
            Route("/api/state", state),
            Route("/api/query", query),
            Mount("/page", StaticFiles(directory=page)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    )
    made.state.source = source
    return made


def refuse(message: str) -> Response:
    """Return the answer to a request that is not the page's."""
    return JSONResponse({"error": message}, status_code=400)


async def answer(work: Any) -> Response:
    """Run blocking work and tell a source that fails in a sentence."""
    try:
        return JSONResponse(await run_in_threadpool(work))
    except urllib.error.HTTPError as error:
        return JSONResponse({"error": f"Prometheus answers {error.code}: {error.reason}"}, status_code=502)
    except (OSError, ValueError, KeyError) as error:
        return JSONResponse({"error": f"the source of the figures does not answer: {error}"}, status_code=502)
