"""What goes wrong with one request stays with it: bad input, clients that leave, a full server, a broken engine."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from local_server import MAX_LEN, MAX_OPEN, LocalClient, Net, serving, text_tokenizer, wait_for

from sparseray.actors.generation import GenerationRequest
from sparseray.actors.messages import Message
from sparseray.actors.slot import Slot
from sparseray.errors import SlotLostError
from sparseray.jobs.serve import RemoteClient
from sparseray.platform.config import ClusterConfig
from sparseray.platform.metrics import Metrics

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "rain"}


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(text_tokenizer())


@pytest.fixture(scope="module")
def local(net: Net) -> Iterator[LocalClient]:
    client = LocalClient(net.engine())
    yield client
    client.close()


@pytest.fixture(scope="module")
def http(local: LocalClient) -> Iterator[httpx.Client]:
    with serving(local, text_tokenizer()) as url, httpx.Client(base_url=url, timeout=20.0) as client:
        yield client


@pytest.fixture(autouse=True)
def the_server_goes_on(http: httpx.Client, local: LocalClient) -> Iterator[None]:
    """After each test every place is free again: as many choices as the server allows are served at once."""
    yield
    wait_for(lambda: local.num_open == 0)
    wait_for(lambda: ask(http, n=MAX_OPEN).status_code == 200)


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post(COMPLETIONS, json={"prompt": "rain", "max_tokens": 1} | body)


def check_error(answer: httpx.Response, status: int, *, word: str = "") -> dict[str, Any]:
    """See that an answer is an OpenAI error object with a message that says something."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["message"] and word in error["message"]
    return error


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"{'prompt': 1}", b"[" * 100_000, b'{"seed": 1' + b"0" * 5000 + b"}"],
    ids=["empty", "open", "list", "null", "text", "bytes", "quotes", "deep", "digits"],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(http: httpx.Client, path: str, body: bytes) -> None:
    check_error(http.post(path, content=body), 400)


BAD_SHARED = [
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "8"), ("max_tokens", True),
    ("max_tokens", 1 << 40), ("temperature", -0.1), ("temperature", "hot"), ("temperature", float("nan")),
    ("temperature", float("inf")), ("top_p", 0), ("top_p", 1.01), ("n", 0), ("n", 1000), ("n", "2"),
    ("seed", 1 << 63), ("seed", 0.5), ("stop", 3), ("stop", [""]), ("stop", ["a"] * 5), ("stop", [1]),
    ("stop", "x" * 5000), ("stream", "yes"), ("stream_options", 3), ("stream_options", {"include_usage": 1}),
    ("logprobs", "3"), ("logprobs", -1), ("ignore_eos", 1),
]  # fmt: skip
BAD_PROMPTS: list[Any] = [
    None, 3, True, "", [], [[]], [""], {"a": 1}, [1, "a"], [[1], "a", None], [1.5], [True], [[1, [2]]],
    [-1], [300], [1 << 70], ["ok", [9999]], ["rain"] * 200, "\ud800", ["rain\udfff"],
]  # fmt: skip
BAD_MESSAGES: list[Any] = [
    None, [], "hello", [3], [{}], [{"role": "user"}], [{"role": 1, "content": "a"}], [USER | {"content": 3}],
    [USER | {"content": None}], [USER | {"content": [{"type": "image_url", "image_url": "x"}]}],
    [USER | {"content": ["a"]}], [USER | {"content": [{"type": "text"}]}], [USER | {"role": "\ud800"}],
]  # fmt: skip


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()  # httpx itself refuses NaN and lone surrogates


