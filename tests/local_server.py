"""A server as threads of one process: real mailboxes, slots, scheduler loop and ingress; no Ray and no HTTP."""

import asyncio
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import Faults, FaultyTransport, Killed, LocalFleet
from processes import wait_until

from sparseray.actors.serving.text_request import GenerationRequest, TokenLogprobs
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.jobs.http.ingress import Ingress
from sparseray.platform.composition import Run
from sparseray.platform.config import ClusterConfig, ServeConfig
from sparseray.platform.fleet import job
from sparseray.platform.fleet.transport import ZmqTransport
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.offers import Offers
from sparseray.platform.opening import open_followed, open_serving, slots_of
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.serving import Served


@contextmanager
def slabs_in_fp32() -> Iterator[None]:
    """Slots that compute in slabs do so in fp32: only then are a row's bits the same in any company on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(job.DTYPES, "bfloat16", torch.float32)
        yield


@dataclass
class Heard:
    """The answer to one request: token ids and their log probabilities, how it ended, and the longest wait for a token."""

    tokens: list[int]
    finish: str | None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    gap_s: float = field(default=0.0, compare=False)


class LocalServer:
    """Serves a checkpoint.

    Args:
        folder: for the journal and the events.
        checkpoint: to serve; None for what the run that is followed offers.
        cluster: roles and replication.
        faults: what goes wrong.
        serve: limits of the engines.
        follows: folder of a run that is followed.
        offers: of that run, while it trains.
        is_in_slabs: engines compute in slabs, as on GPUs.
        nodes: of the slots, by id.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Path | None,
        cluster: ClusterConfig,
        faults: Faults | None = None,
        serve: ServeConfig | None = None,
        follows: str = "",
        offers: Callable[[], Offers | None] = lambda: None,
        is_in_slabs: bool = False,
        nodes: dict[int, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        serve, followed, self.offers = serve or ServeConfig(prefill_chunk=8), RunFolder(Path(follows)), offers
        if checkpoint is None:
            config = open_followed(followed, serve, cluster)
        else:
            config = open_serving(checkpoint, serve, cluster)
        if is_in_slabs:
            train = replace(config.train, dtype="bfloat16")
            config = replace(config, train=train, kernels="reference")
        self.config = replace(config, run_dir=str(folder))
        self.sockets = Path(tempfile.mkdtemp(prefix="sr"))
        self.fleet = LocalFleet(uuid.uuid4().hex, self.sockets, faults or Faults(), nodes=nodes or {})
        transports = (ZmqTransport(name, self.sockets) for name in ("ingress", "ingress-out"))
        self.ingress = Ingress(self.fleet.job, *transports, deadline_s=20.0, places=config.serve.max_batch)
        self.task = Served(
            checkpoint="" if checkpoint is None else str(checkpoint),
            ingress=self.ingress.address,
            run=follows,
            identity=str(followed.identity) if checkpoint is None else "",
        )
        self.stopping, self.dying = threading.Event(), threading.Event()
        self.run = self._open()
        self.fleet.start(slots_of(self.config, self.run.generations.workload.inventory))
        self.thread = threading.Thread(target=self._drive, name="scheduler")
        self.thread.start()
        # The first engine in a new tree compiles its loops.
        deadline = time.monotonic() + 60.0
        # Ready is a server with one engine that answers; here requests are to find all of them.
        while self.ingress.reason or self.ingress._life.silent:
            if time.monotonic() > deadline:
                reason = self.ingress.reason
                self.close()
                raise AssertionError(reason)
            time.sleep(0.005)

    def _open(self) -> Run:
        transport = FaultyTransport(
            ZmqTransport("scheduler", self.sockets), SCHEDULER, self.fleet.faults, self.fleet
        )

        def should_stop() -> bool:
            if self.dying.is_set():
                self.dying.clear()
                raise Killed
            return self.stopping.is_set()

        return Run.open(
            self.config,
            Mailbox(transport, SCHEDULER, self.fleet.job),
            lambda journal, history, spec: self.fleet,
            Metrics({}),
            task=self.task,
            on_record=lambda record: None,
            should_stop=should_stop,
            offers=self.offers,
        )

    def _drive(self) -> None:
        while True:
            try:
                self.run.drive()
                break
            except Killed:
                self.run.close()
                self.run = self._open()

    @property
    def events(self) -> list[str]:
        return [event["kind"] for event in self.run.folder.event_lines()]

    def ask(
        self,
        requests: list[GenerationRequest],
        at: Callable[[int, "LocalServer"], None] = lambda count, server: None,
    ) -> list[Heard]:
        """Answer requests side by side.

        Args:
            requests: what to answer.
            at: called after every token, with how many there were in all.
        """
        count = 0

        async def one(request: GenerationRequest) -> Heard:
            nonlocal count
            heard, last_s = Heard([], None), time.monotonic()
            events = (event async for run in self.ingress.generate(request) for event in run)
            async for event in events:
                heard.finish = event.finish_reason
                if event.token_id is not None:
                    assert event.index == len(heard.tokens), event
                    heard.tokens.append(event.token_id)
                    heard.logprobs += [event.logprobs] if event.logprobs else []
                    now = time.monotonic()
                    heard.gap_s, last_s = max(heard.gap_s, now - last_s), now
                    count += 1
                    at(count, self)
                if event.finish_reason == "error":
                    raise AssertionError(event.error)
            return heard

        async def all_of_them() -> list[Heard]:
            return await asyncio.wait_for(asyncio.gather(*map(one, requests)), 120.0)

        return asyncio.run(all_of_them())

    def close(self) -> None:
        self.stopping.set()
        self.thread.join(20.0)
        self.fleet.stop()
        self.run.close()
        self.ingress.close()
        shutil.rmtree(self.sockets)

    def __enter__(self) -> "LocalServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextmanager
def slowed(engines: list[Any], seconds: float) -> Iterator[None]:
    """Let every step last so long that the scheduler's decisions come while requests are open."""
    for engine in engines:
        engine.step = lambda step=engine.step: (time.sleep(seconds), step())[1]
    yield
    for engine in engines:
        del engine.step


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for a condition that another thread brings about."""
    wait_until(condition, "what the test waits for", seconds)
