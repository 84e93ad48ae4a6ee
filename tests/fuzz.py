"""Random inputs around valid ones, by the thousand: `python -m tests.fuzz bodies 100000`, or configurations, checkpoints, data.

Each case comes from its number alone, so a failure is repeated by that number.
"""

from __future__ import annotations

import asyncio
import copy
import json
import pathlib
import random
import sys
import tempfile
import time
from collections import Counter
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import httpx
from fuzz_values import ODD, damage
from serving_parts import make_parts, served_by

from sparseray.jobs.http.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from sparseray.jobs.http.generation_client import LocalClient
from sparseray.jobs.http.server import create_app

PATHS = {
    COMPLETION: "/v1/completions",
    CHAT: "/v1/chat/completions",
    TOKENIZE: "/tokenize",
    DETOKENIZE: "/detokenize",
}
# An answer may wait behind seven others with 32 choices each, on a machine that does other things too.
SECONDS = 60.0
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "done"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
# Valid values of the fields that decide the most.
VALID: dict[str, list[Any]] = {
    "model": ["tiny"],
    "prompt": ["the dog", [1, 2, 3], ["a", "b"], [[1], [2, 3]], ""],
    "messages": [MESSAGES, MESSAGES[1:2]],
    "tokens": [[1, 2], []],
    "max_tokens": [1, 3, 0],
    "min_tokens": [0, 1],
    "n": [1, 2],
    "temperature": [0, 1, 0.5],
    "stop": ["a", ["b", "\n"]],
    "logprobs": [1, 0, True],
    "tools": [TOOLS],
    "tool_choice": ["required", "none", {"type": "function", "function": {"name": "f"}}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}],
    "guided_json": [SCHEMA, json.dumps(SCHEMA)],
    "guided_regex": ["a+", "[0-9]{2}"],
    "guided_choice": [["x", "y"]],
    "guided_grammar": ['start: "a" start?'],
    "structured_outputs": [{"regex": "a"}, {"choice": ["b"]}],
    "logit_bias": [{"5": 1.5}, {}],
    "allowed_token_ids": [[1, 2, 3]],
    "stop_token_ids": [[4], []],
    "bad_words": [["the"], []],
    "stream_options": [{"include_usage": True, "continuous_usage_stats": True}],
    "chat_template_kwargs": [{"a": 1}],
    "metadata": [{"a": "b"}],
    "user": ["me"],
}


def body_of(number: int, fields: dict[str, Any]) -> tuple[str, bytes]:
    """The endpoint and the body of a case: a valid body with some values changed, as bytes with some damage."""
    rng = random.Random(number)
    endpoint = rng.choices(list(PATHS), [5, 5, 1, 1])[0]
    own = [name for name, field in fields.items() if endpoint in field.on]
    body: dict[str, Any] = {"max_tokens": 2} if endpoint in (COMPLETION, CHAT) else {}
    first = {
        COMPLETION: "prompt",
        CHAT: "messages",
        DETOKENIZE: "tokens",
        TOKENIZE: rng.choice(["prompt", "messages"]),
    }
    body[first[endpoint]] = copy.deepcopy(rng.choice(VALID[first[endpoint]]))
    for name in rng.sample(own, min(len(own), rng.randint(0, 5))):
        field = fields[name]
        values = VALID.get(name) or list(field.neutral or ()) or [field.low, field.high, True, False]
        body[name] = copy.deepcopy(rng.choice(values))
    for _ in range(rng.choice([0, 1, 1, 2])):
        damage(body, rng)
    if rng.random() < 0.05:
        body[rng.choice(["unknown", "temprature", "", "\ud800", "N"])] = rng.choice(ODD)
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = broken(data, rng)
    return endpoint, data