def test_every_bad_value_is_a_400_that_names_it(http: httpx.Client) -> None:
    for name, value in BAD_SHARED:
        body = {"prompt": "rain", "messages": [USER], name: value}
        for path in (COMPLETIONS, CHAT):
            error = check_error(http.post(path, content=dumps(body)), 400)
            assert name.startswith(str(error["param"])) or error["param"] == "include_usage", (name, error)
    for prompt in BAD_PROMPTS:
        assert (
            check_error(http.post(COMPLETIONS, content=dumps({"prompt": prompt})), 400)["param"] == "prompt"
        )
    for messages in BAD_MESSAGES:
        error = check_error(http.post(CHAT, content=dumps({"messages": messages})), 400)
        assert error["param"] == "messages"
    for extra in ({"logprobs": 21}, {"logprobs": True}, {"echo": 1}):
        check_error(http.post(COMPLETIONS, json={"prompt": "rain"} | extra), 400)
    for extra in ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": 2}):
        check_error(http.post(CHAT, json={"messages": [USER]} | extra), 400)


def test_a_request_that_exceeds_the_context_is_refused_and_one_that_fills_it_served(
    http: httpx.Client,
) -> None:
    error = check_error(ask(http, prompt=[5] * MAX_LEN), 400, word=str(MAX_LEN))
    assert error["code"] == "context_length_exceeded"
    check_error(ask(http, prompt=[5] * (MAX_LEN - 3), max_tokens=4), 400, word="shorten")
    check_error(ask(http, prompt=[5] * (MAX_LEN + 1), max_tokens=0, echo=True), 400)
    full = ask(http, prompt=[5] * (MAX_LEN - 3), max_tokens=3, ignore_eos=True).json()
    assert full["usage"]["total_tokens"] == MAX_LEN
    room = ask(http, prompt=[5] * (MAX_LEN - 3), max_tokens=None, ignore_eos=True).json()
    assert room["usage"]["completion_tokens"] == 3, "the default number of tokens takes what room there is"
    assert ask(http, prompt=[5] * MAX_LEN, max_tokens=0, echo=True).status_code == 200


def test_unknown_models_paths_and_methods(http: httpx.Client) -> None:
    assert check_error(ask(http, model="gpt-9"), 404, word="gpt-9")["code"] == "model_not_found"
    check_error(ask(http, model="\x00"), 404)
    check_error(http.get("/v1/nothing"), 404, word="/v1/nothing")
    check_error(http.get(COMPLETIONS), 405)
    check_error(http.post("/v1/models", json={}), 405)


def test_the_openai_client_raises_its_own_exceptions(http: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as ai:
        with pytest.raises(openai.BadRequestError, match="context length") as caught:
            ai.completions.create(model="tiny", prompt=[5] * MAX_LEN)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError, match="gpt-9"):
            ai.completions.create(model="gpt-9", prompt="rain")


def test_a_body_of_megabytes_is_refused(http: httpx.Client) -> None:
    check_error(http.post(COMPLETIONS, content=b'{"prompt": "' + b"x" * (5 << 20) + b'"}'), 413)


def test_a_full_server_says_429_until_a_place_is_free(http: httpx.Client, local: LocalClient) -> None:
    with ThreadPoolExecutor(1) as pool, local.held(until_open=MAX_OPEN):
        filling = pool.submit(ask, http, n=MAX_OPEN, max_tokens=4)
        wait_for(lambda: local.num_open == MAX_OPEN)
        error = check_error(ask(http), 429)
        assert error["code"] == "too_many_requests"
        check_error(ask(http, stream=True), 429)
        assert http.get("/health").status_code == 200
    assert filling.result().status_code == 200
    assert ask(http).status_code == 200


def send_and_leave(http: httpx.Client, *, stream: bool, read: bool) -> None:
    """Ask for a long answer over a raw socket and close it without reading to the end."""
    body = dumps({"prompt": "rain", "max_tokens": 190, "ignore_eos": True, "stream": stream, "n": 2})
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((http.base_url.host, http.base_url.port)) as raw:
        raw.sendall(head + body)
        if read:
            raw.recv(300)


