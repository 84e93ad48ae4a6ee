"""The interface for orchestrators: who may ask, what it tells, and what it makes the server do."""

import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_parts import Parts, served_by

from sparseray.errors import ConfigError, SchedulerLostError
from sparseray.jobs.http.admin import admin_token, create_admin_app
from sparseray.jobs.http.generation_client import LocalClient
from sparseray.jobs.http.server import HttpServer, create_app

BODY = {"model": "tiny", "prompt": "the dog", "max_tokens": 4}


class Asked:
    """A scheduler that notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refusal, self.is_lost = "", False

    def __call__(self, method: str, *arguments: Any) -> Any:
        if self.is_lost:
            raise SchedulerLostError("gone")
        self.calls.append((method, *arguments))
        return {"state": "serving"} if method == "status" else self.refusal


@contextmanager
def administered(parts: Parts, asked: Asked) -> Iterator[tuple[str, httpx.Client]]:
    """A server's address, and a client of its admin interface."""
    with LocalClient(parts.engine()) as engine:
        app = create_app(engine, served_by(parts))
        admin = create_admin_app(app, asked, "right")
        with (
            HttpServer(app, drain_s=0.2) as server,
            HttpServer(admin) as other,
            httpx.Client(base_url=other.url, headers={"Authorization": "Bearer right"}, timeout=20) as client,
        ):
            yield server.url, client


def test_without_the_token_nothing_is_told_or_done(parts: Parts) -> None:
    asked = Asked()
    with administered(parts, asked) as (url, client):
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
            assert client.get("/admin/status", headers=headers).status_code == 401
            assert client.post("/admin/drain", headers=headers).status_code == 401
            assert client.post("/admin/scale", json={}, headers=headers).status_code == 401
        assert client.get("/health", headers={"Authorization": ""}).status_code == 401
        assert not asked.calls and httpx.get(f"{url}/ready").status_code == 200
        # Nothing of it is on the port that clients know.
        assert httpx.get(f"{url}/admin/status", headers={"Authorization": "Bearer right"}).status_code == 404


def test_status_tells_of_ingress_and_scheduler_also_while_that_is_lost(parts: Parts) -> None:
    asked = Asked()
    with administered(parts, asked) as (_, client):
        own = {"ready": True, "reason": "", "draining": False, "open_requests": 0}
        assert client.get("/admin/status").json() == {**own, "scheduler": {"state": "serving"}}
        asked.is_lost = True
        assert client.get("/admin/status").json() == {**own, "scheduler": {"state": "lost: gone"}}
        lost = client.post("/admin/scale", json={"role": "experts", "count": 2})
        assert lost.status_code == 503 and "ask again" in lost.json()["error"]["message"]


def test_scale_reaches_the_scheduler_and_its_refusal_comes_back(parts: Parts) -> None:
    asked = Asked()
    with administered(parts, asked) as (_, client):
        wish = {"role": "experts", "count": 2}
        assert client.post("/admin/scale", json=wish).json() == wish
        assert asked.calls == [("scale", "experts", 2)]
        asked.refusal = "no room"
        refused = client.post("/admin/scale", json=wish)
        assert (refused.status_code, refused.json()["error"]["message"]) == (409, "no room")
        for body in (
            {},
            {"role": "x", "count": 1},
            {"role": "experts", "count": True},
            {"role": "experts", "count": -1},
        ):
            assert client.post("/admin/scale", json=body).status_code == 400
        assert client.post("/admin/scale", content=b" " * 5000).status_code == 413
        assert client.post("/admin/drain", content=b"[]").status_code == 400


def test_a_drained_server_finishes_what_it_has_and_sends_the_rest_elsewhere(parts: Parts) -> None:
    begun, ended = threading.Event(), []

    def stream(url: str) -> None:
        body = {**BODY, "max_tokens": 120, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                begun.set()
                ended.append(line)

    with administered(parts, Asked()) as (url, client):
        thread = threading.Thread(target=stream, args=(url,))
        thread.start()
        assert begun.wait(20)
        assert client.post("/admin/drain").json()["draining"] is True
        refused = httpx.post(f"{url}/v1/completions", json=BODY)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "draining"
        down = httpx.get(f"{url}/ready")
        assert down.status_code == 503 and "drains" in down.json()["reason"]
        assert httpx.get(f"{url}/health").status_code == 200
        thread.join(60)
        assert "data: [DONE]" in ended
        deadline = time.monotonic() + 10
        while client.get("/admin/status").json()["open_requests"]:
            assert time.monotonic() < deadline
        assert client.post("/admin/drain", json={"drain": False}).json()["draining"] is False
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=20).status_code == 200


def test_the_token_is_one_for_all_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    first = admin_token(folder)
    assert len(first) >= 32 and admin_token(folder) == first
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        admin_token(folder)
