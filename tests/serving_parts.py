"""A tiny served model, and a server over it: what the tests of serving share."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.grammar import Grammars
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.paged_model import Chunk
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.state.dense_slab import computes_in_fp32
from sparseray.actors.state.staged_memory import StagedMemory
from sparseray.jobs.http.access import AccessRules
from sparseray.jobs.http.chat import ChatTemplate
from sparseray.jobs.http.fields import table
from sparseray.jobs.http.generation_client import GenerationClient, LocalClient
from sparseray.jobs.http.limits import ApiLimits
from sparseray.jobs.http.openai_bodies import ServedModel
from sparseray.jobs.http.server import App, HttpServer, create_app
from sparseray.jobs.http.text_stream import Vocabulary
from sparseray.kernels.compiled_ops import COMPILED
from sparseray.kernels.ops import Ops, ops_for
from sparseray.model.config import DSEConfig, ModelConfig
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

TEXT = "the quick brown fox jumps over the lazy dog; the dog sleeps. déjà vu, naïve café, 東京 und Köln. " * 8
MAX_MODEL_LEN = 192
LONGEST = 640


def make_tokenizer(specials: tuple[str, ...] = ("<|endoftext|>",)) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@dataclass
class Parts:
    tokenizer: Tokenizer
    model: Transformer
    experts: LocalExperts
    memory: LocalMemory
    grammars: Grammars

    def engine(self, **options: Any) -> Engine:
        options = {"max_batch": 8, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 16, **options}
        return PagedEngine(self.model, self.experts, self.memory, grammars=self.grammars, **options)

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size


def make_parts(ops: Ops = COMPILED, **changes: Any) -> Parts:
    """Its parts; changes are of the model."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden=64,
        num_layers=2,
        num_heads=4,
        ffn_dim=96,
        attention=("full", "nsa"),
        max_seq_len=LONGEST,
        init_std=0.1,
        dse=DSEConfig(layers=(1,), rows_per_head=512, num_buckets=4, document_end_id=0),
    )
    config = replace(config, **changes)
    layout = DSELayout.build(config.dse, tokenizer, vocab_size=config.vocab_size)
    model = Transformer(config, layout, seed=3, ops=ops).eval()
    grammars = Grammars(tokenizer.to_str(), vocab_size=config.vocab_size, eos_id=0)
    memory = LocalMemory(config, layout, seed=3)
    return Parts(tokenizer, model, LocalExperts(config, seed=3), memory, grammars)


def cached_logits(engine: PagedEngine, tokens: Sequence[int], first: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one request, in chunks that end at `first`, then token by token."""
    count, known, rows = len(tokens), list(tokens), []
    lease = engine.pool.acquire(known, count)
    assert isinstance(lease, Lease)
    engine.paged.begin(lease)
    if engine.pool.recent is not None:
        engine.pool.extend(lease, count)
        engine.paged.place_recent(engine.pool.recent.take_moved())
    for start, stop in pairwise([0, *first, *range(first[-1] + 1, count + 1)]):
        chunk = Chunk(lease=lease, known=known, count=stop - start)
        if stop - start > 1:
            (hidden,) = engine.paged.prefill([chunk], engine.experts, engine.memory)
            rows.append(engine.model.logits(hidden))
        else:
            rows.append(engine.paged.decode([chunk], engine.experts, engine.memory).clone())
            if engine.paged.device.type == "cuda":
                # Its inputs are copied from two places in turn; an engine, too, waits for the step before the last.
                torch.cuda.synchronize()
        lease.length = stop
    return torch.cat(rows)


def weights_on(
    parts: Parts, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Transformer, LocalExperts]:
    """A model's parts on a device, with what computes there."""
    ops, config = ops_for("auto", device), parts.model.config
    model = Transformer(config, parts.model.layout, ops=ops).eval()
    experts = LocalExperts(config, ops=ops)
    model.load_state_dict(parts.model.state_dict())
    experts.load_state_dict(parts.experts.state_dict())
    for module in (model, experts):
        for name, parameter in module.named_parameters():
            if not computes_in_fp32(name):
                parameter.data = parameter.data.to(dtype)
    return model.to(device), experts.to(device)


def on_device(parts: Parts, device: torch.device) -> OnDeviceExchange:
    """The tables of a model's parts in host memory, as a slot with a device asks for their rows."""
    config, layout = parts.model.config, parts.model.layout
    assert layout is not None
    memory = StagedMemory(
        config, [layout.num_rows(layer) for layer in config.dse.layers], seed=3, num_parts=1, betas=(0.9, 0.95), eps=1e-8,
        device=device, ops=ops_for("auto", device), determinism="bitwise",
    )  # fmt: skip
    keys = [
        (layer, bucket) for layer in range(len(config.dse.layers)) for bucket in range(config.dse.num_buckets)
    ]
    memory.initialize(keys)
    memory.assign(keys, keys)
    holder: Any = SimpleNamespace(device=device, dtype=torch.float32, config=config)
    return OnDeviceExchange(holder, holder, memory, holder)


def request_of(name: str, prompt: tuple[int, ...], **options: Any) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_tokens=prompt, **{"max_tokens": 12, **options})