@pytest.mark.parametrize(("stream", "read"), [(True, True), (True, False), (False, False)])
def test_clients_that_leave_free_the_batch_and_their_places(
    http: httpx.Client, local: LocalClient, stream: bool, read: bool
) -> None:
    steps = local.engine.steps
    for _ in range(MAX_OPEN):
        wait_for(lambda: local.num_open < MAX_OPEN // 2)
        send_and_leave(http, stream=stream, read=read)
    wait_for(lambda: local.num_open == 0)
    assert local.engine.steps - steps < 190 * MAX_OPEN // 2, "the answers were generated for nobody"


def test_a_client_that_leaves_in_the_middle_costs_the_others_nothing(
    http: httpx.Client, local: LocalClient
) -> None:
    expected = ask(http, max_tokens=30, seed=1).json()["choices"]
    with http.stream(
        "POST", COMPLETIONS, json={"prompt": "stone", "max_tokens": 190, "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(ask, http, max_tokens=30, seed=1)
            next(lines)
            answer.close()
            assert other.result().json()["choices"] == expected


def test_an_engine_failure_is_a_500_and_the_next_request_is_served(http: httpx.Client, net: Net) -> None:
    expected = ask(http, seed=1, max_tokens=5).json()["choices"]
    net.experts.is_broken = True
    check_error(ask(http, n=3), 500, word="expert shard 1 is gone")
    assert ask(http, seed=1, max_tokens=5).json()["choices"] == expected


def test_an_engine_failure_in_a_stream_is_an_error_event(
    http: httpx.Client, net: Net, local: LocalClient
) -> None:
    body = {"prompt": "rain", "max_tokens": 190, "stream": True, "ignore_eos": True}
    with http.stream("POST", COMPLETIONS, json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert "choices" in json.loads(next(lines).removeprefix("data: "))
        net.experts.is_broken = True
        last = list(lines)[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "expert shard 1 is gone" in error["message"]
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as ai:
        net.experts.is_broken = True
        with pytest.raises(openai.APIError, match="expert shard 1 is gone"):
            list(ai.completions.create(model="tiny", prompt="rain", stream=True))


class ScriptedMailbox:
    """A slot's mailbox that hands out what the test wrote, None for a moment without a message."""

    slot = 0

    def __init__(self, script: list[Message | None]) -> None:
        self.script, self.posted = script, []

    def next(self, _timeout_s: float) -> Message | None:
        return self.script.pop(0)

    def post(self, _to: int, kind: str, **message: Any) -> int:
        self.posted.append((kind, message["body"]))
        return 0


def message(kind: str, body: dict[str, Any] | None = None) -> Message:
    return Message(kind=kind, source=-1, generation=0, sequence=1, body=body or {})


def test_a_slot_forgets_the_requests_of_a_failed_step_and_serves_the_next(net: Net) -> None:
    lost, served = (
        GenerationRequest(request_id=name, prompt=(5, 6, 7), max_tokens=1, temperature=0.0)
        for name in ("lost", "served")
    )
    script = [message("generate", lost.to_dict()), None, message("generate", served.to_dict()), None]
    mailbox = ScriptedMailbox([*script, message("stop")])
    slot = Slot(mailbox, lambda _: None)  # type: ignore[arg-type,return-value]
    slot.engine, net.experts.is_broken = net.engine(), True
    slot.serve_forever()
    (failed, body), (tokens, found) = mailbox.posted
    assert failed == "failed" and "expert shard 1 is gone" in body["error"]
    assert tokens == "tokens" and [event["request_id"] for event in found["events"]] == ["served"]


def test_a_request_waits_while_its_worker_is_heard_and_is_given_up_when_it_falls_silent() -> None:
    async def ask_it() -> float:
        client = RemoteClient("test", ClusterConfig(deadline_s=0.2, transport="tcp"), Metrics({}))
        client._open, client._outbox.post = {0: set()}, lambda *_args, **_options: 0  # type: ignore[assignment,method-assign]
        started = time.monotonic()
        # As if tokens of other requests came for another half a second.
        client._heard_s[0] = started + 0.5
        try:
            request = GenerationRequest(request_id="a", prompt=(1,), max_tokens=1)
            with pytest.raises(SlotLostError, match="slot 0 sent nothing"):
                await anext(client.generate(request))
        finally:
            client.close()
        assert client._open == {0: set()}
        return time.monotonic() - started

    assert 0.7 <= asyncio.run(ask_it()) < 3.0
