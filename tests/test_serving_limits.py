"""Limits before work: what cannot be served is refused before it is read, tokenised or computed."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving_parts import MAX_MODEL_LEN, Parts, Service, post_bytes, serving

from sparseray.jobs.http.limits import ConnectionLimits

CHAT = "/v1/chat/completions"
MESSAGE = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def wide(parts: Parts) -> Iterator[Service]:
    """A server with the limits of every day, and short waits."""
    connection = ConnectionLimits(header_timeout_s=0.6, idle_timeout_s=0.8)
    with serving(parts, limits={"connection": connection, "body_timeout_s": 1.0}) as found:
        yield found


def test_server_refuses_large_and_slow_bodies_unknown_paths_and_methods_and_goes_on(service: Service) -> None:
    answer = service.post({"model": "tiny", "prompt": "a" * 30_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert "error" in httpx.get(service.url + "/nothing").json()
    wrong = httpx.get(service.url + "/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert set(httpx.post(service.url + "/health").headers["allow"].split(", ")) == {"GET", "HEAD"}
    with service.connect(post_bytes(b"{}").replace(b"Length: 2", b"Length: 50")) as slow:
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    with pytest.raises(openai.NotFoundError):
        service.complete(model="other")
    assert service.complete().choices


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "the dog " * 480_000}),
        ("/v1/completions", {"prompt": "東" * 600_000}),
        ("/v1/completions", {"prompt": ["the dog " * 20_000] * 20}),
        ("/v1/completions", {"prompt": [1] * 1_000_000}),
        ("/v1/completions", {"prompt": ["a"] * 100_000}),
        ("/v1/completions", {"prompt": "a", "stop": ["a" * 200] * 10_000}),
        ("/v1/completions", {"prompt": "a", "bad_words": ["the dog " * 400_000]}),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 500_000}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(200_000)}}),
        ("/v1/completions", {"prompt": "a", "guided_regex": "a" * 3_000_000}),
        ("/v1/completions", {"prompt": "a", "guided_choice": ["a"] * 500_000}),
        (CHAT, {"messages": [{"role": "user", "content": "the dog " * 480_000}]}),
        (CHAT, {"messages": [{"role": "user", "content": "the dog " * 400}] * 900}),
        (CHAT, {"messages": [MESSAGE] * 60_000}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "dog "}] * 80_000}]}),
        ("/tokenize", {"prompt": "the dog " * 480_000}),
        ("/tokenize", {"messages": [{"role": "user", "content": "the dog " * 480_000}]}),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    wide: Service, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    from sparseray.jobs.http.text_stream import Vocabulary

    tokenised, encode = [0], Vocabulary.encode

    def counted(self: Vocabulary, text: str) -> tuple[int, ...]:
        tokenised[0] += len(text)
        return encode(self, text)

    monkeypatch.setattr(Vocabulary, "encode", counted)
    data = json.dumps(body).encode()
    answer = wide.post(data, path)
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.content) < 1000
    assert tokenised[0] <= 20_000


def test_long_texts_do_not_hold_other_requests_up(wide: Service) -> None:
    """The event loop answers while bodies of the largest size are refused, and while long texts are cut."""
    stop, waits = threading.Event(), []

    def flood(body: bytes) -> None:
        while not stop.is_set():
            wide.post(body)

    bodies = [{"prompt": "x" * 3_900_000}, {"prompt": "the dog " * 480_000, "truncate_prompt_tokens": 5}]
    threads = [threading.Thread(target=flood, args=(json.dumps(body).encode(),)) for body in bodies * 2]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        started = time.monotonic()
        assert httpx.get(wide.url + "/health", timeout=10).status_code == 200
        waits.append(time.monotonic() - started)
    stop.set()
    for thread in threads:
        thread.join()
    assert sorted(waits)[len(waits) // 2] < 0.5


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a " * 150}),
        (CHAT, {"messages": [{"role": "user", "content": "a " * 150}]}),
    ],
)
def test_the_error_of_a_long_prompt_has_the_words_that_clients_look_for(
    service: Service, path: str, fields: dict[str, Any]
) -> None:
    error = service.post({**fields, "max_tokens": 100}, path).json()["error"]
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_connections_that_do_not_send_their_bodies_take_no_place(parts: Parts) -> None:
    with serving(parts, limits={"max_requests": 2, "body_timeout_s": 5.0}) as served:
        silent = [served.connect(post_bytes(b"{}").replace(b"Length: 2", b"Length: 50")) for _ in range(16)]
        assert served.post({"prompt": "a", "max_tokens": 1}).status_code == 200
        for connection in silent:
            connection.close()


def test_bodies_that_are_being_read_are_limited_together(parts: Parts) -> None:
    limits = {"max_buffered_bytes": 100_000, "body_timeout_s": 5.0}
    with serving(parts, limits=limits) as served:
        begun = [served.connect(post_bytes(b"x" * 30_000).replace(b"30000", b"40000")) for _ in range(3)]
        time.sleep(0.3)
        assert served.post({"prompt": "a" * 20_000}).status_code == 429
        for connection in begun:
            connection.close()
        time.sleep(0.1)
        assert served.post({"prompt": "a", "max_tokens": 1}).status_code == 200


def ended(connection: socket.socket, within_s: float) -> bytes:
    """What came until the server closed the connection."""
    connection.settimeout(within_s)
    found = b""
    while True:
        piece = connection.recv(65536)
        if not piece:
            return found
        found += piece


@pytest.mark.parametrize(
    ("sent", "dribble", "answer"),
    [
        (b"", b"", b""),
        (b"GET /health HT", b"", b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n", b"HTTP/1.1 408"),
        # A body that was refused and goes on coming, a piece at a time.
        (post_bytes(b"", "/nothing").replace(b"Length: 0", b"Length: 9999"), b"a", b"HTTP/1.1 404"),
        # A request that was answered: the connection idles.
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n", b"", b"HTTP/1.1 200"),
    ],
)
def test_connections_that_dawdle_are_closed(
    wide: Service, sent: bytes, dribble: bytes, answer: bytes
) -> None:
    with wide.connect(sent) as connection:
        stop = threading.Event()

        def send() -> None:
            while dribble and not stop.wait(0.1):
                try:
                    connection.sendall(dribble)
                except OSError:
                    return

        thread = threading.Thread(target=send)
        thread.start()
        try:
            found = ended(connection, 4.0)
        except ConnectionResetError:
            found = answer
        finally:
            stop.set()
            thread.join()
        assert found.startswith(answer)


def test_a_connection_that_is_used_stays_open(wide: Service) -> None:
    with httpx.Client(base_url=wide.url) as client:
        for _ in range(4):
            assert client.get("/version").status_code == 200
            time.sleep(0.3)
    with wide.connect(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3) as pipelined:
        assert ended(pipelined, 4.0).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
def test_half_closed_clients_are_answered(wide: Service, stream: bool, version: bytes) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": stream}).encode()
    with wide.connect(post_bytes(body).replace(b"HTTP/1.1", version)) as connection:
        connection.shutdown(socket.SHUT_WR)
        found = ended(connection, 20.0)
    assert b"200 OK" in found
    assert (b"[DONE]" if stream else b'"finish_reason":"length"') in found


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_cancels_its_request(service: Service, stream: bool) -> None:
    service.idle()
    before = service.client.stats.generated_tokens
    body = json.dumps(
        {"model": "tiny", "prompt": "a", "max_tokens": 190, "n": 8, "ignore_eos": True, "stream": stream}
    ).encode()
    with service.connect(post_bytes(body)):
        deadline = time.monotonic() + 10
        while service.client.stats.generated_tokens == before and time.monotonic() < deadline:
            time.sleep(0.005)
    service.idle()
    assert 0 < service.client.stats.generated_tokens - before < 8 * 190


def test_more_requests_than_the_limit_get_429_and_are_counted(service: Service) -> None:
    statuses, waits = list[int](), set[str | None]()
    before = service.recorded.count("requests_failed_total", reason="overloaded")

    def ask() -> None:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 150, "ignore_eos": True}
        answer = service.post(body)
        statuses.append(answer.status_code)
        if answer.status_code == 429:
            waits.add(answer.headers.get("retry-after"))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and waits == {"1"}
    counted = service.recorded.count("requests_failed_total", reason="overloaded") - before
    assert counted == statuses.count(429)
    assert service.complete().choices


def test_places_are_counted_in_requests_and_an_n_that_never_fits_is_a_400(parts: Parts) -> None:
    with serving(parts, limits={"max_requests": 4}) as served:
        many = {"prompt": "a", "n": 4, "max_tokens": 60, "ignore_eos": True}
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(served.post(many).status_code)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [200] * 4
        refused = served.post({**many, "n": 5})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


def test_choices_are_counted_by_how_they_ended(parts: Parts) -> None:
    with serving(parts) as served:
        body = {"prompt": "a", "max_tokens": 12, "ignore_eos": True, "seed": 1}
        text = served.post(body).json()["choices"][0]["text"]
        stopped = served.post({**body, "stop": text[1]}).json()["choices"][0]
        assert stopped["finish_reason"] == "stop"
        assert served.post({**body, "prompt": "x" * 99_000}).status_code == 400
        counts = {
            reason: served.recorded.count("requests_finished_total", finished_reason=reason)
            for reason in ("stop", "length", "cancelled", "error")
        }
        assert counts == {"stop": 1, "length": 1, "cancelled": 0, "error": 0}
        assert served.recorded.count("request_latency_seconds") == 2
        assert served.recorded.count("time_to_first_token_seconds") == 2
        assert [value for name, value, _ in served.recorded.values if name == "requests_open"][-1] == 0
        served.idle()


def test_cancelled_streams_leave_an_idle_engine(parts: Parts) -> None:
    with serving(parts, engine={"max_batch": 2}) as served:
        body = json.dumps({"prompt": "a", "max_tokens": 180, "ignore_eos": True, "stream": True}).encode()
        connections = [served.connect(post_bytes(body)) for _ in range(6)]
        for connection in connections[:2]:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        for connection in connections:
            connection.close()
        served.idle()
        assert served.client._engine.cache_usage == 0
        assert served.recorded.count("requests_finished_total", finished_reason="cancelled") >= 2
