"""Who may ask, by which name and address, and what a server tells of itself."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import socket
import ssl
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from processes import wait_until
from serving_parts import MAX_MODEL_LEN, Parts, Service, app_of, read_events, serving

from sparseray.errors import ConfigError
from sparseray.jobs.http.access import AccessRules
from sparseray.jobs.http.generation_client import LocalClient
from sparseray.jobs.http.options import HttpOptions, add_options, read_options
from sparseray.jobs.http.server import HttpServer

BODY = {"prompt": "a", "max_tokens": 1}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def closed(parts: Parts) -> Iterator[Service]:
    """A server with keys, an allowed origin, a root path and two names."""
    rules = AccessRules(
        api_keys=("first", "second"), cors_origins=("https://chat.example",), root_path="/llm"
    )
    with serving(parts, rules=rules, names=("tiny", "small")) as found:
        yield found


def test_requests_need_one_of_the_keys(closed: Service) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer third"},
        {"Authorization": "Basic first"},
        {"Authorization": "first"},
    ):
        answer = closed.post(BODY, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(closed.url + "/v1/models", headers=headers).status_code == 401
        assert httpx.get(closed.url + "/llm/v1/models", headers=headers).status_code == 401
    for key in ("first", "second"):
        assert closed.post(BODY, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/health", "/ready", "/ping", "/metrics", "/llm/health"):
        assert httpx.get(closed.url + path).status_code == 200
    with openai.OpenAI(base_url=f"{closed.url}/llm/v1", api_key="first", max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["tiny", "small"]
    with (
        openai.OpenAI(base_url=f"{closed.url}/v1", api_key="x", max_retries=0) as api,
        pytest.raises(openai.AuthenticationError),
    ):
        api.models.list()


def test_every_name_is_served_and_answers_to_it(closed: Service) -> None:
    headers = {"Authorization": "Bearer first"}
    for name in ("tiny", "small"):
        assert closed.post({**BODY, "model": name}, headers=headers).json()["model"] == name
        card = httpx.get(f"{closed.url}/v1/models/{name}", headers=headers).json()
        assert (card["id"], card["root"]) == (name, "tiny")
    missing = closed.post({**BODY, "model": "large"}, headers=headers)
    assert missing.status_code == 404 and "'tiny' and 'small'" in missing.json()["error"]["message"]
    assert closed.post(BODY, headers=headers).json()["model"] == "tiny"


def test_pages_of_an_allowed_origin_may_ask_and_read(closed: Service) -> None:
    origin = {"Origin": "https://chat.example"}
    asked = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    before = httpx.options(closed.url + "/v1/completions", headers=asked)
    assert before.status_code == 200 and before.headers["access-control-allow-origin"] == origin["Origin"]
    answer = closed.post(BODY, headers={**origin, "Authorization": "Bearer first"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin["Origin"]
    refused = closed.post(BODY, headers=origin)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin["Origin"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "text/plain"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://evil.example", "Content-Type": "text/plain"}, 403),
        # A name that its owner points at this machine: what the page sends is of its own origin.
        ({"Origin": "http://evil.example:PORT", "Host": "evil.example:PORT"}, 403),
        ({"Host": "evil.example", "Content-Type": "text/plain"}, 403),
        ({"Host": "[::", "Content-Type": "text/plain"}, 403),
        # A proxy on this machine that keeps the outer name.
        ({"Host": "llm.example"}, 200),
        ({"Host": "localhost:PORT", "Content-Type": "text/plain"}, 200),
        ({"Host": "[::1]:PORT", "Content-Type": "text/plain"}, 200),
        ({"Origin": "http://127.0.0.1:PORT"}, 200),
        ({"Origin": "http://127.0.0.1:1"}, 403),
    ],
)
def test_other_sites_pages_may_not_make_a_browser_ask(
    service: Service, headers: dict[str, str], status: int
) -> None:
    sent = {name: value.replace("PORT", str(service.server.port)) for name, value in headers.items()}
    for path in ("/v1/completions", "/tokenize"):
        body = BODY if path != "/tokenize" else {"prompt": "a"}
        assert service.post(body, path, headers=sent).status_code == status


def test_a_server_that_others_reach_may_have_any_name() -> None:
    rules = AccessRules(host="0.0.0.0")
    assert rules.is_own_host("llm.example:80") and rules.allows_origin("http://llm.example", "llm.example")
    assert not rules.allows_origin("http://evil.example", "llm.example")
    assert AccessRules(cors_origins=("*",)).allows_origin("http://any.example", "x")


def test_request_ids_are_taken_returned_and_logged(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("sparseray").propagate = True
    with caplog.at_level(logging.INFO, "sparseray"):
        answer = service.post(BODY, headers={"X-Request-Id": "mine-7"})
        # The line comes once the answer is out.
        wait_until(lambda: "request mine-7" in caplog.text, "the line of log", 10.0)
    logging.getLogger("sparseray").propagate = False
    assert answer.headers["x-request-id"] == "mine-7" and answer.json()["id"] == "cmpl-mine-7"
    assert "POST /v1/completions: 200" in caplog.text and "request mine-7" in caplog.text
    stream = service.post({**BODY, "stream": True}, headers={"X-Request-Id": "mine-7"})
    assert stream.headers["x-request-id"] == "mine-7" and read_events(stream.text)[0]["id"] == "cmpl-mine-7"
    for odd in ("a" * 129, "a b", "é"):
        found = service.post(BODY, headers={"X-Request-Id": odd.encode()}).headers["x-request-id"]
        assert found != odd and len(found) == 32
    ids = {service.post({"prompt": 5}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_what_a_server_tells_of_itself(service: Service) -> None:
    get = {path: httpx.get(service.url + path) for path in ("/version", "/ping", "/load", "/tokenizer_info")}
    assert all(answer.status_code == 200 for answer in get.values())
    assert get["/version"].json()["version"].count(".") == 2
    assert get["/load"].json() == {"server_load": 0}
    assert get["/tokenizer_info"].json()["eos_token"] == "<|endoftext|>"
    assert httpx.post(service.url + "/ping").status_code == 200


def test_texts_become_ids_and_ids_texts(service: Service) -> None:
    found = service.post({"prompt": "déjà vu", "return_token_strs": True}, "/tokenize").json()
    assert found["tokens"] == service.parts.tokenizer.encode("déjà vu").ids
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), MAX_MODEL_LEN)
    assert len(found["token_strs"]) == found["count"]
    assert service.post({"tokens": found["tokens"]}, "/detokenize").json() == {"prompt": "déjà vu"}
    messages = [{"role": "user", "content": "hi"}]
    chat = service.post({"messages": messages, "max_tokens": 1}, CHAT).json()["usage"]["prompt_tokens"]
    assert service.post({"messages": messages}, "/tokenize").json()["count"] == chat
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": [1]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
        ("/tokenize", {"prompt": "a", "messages": messages}),
        ("/tokenize", {"prompt": "a", "x": 1}),
    ):
        assert service.post(body, path).status_code == 400
    assert service.post({"prompt": "", "model": "tiny"}, "/tokenize").json()["count"] == 0


def test_health_is_the_engines(parts: Parts) -> None:
    client = LocalClient(parts.engine())
    with HttpServer(app_of(client)) as server:
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        client.close()
        down = httpx.get(server.url + "/health")
        assert (down.status_code, down.json()) == (
            503,
            {"status": "down", "reason": "the engine has stopped"},
        )


def validator(description: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    ("path", "request_schema", "answer_schema", "body"),
    [
        ("/v1/completions", "CompletionRequest", "Completion", {"prompt": "a", "logprobs": 1, "echo": True}),
        (
            "/v1/completions",
            "CompletionRequest",
            "Completion",
            {"prompt": [1, 2], "return_token_ids": True, "n": 2},
        ),
        (
            "/v1/completions",
            "CompletionRequest",
            "Completion",
            {"prompt": "a", "prompt_logprobs": 1, "stop": "e"},
        ),
        (
            CHAT,
            "ChatRequest",
            "ChatCompletion",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        ),
        (
            CHAT,
            "ChatRequest",
            "ChatCompletion",
            {
                "messages": [{"role": "user", "content": "a"}],
                "logprobs": True,
                "prompt_logprobs": 0,
                "max_tokens": 2,
            },
        ),
        ("/tokenize", "TokenizeRequest", "Tokens", {"prompt": "a"}),
        ("/detokenize", "DetokenizeRequest", "Text", {"tokens": [1]}),
    ],
)
def test_the_description_is_true_of_requests_and_answers(
    service: Service, path: str, request_schema: str, answer_schema: str, body: dict[str, Any]
) -> None:
    description = httpx.get(service.url + "/openapi.json").json()
    validator(description, request_schema).validate(body)
    answer = service.post(body, path)
    assert answer.status_code == 200, answer.text
    validator(description, answer_schema).validate(answer.json())
    assert not validator(description, request_schema).is_valid({**body, "unknown": 1})
    validator(description, "Error").validate(service.post({**body, "unknown": 1}, path).json())


def test_the_description_is_true_of_what_is_asked_by_get(service: Service) -> None:
    description = httpx.get(service.url + "/openapi.json").json()
    jsonschema.Draft202012Validator.check_schema(description["components"]["schemas"])
    for path, methods in description["paths"].items():
        get = methods.get("get")
        if get is None:
            continue
        answer = httpx.get(service.url + path.replace("{model}", "tiny"))
        assert answer.status_code == 200
        schema = get["responses"]["200"].get("content", {}).get("application/json", {}).get("schema")
        if schema is not None:
            validator(description, schema["$ref"].rsplit("/", 1)[1]).validate(answer.json())
    assert httpx.post(service.url + "/openapi.json").status_code == 405


def test_an_ipv6_address_is_served_and_printed_in_brackets(parts: Parts) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with LocalClient(parts.engine()) as client, HttpServer(app_of(client), host="::1") as server:
        assert server.url == f"http://[::1]:{server.port}" and server.port > 0
        assert httpx.get(server.url + "/health").status_code == 200
        answer = httpx.post(
            server.url + "/v1/completions", content=json.dumps(BODY), headers={"Content-Type": "text/plain"}
        )
        assert answer.status_code == 200


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine's loopback address, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return paths


def test_tls_is_served_and_unusable_files_are_told(parts: Parts, tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    with LocalClient(parts.engine()) as client:
        with HttpServer(app_of(client), certificate=chain, key=key) as server:
            trusted = ssl.create_default_context(cafile=str(chain))
            assert server.url.startswith("https://")
            answer = httpx.post(server.url + "/v1/completions", json=BODY, verify=trusted)
            assert answer.status_code == 200
            body = {**BODY, "stream": True}
            assert read_events(httpx.post(server.url + "/v1/completions", json=body, verify=trusted).text)
        for wrong in ((key, key), (chain, None), (tmp_path / "none", None)):
            with pytest.raises(ConfigError, match="cannot use the TLS certificate"):
                HttpServer(app_of(client), certificate=wrong[0], key=wrong[1])


def options_of(*arguments: str) -> HttpOptions:
    parser = ArgumentParser()
    add_options(parser)
    return read_options(parser.parse_args(arguments), "127.0.0.1")


def test_options_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("one\n\n two \n")
    monkeypatch.setenv("SPARSERAY_API_KEY", "three")
    made = options_of(
        "--api_key_file", str(tmp_path / "keys"), "--model_name", "a", "b", "a", "--root_path", "/llm/"
    )
    assert set(made.rules.api_keys) == {"one", "two", "three"}
    assert (made.model_names, made.rules.root_path) == (("a", "b"), "/llm")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tls_key", "x"),
        ("--tls_certificate", "/nowhere.pem"),
        ("--root_path", "llm"),
        ("--root_path", "/a b"),
        ("--cors_origins", "chat.example"),
        ("--cors_origins", "https://chat.example/page"),
        ("--api_key_file", "/nowhere"),
        ("--api_key_file", "/dev/null"),
        ("--api_key", "a key"),
        ("--api_key", "schlüssel"),
        ("--model_name", ""),
    ],
)
def test_options_that_cannot_be_used_are_told(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=arguments[0] if arguments[0] != "--api_key" else "API key"):
        options_of(*arguments)
