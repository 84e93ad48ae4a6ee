"""Ends of a server and of a stream: errors, signals, and what open requests get."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import httpx
import pytest
from serving_parts import Parts, Service, app_of, read_events, served_by, serving

from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.errors import ConfigError
from sparseray.jobs.http.generation_client import LocalClient
from sparseray.jobs.http.server import HttpServer, create_app


class _BreakingClient:
    """Gives one token, then fails."""

    async def generate(self, request: GenerationRequest, *, patience: int = 1) -> Any:
        if request.max_tokens > 1:
            yield [TokenEvent(request_id=request.request_id, index=0, token_id=66)]
        yield [
            TokenEvent(request_id=request.request_id, index=1, finish_reason="error", error="secret detail")
        ]

    reason = failure = ""

    def version(self, request_id: str = "") -> str:
        return ""

    async def cancel(self, request_id: str) -> None:
        return None


def test_errors_before_the_first_byte_have_a_status_and_later_ones_are_sent_in_the_stream() -> None:
    with HttpServer(app_of(_BreakingClient())) as server:
        body = {"model": "tiny", "prompt": "a", "stream": True}
        early = httpx.post(server.url + "/v1/completions", json={**body, "max_tokens": 1})
        assert early.status_code == 500
        assert early.json()["error"]["type"] == "server_error"
        late = httpx.post(server.url + "/v1/completions", json={**body, "max_tokens": 5})
        assert late.status_code == 200
        assert read_events(late.text)[-1]["error"]["code"] == "engine_error"
        assert "secret" not in early.text + late.text


def test_port_in_use_is_a_plain_error(service: Service) -> None:
    with pytest.raises(ConfigError, match="choose another port"):
        HttpServer(app_of(service.client), port=service.server.port)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["at its announcement", "while it serves"])
def test_a_signal_stops_the_server_cleanly_from_its_announcement_on(sent: int, when: str) -> None:
    server = HttpServer(app_of(_BreakingClient()))
    before, seen = signal.getsignal(sent), list[int]()

    def stop() -> None:
        while when == "while it serves" and httpx.get(f"{server.url}/health").status_code != 200:
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    if when == "at its announcement":
        collected = gc.get_freeze_count()
        server.run(lambda: (seen.append(gc.get_freeze_count()), stop())[1])
        # No collection looks at what was loaded before, and afterwards each does again.
        assert seen[0] > collected == gc.get_freeze_count()
    else:
        stopper = threading.Thread(target=stop)
        server.run(stopper.start)
        stopper.join()
    assert signal.getsignal(sent) is before
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_open_streams_end_with_an_error_event_when_the_server_stops(
    parts: Parts, sent: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twenty streams and a whole answer are open, none of which can end within drain_s; nothing is cut."""
    texts: list[str] = []
    statuses: list[int] = []
    body = {"prompt": "a", "max_tokens": 180, "ignore_eos": True}
    engine = parts.engine(max_batch=2)
    step = engine.step
    engine.step = lambda: (time.sleep(0.01), step())[1]
    with LocalClient(engine) as client:
        server = HttpServer(create_app(client, served_by(parts)), drain_s=0.3)

        def stream() -> None:
            texts.append(
                httpx.post(f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=30).text
            )

        def whole() -> None:
            many = {**body, "n": 30}
            statuses.append(httpx.post(f"{server.url}/v1/completions", json=many, timeout=30).status_code)

        def stop() -> None:
            deadline = time.monotonic() + 20
            while client.stats.waiting + client.stats.running < 50 and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), sent)

        threads = [threading.Thread(target=call) for call in (*[stream] * 20, whole, stop)]

        def start() -> None:
            for thread in threads:
                thread.start()

        started = time.monotonic()
        server.run(start)
        assert time.monotonic() - started < 20
        for thread in threads:
            thread.join()
        assert statuses == [503]
        begun = [text for text in texts if text.startswith("data: ")]
        assert begun
        for text in begun:
            assert read_events(text)[-1]["error"]["code"] == "server_stopping"
        for text in set(texts) - set(begun):
            assert '"server_stopping"' in text
    shown = caplog.text + capfd.readouterr().err
    assert "Traceback" not in shown
    assert caplog.text.count("were ended") <= 1


def test_a_stop_waits_for_requests_that_end_in_time(parts: Parts) -> None:
    answers: list[httpx.Response] = []
    with serving(parts, drain_s=20.0) as served:
        body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
        thread = threading.Thread(target=lambda: answers.append(served.post(body)))
        thread.start()
        while served.client.stats.running == 0:
            time.sleep(0.01)
    thread.join()
    assert read_events(answers[0].text)[-1]["choices"][0]["finish_reason"] == "length"


def test_requests_that_are_still_being_sent_do_not_hold_a_stop_up(
    parts: Parts, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(parts, drain_s=0.1) as served:
        half = served.connect(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
        )
        time.sleep(0.2)
        started = time.monotonic()
    assert time.monotonic() - started < 8
    half.close()
    assert "Traceback" not in capfd.readouterr().err
