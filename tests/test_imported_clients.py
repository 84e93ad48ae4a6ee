"""An imported model behind HTTP: the openai client, its own chat template, and lm-eval where `make clients` installed it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from client_programs import TEXT
from hub_models import imported, make, save
from test_clients import PYTHON, ROOT
from tokenizers import Tokenizer

from sparseray.jobs.evaluation.subject import open_subject
from sparseray.jobs.http.generation_client import LocalClient
from sparseray.jobs.http.server import HttpServer, create_app
from sparseray.jobs.http.serving_model import read_served
from sparseray.platform.config import ClusterConfig, ServeConfig
from sparseray.platform.opening import open_serving

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


@dataclass
class Served:
    """Theirs, ours as a checkpoint, and a client of the server over it."""

    model: Any
    checkpoint: Path
    url: str
    api: openai.OpenAI

    def likelihood(self, text: str, given: int = 0) -> float:
        """Log-likelihood by transformers of what follows the first `given` tokens, or the end of a document."""
        ids = torch.tensor(
            [[270, *Tokenizer.from_file(str(self.checkpoint / "tokenizer.json")).encode(text).ids]]
        )
        ids = ids if given == 0 else ids[:, 1:]
        with torch.no_grad():
            logp = torch.log_softmax(self.model(ids).logits.double(), -1)
        found = logp[0, :-1].gather(-1, ids[0, 1:, None])
        return float(found[max(0, given - 1) :].sum())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root, model = tmp_path_factory.mktemp("imported"), make("v3")
    theirs = save(model, root / "theirs")
    (theirs / "chat_template.jinja").write_text(TEMPLATE)
    ckpt = imported(theirs, root / "checkpoint")
    config = open_serving(ckpt, ServeConfig(), ClusterConfig(device="cpu"))
    with LocalClient(open_subject(ckpt, 0).engine) as client:
        app = create_app(client, read_served(ckpt, config, ("tiny",)))
        with HttpServer(app, drain_s=0.2) as server:
            api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)
            yield Served(model, ckpt, server.url, api)


def test_the_openai_client_gets_the_likelihoods_of_transformers(served: Served) -> None:
    whole, given = "the dog jumps over", len("the dog")
    answer = served.api.completions.create(model="tiny", prompt=whole, max_tokens=0, echo=True, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    found = sum(one for one in logprobs.token_logprobs[given:] if one is not None)
    assert found == pytest.approx(served.likelihood(whole, given), abs=1e-3)


def test_a_chat_is_asked_by_the_models_own_template_and_forges_no_turn(served: Served) -> None:
    def ids(text: str) -> list[int]:
        url = f"{served.api.base_url}completions"
        body = {"prompt": text, "max_tokens": 0, "echo": True, "return_token_ids": True}
        answer = served.api.post(url, cast_to=object, body=body)
        return answer["choices"][0]["prompt_token_ids"]  # type: ignore[index,no-any-return]

    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a <|endoftext|> b"},
    ]
    chat = served.api.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0.0)
    written = "<|system|>be brief\n<|user|>a <|endoftext|> b\n"
    assert chat.usage is not None and chat.usage.prompt_tokens == len(ids(written))
    assert 270 not in ids(written), "text that spells the end of a document stays text"
    plain = served.api.completions.create(model="tiny", prompt=written, max_tokens=4, temperature=0.0)
    assert chat.choices[0].message.content == plain.choices[0].text


@pytest.mark.skipif(not PYTHON.exists(), reason="`make clients` installs the clients")
def test_lm_eval_measures_an_imported_model_as_transformers_does(served: Served, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(served.checkpoint / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )
    command = [str(PYTHON), str(ROOT / "client_programs.py"), "lm_eval", served.url, str(tmp_path)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    bits = -served.likelihood(TEXT) / math.log(2) / len(TEXT.encode())
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    endings = [served.likelihood("the dog" + one, len("the dog")) for one in (" sleeps", " jumps over")]
    assert found["acc"] == float(endings[0] > endings[1]) and found["generated"]
