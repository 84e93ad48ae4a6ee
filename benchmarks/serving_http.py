"""What the HTTP path costs: latency that it adds and requests that it answers, with an engine that answers at once.

The server runs in a process of its own, as the load does. Added latency is what a client sees of a request whose tokens
cost nothing, over one connection, one request after another.
"""

import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import AsyncGenerator
from http.client import HTTPConnection
from multiprocessing.connection import Connection

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.elastic_parts import Row
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.jobs.http.chat import ChatTemplate
from sparseray.jobs.http.fields import table
from sparseray.jobs.http.limits import ApiLimits
from sparseray.jobs.http.openai_bodies import ServedModel
from sparseray.jobs.http.server import HttpServer, create_app
from sparseray.jobs.http.text_stream import Vocabulary
from sparseray.platform.metrics.exporter import Metrics

BODY = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1, "seed": 1}).encode()
HEADERS = {"Content-Type": "application/json"}


class AtOnce:
    """An engine that has all tokens ready."""

    reason = failure = ""

    async def generate(
        self, request: GenerationRequest, *, patience: int = 1
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Yield all tokens at once, so many together."""
        name, last = request.request_id, request.max_tokens - 1
        events = [
            TokenEvent(
                request_id=name, index=index, token_id=65, finish_reason="length" if index == last else None
            )
            for index in range(request.max_tokens)
        ]
        for start in range(0, len(events), patience):
            yield events[start : start + patience]

    def version(self, request_id: str = "") -> str:
        """There are no weights."""
        return ""

    async def cancel(self, request_id: str) -> None:
        """Nothing is left to cancel."""


def serve(pipe: Connection) -> None:
    """Serve until the other end of the pipe says so; its first word is the port."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    limits = ApiLimits(max_model_len=4096, vocab_size=256)
    served = ServedModel(
        names=("none",),
        vocabulary=Vocabulary(tokenizer, 0),
        template=ChatTemplate(),
        grammars=None,
        limits=limits,
        fields=table(limits),
    )
    metrics = Metrics({}, declare="server")
    app = create_app(AtOnce(), served, record=metrics.record, metrics=metrics.exposition)
    with HttpServer(app) as server:
        pipe.send(server.port)
        pipe.recv()


def ask(connection: HTTPConnection, body: bytes = BODY) -> None:
    """Send one request and read its answer."""
    connection.request("POST", "/v1/completions", body, HEADERS)
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status == 200, data


def latency_s(port: int, count: int = 500) -> float:
    """Median time of a request over one connection."""
    connection, times = HTTPConnection("127.0.0.1", port), []
    for _ in range(count):
        started = time.perf_counter()
        ask(connection)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def load(port: int, threads: int, seconds: float, counts: "multiprocessing.Queue[int]") -> None:
    """Ask over several connections for a while, and say how often."""
    done = [0] * threads
    end = time.perf_counter() + seconds

    def one(which: int) -> None:
        connection = HTTPConnection("127.0.0.1", port)
        while time.perf_counter() < end:
            ask(connection)
            done[which] += 1

    workers = [threading.Thread(target=one, args=(which,)) for which in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    counts.put(sum(done))


def http() -> list[Row]:
    """Measure both."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there,))
    server.start()
    port = here.recv()
    try:
        latency_s(port, 50)
        added = latency_s(port)
        counts: multiprocessing.Queue[int] = context.Queue()
        worker = context.Process(target=load, args=(port, 8, 5.0, counts))
        worker.start()
        rate = counts.get() / 5.0
        worker.join()
        stream = json.dumps({"prompt": [1, 2, 3], "max_tokens": 512, "stream": True}).encode()
        connection, started = HTTPConnection("127.0.0.1", port), time.perf_counter()
        for _ in range(10):
            ask(connection, stream)
        chunk = (time.perf_counter() - started) / 5120
    finally:
        here.send(None)
        server.join()
    return [
        Row(
            part="http",
            what="added latency, p50",
            measured=f"{1000 * added:.2f} ms",
            target="1.5 ms",
            is_met=added <= 1.5e-3,
        ),
        Row(
            part="http",
            what="requests/s, 8 connections",
            measured=f"{rate:.0f}",
            target="1,500",
            is_met=rate >= 1500,
        ),
        Row(part="http", what="a chunk of a stream", measured=f"{1e6 * chunk:.0f} us"),
    ]
