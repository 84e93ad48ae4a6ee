"""What recording costs: one call of each kind, and the share of a training step and of a token that goes there.

Training is a real run of configs/tiny.yaml with a slot as a thread; every call that records or notes statistics is
timed from outside, over all threads, against the run's wall time. Serving is the engine on the same model with the
records that a slot and the server make. Run with `PYTHONPATH=. python -m benchmarks.metrics --data FOLDER`.
"""

import argparse
import functools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparseray.actors import slot as slot_module
from sparseray.actors.observation import observe_engine
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.kernels.ops import ops_for
from sparseray.model import attention, dse
from sparseray.model.moe import LocalExperts
from sparseray.model.presets import preset
from sparseray.model.transformer import Transformer
from sparseray.platform.config import load_yaml
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.metrics.training import StepMetrics

ROOT = Path(__file__).resolve().parent.parent
Call = Callable[..., Any]


class Spent:
    """Time inside wrapped calls, nested ones counted once, over all threads."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        self._here, self._lock = threading.local(), threading.Lock()

    def wrap(self, function: Call) -> Call:
        """Return the function, timed."""

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if getattr(self._here, "inside", False):
                return function(*arguments, **named)
            self._here.inside, started = True, time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._here.inside = False
                with self._lock:
                    self.seconds += time.perf_counter() - started
                    self.calls += 1

        return timed


@contextmanager
def timed(spent: Spent) -> Iterator[None]:
    """Time everything that a training run does for its watchers."""
    places: list[tuple[Any, str]] = [
        (Metrics, "record"),
        (StepMetrics, "step"),
        (slot_module, "observe_worker"),
        (slot_module, "observe_rows"),
        (attention, "note_attention"),
        (dse, "note_memory"),
    ]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, function in kept:
        setattr(place, name, spent.wrap(function))
    try:
        yield
    finally:
        for place, name, function in kept:
            setattr(place, name, function)


def calls() -> None:
    """Print the time of one call of each kind, and of one scrape."""
    metrics, count = Metrics({"slot": "0"}, declare="scheduler"), 100_000
    for name, kind, labels in (
        ("train_tokens_total", "counter", {}),
        ("train_loss", "gauge", {}),
        ("moe_dead_experts", "gauge, one label", {"layer": "3"}),
        ("train_step_seconds", "histogram", {}),
    ):
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(count):
                metrics.record(name, 0.02, **labels)
            best = min(best, time.perf_counter() - started)
        print(f"| record, {kind} | {best / count * 1e9:.0f} ns |")
    for layer in range(27):
        for name in ("moe_load_max_violation", "moe_load_variation", "moe_load_entropy_ratio"):
            metrics.record(name, 0.5, layer=str(layer))
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        text = metrics.exposition()
        best = min(best, time.perf_counter() - started)
    print(f"| one scrape of {len(text.splitlines())} lines | {best * 1e3:.2f} ms |")


def training(data: Path, steps: int) -> None:
    """Print the share of a step that goes to recording."""
    sys.path.insert(0, str(ROOT / "tests"))
    from local_cluster import train  # type: ignore[import-not-found]

    config = load_yaml(ROOT / "configs" / "tiny.yaml")
    config = replace(
        config,
        data=replace(config.data, path=str(data)),
        train=replace(config.train, eval_batches=1, steps=steps, checkpoint_every=0, eval_every=0),
        cluster=replace(config.cluster, colocated=True),
    )
    spent = Spent()
    with tempfile.TemporaryDirectory() as folder, timed(spent):
        records = train(Path(folder) / "run", config).records
    wall = sum(record["seconds"] for record in records)
    print(
        f"| training step, {wall / steps * 1e3:.0f} ms | {spent.calls / steps:.0f} calls, "
        f"{spent.seconds / steps * 1e6:.0f} us: {100 * spent.seconds / wall:.3f} % |"
    )


def serving(requests: int, tokens: int) -> None:
    """Print the share of a token that goes to recording, with and without company in the batch."""
    config = preset("tiny")
    config = replace(config, dse=replace(config.dse, layers=()))
    model = Transformer(config, None, ops=ops_for("auto", torch.device("cpu")))
    engine = PagedEngine(model, LocalExperts(config), None)
    slot, server = Metrics({"slot": "0"}, declare="slot"), Metrics({}, declare="server")
    for index in range(requests):
        engine.add(GenerationRequest(request_id=str(index), prompt_tokens=(1, 2, 3), max_tokens=tokens))
    engine.step()
    computing, recording, made = 0.0, 0.0, 0
    while engine.has_work:
        started = time.perf_counter()
        events = engine.step()
        between = time.perf_counter()
        observe_engine(
            lambda name, value, **labels: slot.record(name, value, **labels), engine, between - started
        )
        for _ in events:
            server.record("inter_token_latency_seconds", 0.01)
            server.record("generation_tokens_total", 1)
        computing += between - started
        recording += time.perf_counter() - between
        made += len(events)
    print(
        f"| token of {requests} requests, {computing / made * 1e3:.2f} ms | "
        f"{recording / made * 1e6:.1f} us: {100 * recording / computing:.3f} % |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="token shards for configs/tiny.yaml")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | cost |\n|---|---|")
    calls()
    training(options.data, options.steps)
    for requests in (1, 8):
        serving(requests, 60)


if __name__ == "__main__":
    main()
