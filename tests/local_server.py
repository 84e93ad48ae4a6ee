"""The HTTP server in a thread on a free loopback port, over clients that need no cluster."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import uvicorn
from local_cluster import MODEL
from starlette.applications import Starlette
from tokenizers import Tokenizer
from torch import Tensor

from sparseray.actors.engine import Engine
from sparseray.actors.generation import GenerationRequest, TokenEvent
from sparseray.jobs.http_server import GenerationClient, build_app
from sparseray.jobs.openai_api import Limits
from sparseray.jobs.tokenizer import train_bpe
from sparseray.model.config import ModelConfig
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer
from sparseray.platform.metrics import Metrics

CONFIG: ModelConfig = replace(MODEL, max_seq_len=256, dse=replace(MODEL.dse, document_end_id=0))
CHUNK, MAX_LEN, MAX_OPEN, MAX_BATCH = 8, 200, 12, 6


class BreakableExperts:
    """Experts that fail once when told to."""

    def __init__(self, experts: LocalExperts) -> None:
        self.experts, self.is_broken = experts, False

    def __call__(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("expert shard 1 is gone")
        found: Tensor = self.experts(layer, x_TH, topk_ids_TK, topk_weights_TK)
        return found


class Net:
    """A random model with full and NSA layers, experts and memory, all in this process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        torch.set_num_threads(1)
        layout = DSELayout.build(CONFIG.dse, tokenizer, vocab_size=CONFIG.vocab_size)
        self.model = Transformer(CONFIG, layout)
        self.experts = BreakableExperts(LocalExperts(CONFIG))
        self.memory = LocalMemory(CONFIG, layout)
        with torch.no_grad():
            # Larger weights than those of a fresh model, so that greedy text is not one token repeated.
            for p in [*self.model.parameters(), *self.experts.experts.parameters()]:
                if p.dim() == 2:
                    p.mul_(4.0)

    def engine(self, *, max_batch: int = MAX_BATCH) -> Engine:
        return Engine(
            self.model,
            self.experts,
            self.memory,
            max_batch=max_batch,
            max_model_len=MAX_LEN,
            prefill_chunk=CHUNK,
        )


class LocalClient:
    """`GenerationClient` over an engine that steps in a thread of its own and can be held still."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._queues: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[TokenEvent | Exception]]] = {}
        self._changed = threading.Condition()
        self._is_held, self._is_running = False, True
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: not self._is_running or (self.engine.has_work and not self._is_held)
                )
                if not self._is_running:
                    return
                try:
                    events = self.engine.step()
                except RuntimeError as error:
                    for request_id in list(self._queues):
                        self.engine.cancel(request_id)
                        self._put(request_id, error)
                    events = []
                for event in events:
                    self._put(event.request_id, event)

    def _put(self, request_id: str, item: TokenEvent | Exception) -> None:
        if request_id in self._queues:
            loop, queue = self._queues[request_id]
            loop.call_soon_threadsafe(queue.put_nowait, item)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        queue: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        with self._changed:
            self._queues[request.request_id] = (asyncio.get_running_loop(), queue)
            self.engine.add(request)
            self._changed.notify_all()
        try:
            is_done = False
            while not is_done:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                is_done = event.finish_reason is not None
                yield event
        finally:
            with self._changed:
                self._queues.pop(request.request_id)
                self.engine.cancel(request.request_id)

    @contextmanager
    def held(self, until_open: int) -> Iterator[None]:
        """Hold the engine still; on leaving, wait until so many requests are open, then let it go."""
        with self._changed:
            self._is_held = True
        try:
            yield
            wait_for(lambda: self.num_open >= until_open)
        finally:
            with self._changed:
                self._is_held = False
                self._changed.notify_all()

    @property
    def num_open(self) -> int:
        return len(self.engine.waiting) + len(self.engine.running)

    def close(self) -> None:
        with self._changed:
            self._is_running = False
            self._changed.notify_all()
        self._thread.join(10.0)
        assert not self._thread.is_alive()


class ScriptedClient:
    """`GenerationClient` that answers a prompt of text with the tokens of a text of the test's choice."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.sent = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.sent = 0
        for index, token in enumerate(self.tokens):
            self.sent += 1
            reason = "length" if index == len(self.tokens) - 1 else None
            yield TokenEvent(request_id=request.request_id, token=token, finish_reason=reason)
            await asyncio.sleep(0)


def text_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 300 ids, whose merges never join non-ASCII characters."""
    return train_bpe(
        ["rain river stone bread light house under winter green north seven "] * 4, 300
    ).tokenizer


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@contextmanager
def serving(client: GenerationClient, tokenizer: Tokenizer, *, max_waiting: int = MAX_OPEN) -> Iterator[str]:
    """Serve `client` and yield the server's address."""
    limits = Limits(model_name="tiny", vocab_size=tokenizer.get_vocab_size(), max_model_len=MAX_LEN, eos_id=0)
    metrics = Metrics({})
    metrics.record("requests_running", 0)
    app = build_app(client, tokenizer, limits=limits, max_waiting=max_waiting, metrics=metrics.exposition)
    with listening(app) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def listening(app: Starlette) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    # asyncio switches off Nagle's delays only where the socket says that it is TCP.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        options: dict[str, Any] = {"sockets": [listener]}
        thread = threading.Thread(target=server.run, kwargs=options, name="http")
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10.0)
            assert not thread.is_alive()