def finish(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def run(engine: Any, asked: Sequence[GenerationRequest]) -> dict[str, list[TokenEvent]]:
    """The events of requests that are added together."""
    for request in asked:
        engine.add(request)
    return finish(engine)


def run_failing(engine: Any, asked: Sequence[GenerationRequest]) -> dict[str, list[TokenEvent]]:
    """The same where an expert shard is lost three times in the middle of steps."""
    experts, calls, failed = engine.experts, 0, 0

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (9, 31, 60):
            raise ConnectionError("an expert shard is lost")
        found: torch.Tensor = experts(*arguments)
        return found

    engine.experts = failing
    for request in asked:
        engine.add(request)
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        try:
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
        except ConnectionError:
            failed += 1
    assert failed == 3
    return events


def moved_after(
    cut: int, asked: Sequence[GenerationRequest], expected: dict[str, list[TokenEvent]]
) -> list[GenerationRequest]:
    """Those requests that get more than `cut` tokens, as another engine is asked to go on with them."""
    told = {r.request_id: tokens_of(expected[r.request_id]) for r in asked}
    return [
        replace(r, resume_tokens=tuple(told[r.request_id][:cut]))
        for r in asked
        if len(told[r.request_id]) > cut and r.prompt_logprobs is None
    ]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def alone(parts: Parts, request: GenerationRequest) -> list[TokenEvent]:
    engine = parts.engine()
    engine.add(request)
    return finish(engine)[request.request_id]


def served_by(parts: Parts | None = None, **options: Any) -> ServedModel:
    """A served model; options are those of `ServedModel`, and `limits` those of `ApiLimits`."""
    tokenizer = parts.tokenizer if parts is not None else make_tokenizer()
    limits = ApiLimits(**{"max_model_len": MAX_MODEL_LEN, "vocab_size": 320, **options.pop("limits", {})})
    defaults: dict[str, Any] = {
        "names": ("tiny",),
        "vocabulary": Vocabulary(tokenizer, 0),
        "template": ChatTemplate(),
        "grammars": parts.grammars if parts is not None else None,
        "limits": limits,
        "fields": table(limits),
    }
    return ServedModel(**{**defaults, **options})


@dataclass
class Recorded:
    """Takes request metrics, as the server's `Metrics` does."""

    values: list[tuple[str, float, dict[str, str]]] = field(default_factory=list)

    def __call__(self, name: str, value: float, times: int = 1, /, **labels: str) -> None:
        self.values += [(name, value, labels)] * times

    def count(self, name: str, **labels: str) -> int:
        return sum(1 for found, _, with_labels in self.values if (found, with_labels) == (name, labels))


@dataclass
class Service:
    """A server under test."""

    server: HttpServer
    client: LocalClient
    parts: Parts
    recorded: Recorded
    api: openai.OpenAI

    @property
    def url(self) -> str:
        return self.server.url

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(self.url + path, content=data, headers=headers, timeout=30, **options)

    def choice(self, path: str = "/v1/completions", **fields: Any) -> Any:
        """The first choice of an answer, as JSON."""
        answer = self.post({"model": "tiny", "prompt": "the dog", "max_tokens": 8, **fields}, path)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def complete(self, *, ignore_eos: bool = False, **fields: Any) -> Any:
        defaults = {"model": "tiny", "prompt": "the dog", "max_tokens": 8}
        extra = {"ignore_eos": ignore_eos, **fields.pop("extra_body", {})}
        return self.api.completions.create(**{**defaults, **fields}, extra_body=extra)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A plain connection on which something was sent."""
        connection = socket.create_connection(("127.0.0.1", self.server.port), timeout=20)
        connection.sendall(sent)
        return connection

    def idle(self) -> None:
        deadline = time.monotonic() + 10
        while self.client.stats.running or self.client.stats.waiting:
            assert time.monotonic() < deadline, "requests are still computed"
            time.sleep(0.01)


def post_bytes(body: bytes, path: str = "/v1/completions", head: str = "") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}"
    return f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def serving(
    parts: Parts, *, rules: AccessRules | None = None, drain_s: float = 0.2, **options: Any
) -> Iterator[Service]:
    """Serve an engine of its own; options are those of `served_by`, and `engine`'s."""
    longest = options.get("limits", {}).get("max_model_len", MAX_MODEL_LEN)
    recorded, engine = Recorded(), parts.engine(max_model_len=longest, **options.pop("engine", {}))
    with LocalClient(engine) as client:
        app = create_app(
            client,
            served_by(parts, **options),
            rules=rules,
            record=recorded,
            metrics=lambda: b"sparseray_requests_running 0\n",
        )
        with HttpServer(app, drain_s=drain_s) as server:
            api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)
            yield Service(server, client, parts, recorded, api)


def app_of(client: GenerationClient, **options: Any) -> App:
    return create_app(client, served_by(**options))


def read_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ends as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
