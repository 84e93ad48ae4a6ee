"""Decoding and reading prompts on a CPU, as the product serves: slots with their mailboxes, exchange and engine.

Every slot is a thread of this process, with one thread of its own for products. An engine's steps are timed from
outside; a step of B requests counts where all of them decode and nothing else is read. Prints Markdown:

    PYTHONPATH=. python -m benchmarks.decode_cpu
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.jobs.tokens.prepare import prepare
from sparseray.platform.config import ClusterConfig, ServeConfig, load_yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import write_corpus  # type: ignore[import-not-found]  # noqa: E402
from local_cluster import train  # type: ignore[import-not-found]  # noqa: E402
from local_server import LocalServer  # type: ignore[import-not-found]  # noqa: E402

BATCHES, PROMPT, TOKENS, LONG = (1, 4, 16), 180, 200, 500
PLACES = {
    "one colocated slot": ClusterConfig(colocated=True),
    "1 + 1 + 1 slots": ClusterConfig(),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of an engine.

    Args:
        decoding: requests of which it computed one token.
        is_reading: whether it read prompts too.
        seconds: that it took.
    """

    decoding: int
    is_reading: bool
    seconds: float


@contextmanager
def timed() -> Iterator[list[Step]]:
    """Note all steps of all engines."""
    steps: list[Step] = []
    plain = PagedEngine.step

    def step(engine: PagedEngine) -> list[TokenEvent]:
        running = engine._running
        decoding = sum(1 for sequence in running if not sequence.in_prompt)
        is_reading = bool(engine._waiting) or decoding < len(running)
        started = time.perf_counter()
        events = plain(engine)
        steps.append(Step(decoding=decoding, is_reading=is_reading, seconds=time.perf_counter() - started))
        return events

    PagedEngine.step = step  # type: ignore[method-assign, assignment]
    try:
        yield steps
    finally:
        PagedEngine.step = plain  # type: ignore[method-assign]


def checkpoint_of(folder: Path) -> Path:
    """Train the tiny configuration for a step, on text made here."""
    write_corpus(folder / "text")
    prepare([str(folder / "text")], folder / "data", vocab_size=300, validation_fraction=0.1)
    config = load_yaml(ROOT / "configs" / "tiny.yaml")
    config = replace(
        config,
        data=replace(config.data, path=str(folder / "data"), verify=False),
        train=replace(config.train, steps=1, eval_every=0, checkpoint_every=0),
        cluster=ClusterConfig(colocated=True),
    )
    found: Path | None = train(folder / "run", config).folder.newest_checkpoint()
    assert found is not None
    return found


def request(name: str, length: int, tokens: int, seed: int) -> GenerationRequest:
    """A request for a made-up prompt."""
    prompt = np.random.default_rng(seed).integers(0, 300, length).tolist()
    return GenerationRequest(
        request_id=name, prompt_tokens=tuple(prompt), max_tokens=tokens, seed=seed, temperature=1.0
    )


def measure(name: str, server: LocalServer, steps: list[Step]) -> None:
    """Print the rows of one placement."""
    for batch in BATCHES:
        steps.clear()
        server.ask([request(f"{batch}.{i}", PROMPT + i, TOKENS, i) for i in range(batch)])
        found = sorted(s.seconds for s in steps if s.decoding == batch and not s.is_reading)
        best, middle = 1e3 * found[0], 1e3 * statistics.median(found)
        print(f"| {name} | decode step, batch {batch} | {best:.2f} ms | {middle:.2f} ms | {len(found)} |")
    spent: list[list[float]] = [[], []]
    for seed in range(3):
        for again in range(2):
            steps.clear()
            server.ask([request(f"long.{seed}.{again}", LONG, 1, 100 + seed)])
            spent[again].append(sum(s.seconds for s in steps))
    first, second = min(spent[0]), min(spent[1])
    middles = [1e3 * statistics.median(values) for values in spent]
    print(f"| {name} | prompt of {LONG} tokens | {1e3 * first:.1f} ms | {middles[0]:.1f} ms | 3 |")
    print(
        f"| {name} | the same again | {1e3 * second:.1f} ms ({second / first:.2f}x) | {middles[1]:.1f} ms | 3 |"
    )


def main() -> None:
    """Run everything."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| slots | what | best | median | of |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, timed() as steps:
        checkpoint = checkpoint_of(Path(folder))
        for name, cluster in PLACES.items():
            place, serve = Path(folder) / name.replace(" ", ""), ServeConfig(max_model_len=512)
            with LocalServer(place, checkpoint, cluster, serve=serve) as server:
                measure(name, server, steps)


if __name__ == "__main__":
    main()
