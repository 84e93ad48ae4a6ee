"""The autoscaler and a real server of thread slots: four times the load finds its engines, and then nothing changes.

An engine's step sleeps, as it would wait for a device: threads of one process share one interpreter.
"""

import asyncio
import time
from pathlib import Path

import pytest
from local_cluster import tiny_run, train
from local_server import LocalServer

from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.platform.config import ClusterConfig, ServeConfig

STEP_S, LENGTH = 0.03, 16
SERVE = ServeConfig(prefill_chunk=8, max_batch=4, max_engines=3, target_ttft_ms=1000.0)
CLUSTER = ClusterConfig(standby=1, deadline_s=10.0)
# A request is a prompt of two chunks at most and sixteen tokens; four in a batch: seven requests a second.


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    newest = train(tmp_path_factory.mktemp("served"), tiny_run(corpus, steps=2)).folder.newest_checkpoint()
    assert newest is not None
    return newest


def load(server: LocalServer, per_s: float, seconds: float, name: str) -> list[tuple[float, float]]:
    """Ask at a steady rate; (when it came, seconds to the first token) of every request, all of them answered."""

    async def one(number: int) -> tuple[float, float]:
        await asyncio.sleep(number / per_s)
        asked, first, tokens = time.monotonic(), 0.0, 0
        request = GenerationRequest(
            request_id=f"{name}{number}", prompt_tokens=tuple(range(5, 18)), max_tokens=LENGTH, seed=number
        )
        events = (event async for run in server.ingress.generate(request) for event in run)
        async for event in events:
            assert event.finish_reason != "error", event.error
            first = first or time.monotonic()
            tokens += event.token_id is not None
        assert tokens == LENGTH
        return asked, first - asked

    async def all_of_them() -> list[tuple[float, float]]:
        return await asyncio.gather(*(one(i) for i in range(int(per_s * seconds))))

    return asyncio.run(all_of_them())


# It compares times, which a busy machine stretches.
@pytest.mark.long
def test_four_times_the_load_finds_another_engine_and_then_nothing_changes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = PagedEngine.step

    def slow(engine: PagedEngine) -> list[TokenEvent]:
        time.sleep(STEP_S)
        return quick(engine)

    monkeypatch.setattr(PagedEngine, "step", slow)
    with LocalServer(tmp_path / "server", trained, CLUSTER, serve=SERVE) as server:
        load(server, 3.0, 4.0, "a")
        assert "autoscaled" not in server.events
        begun = time.monotonic()
        came = load(server, 12.0, 20.0, "b")
        lines = [e for e in server.run.folder.event_lines() if e["kind"] == "autoscaled"]
        assert lines and all("would" in e["text"] or "nine of ten" in e["text"] for e in lines), lines
        assert server.run.generations.wanted.attention >= 2
        late = [at - begun for at, seconds in came if seconds > 1.0]
        assert not late or max(late) < 10.0, late
        ups = len(lines)
        load(server, 12.0, 5.0, "c")
        assert len([e for e in server.events if e == "autoscaled"]) == ups


def test_what_a_user_scales_goes_back_within_the_bounds(trained: Path, tmp_path: Path) -> None:
    with LocalServer(tmp_path / "server", trained, ClusterConfig(deadline_s=10.0), serve=SERVE) as server:
        deadline = time.monotonic() + 20.0
        while server.run.generations.plan is None:
            time.sleep(0.05)
        server.run.reconciler.request("attention", 5)
        while server.run.generations.wanted.attention != 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.run.generations.wanted.attention == 3
        (line,) = [e for e in server.run.folder.event_lines() if e["kind"] == "autoscaled"]
        assert line["text"].startswith("attention 5 to 3: serve.max_engines")
