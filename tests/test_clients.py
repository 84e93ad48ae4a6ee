"""Clients that people use, against a server: run where `make clients` has installed them."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_programs import TEXT
from serving_parts import LONGEST, Parts, Service, serving

ROOT = Path(__file__).resolve().parent
PYTHON = Path(os.environ.get("SPARSERAY_CLIENTS", ROOT.parent / ".clients" / "bin" / "python"))
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="`make clients` installs the clients")


@pytest.fixture(scope="module")
def roomy(parts: Parts) -> Iterator[Service]:
    with serving(parts, limits={"max_model_len": LONGEST}) as found:
        yield found


def run(name: str, service: Service, folder: Path) -> dict[str, Any]:
    """What a client's program reports."""
    service.parts.tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    command = [str(PYTHON), str(ROOT / "client_programs.py"), name, service.url, str(folder)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_litellm(roomy: Service, tmp_path: Path) -> None:
    found = run("litellm", roomy, tmp_path)
    expected = {
        "same": True,
        "tokens": 6,
        "echo": "hi",
        "call": True,
        "refused": "ContextWindowExceededError",
    }
    assert found == expected


def test_langchain(roomy: Service, tmp_path: Path) -> None:
    found = run("langchain", roomy, tmp_path)
    assert found == {"same": True, "schema": True, "function": True, "calls": ["go"], "after": True}


def test_lm_eval_finds_the_likelihoods_that_the_server_gives(roomy: Service, tmp_path: Path) -> None:
    found = run("lm_eval", roomy, tmp_path)
    ids = [0, *roomy.parts.tokenizer.encode(TEXT).ids]
    scored = roomy.choice(prompt=ids, max_tokens=0, echo=True, logprobs=0)["logprobs"]["token_logprobs"]
    bits = -sum(scored[1:]) / math.log(2) / len(TEXT.encode())
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    sums = []
    for ending in (" sleeps", " jumps over"):
        whole = roomy.parts.tokenizer.encode("the dog" + ending).ids
        given = len(roomy.parts.tokenizer.encode("the dog").ids)
        values = roomy.choice(prompt=whole, max_tokens=0, echo=True, logprobs=0)["logprobs"]["token_logprobs"]
        sums.append(sum(values[given:]))
    assert found["acc"] == float(sums[0] > sums[1]) and found["generated"]


def test_guidellm(roomy: Service, tmp_path: Path) -> None:
    assert run("guidellm", roomy, tmp_path) == {"successful": 12, "errored": 0}


def test_a_client_generated_from_the_description(roomy: Service, tmp_path: Path) -> None:
    expected = {
        "left out": False,
        "same": True,
        "chat": "assistant",
        "back": True,
        "models": ["tiny"],
        "refused": "invalid_request_error",
    }
    assert run("generated", roomy, tmp_path) == expected