def broken(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut short, doubled, or with some of them changed."""
    kind = rng.random()
    if kind < 0.3:
        return data[: rng.randrange(len(data) + 1)]
    if kind < 0.4:
        return data + data
    if kind < 0.5:
        return b"\xef\xbb\xbf" + data
    if kind < 0.6:
        return b"[" * rng.randint(1, 3000) + data
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def fault(endpoint: str, body: bytes, answer: httpx.Response, seconds: float) -> str | None:
    """What is wrong with an answer: None if nothing is."""
    if seconds > SECONDS:
        return f"took {seconds:.1f} s"
    if answer.status_code >= 500:
        return f"status {answer.status_code}: {answer.text[:200]}"
    if "Traceback" in answer.text:
        return "a traceback"
    if answer.status_code != 200:
        error = answer.json()["error"]
        complete = set(error) == {"message", "type", "param", "code"} and error["message"]
        return (
            None
            if complete and answer.status_code in (400, 404, 413)
            else f"an odd refusal {answer.text[:200]}"
        )
    asked = json.loads(body.decode("utf-8-sig"))
    if asked.get("stream"):
        return None if answer.text.endswith("data: [DONE]\n\n") else "a stream without its end"
    if endpoint in (COMPLETION, CHAT):
        found = answer.json()
        wrong = [c for c in found["choices"] if c["finish_reason"] not in ("stop", "length", "tool_calls")]
        longest = (asked.get("max_completion_tokens") or asked.get("max_tokens") or 640) * len(
            found["choices"]
        )
        if (
            wrong
            or len(found["choices"]) < (asked.get("n") or 1)
            or found["usage"]["completion_tokens"] > longest
        ):
            return f"a wrong answer {answer.text[:200]}"
    return None


async def bodies(count: int, start: int = 0) -> tuple[Counter[int], list[str]]:
    """Send cases to a server in this process.

    Args:
        count: of cases; start: the first one's number.

    Returns:
        How often each status came, and the faults with their numbers.
    """
    parts = make_parts()
    served = served_by(parts, limits={"max_model_len": 96, "max_body_bytes": 200_000})
    numbers = iter(range(start, start + count))
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    with LocalClient(parts.engine(max_model_len=96)) as client:
        app = create_app(client, served)
        transport = httpx.ASGITransport(app=app.asgi, raise_app_exceptions=False)

        async def work(api: httpx.AsyncClient) -> None:
            for number in numbers:
                endpoint, body = body_of(number, dict(served.fields))
                began = time.monotonic()
                headers = {"Content-Type": "application/json"}
                answer = await api.post(PATHS[endpoint], content=body, headers=headers, timeout=120)
                statuses[answer.status_code] += 1
                found = fault(endpoint, body, answer, time.monotonic() - began)
                if found is not None:
                    faults.append(f"case {number}: {found}: {body[:300]!r}")

        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as api:
            await asyncio.gather(*(work(api) for _ in range(8)))
        if client.stats.running or client.stats.waiting:
            faults.append(f"requests are left: {client.stats}")
    return statuses, faults


def configurations(count: int, first: int) -> tuple[Counter[str], list[str]]:
    """Try configurations; counts by what became of them, and what went wrong."""
    from test_config_values import outcome

    ends: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            can_begin, fault = outcome(number, pathlib.Path(folder) / "run.yaml")
            ends["begins" if can_begin else "refused"] += 1
            faults += [f"case {number}: {fault[:300]}"] if fault else []
    return ends, faults


KINDS = ("bodies", "configurations", "checkpoints", "data")


def main(arguments: list[str]) -> int:
    """Run the cases that are asked for; 1 if any failed."""
    if len(arguments) not in (2, 3) or arguments[0] not in KINDS:
        print(f"usage: python -m tests.fuzz {'|'.join(KINDS)} COUNT [FIRST]")
        return 2
    kind, count, start = arguments[0], int(arguments[1]), int(arguments[2]) if len(arguments) == 3 else 0
    found: Counter[Any]
    if kind == "bodies":
        found, faults = asyncio.run(bodies(count, start))
    elif kind == "configurations":
        found, faults = configurations(count, start)
    else:
        from fuzz_files import files

        found, faults = files(kind, pathlib.Path(tempfile.mkdtemp(prefix="fuzz-")), count, start)
    print("\n".join(faults[:50]))
    print(f"{sum(found.values())} {kind}, {len(faults)} faults; by outcome: {dict(sorted(found.items()))}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
