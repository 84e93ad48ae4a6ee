"""What table rows cost a decode step on one GPU: a step of a model with memory in host memory, beside one without.

Rows follow from the tokens of the step before. Three engines over the same random weights: without memory layers; with
them, and a step that begins when its rows are there (what is launched before them in the third waits too); with them, and
rows that come while the layers before them run. Then where the time from tokens to the rest of a step goes.

  PYTHONPATH=. python -m benchmarks.decode_rows
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks import serve_gpu_engine as here
from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.serving import decode_step
from sparseray.actors.serving.paged_engine import Flight, PagedEngine
from sparseray.actors.serving.recording import nothing, recorded
from sparseray.actors.state.staged_memory import StagedMemory
from sparseray.kernels.ops import ops_for
from sparseray.model.config import DSEConfig, ModelConfig
from sparseray.model.dse_layout import DSELayout

CONTEXT = 512


class Waiting(PagedEngine):
    """Takes the tokens of a step before it launches anything of the next."""

    def _sample(self, *arguments: Any) -> Flight:
        return replace(super()._sample(*arguments), may_be_overtaken=False)


def tables(config: ModelConfig, layout: DSELayout, device: torch.device) -> OnDeviceExchange:
    """Rows of their own for every memory layer, in host memory."""
    memory = StagedMemory(
        config, [layout.num_rows(layer) for layer in config.dse.layers], seed=0, num_parts=1, betas=(0.9, 0.95), eps=1e-8,
        device=device, ops=ops_for("auto", device), determinism="fast",
    )  # fmt: skip
    keys = [
        (layer, bucket) for layer in range(len(config.dse.layers)) for bucket in range(config.dse.num_buckets)
    ]
    memory.initialize(keys)
    memory.assign(keys, keys)
    holder: Any = SimpleNamespace(device=device, dtype=torch.bfloat16, config=config)
    return OnDeviceExchange(holder, holder, memory, holder)


def step_ms(engine: PagedEngine, batch: int, steps: int) -> float:
    """Median milliseconds of a step that adds a token to `batch` requests, whatever lies in their caches."""
    for index in range(batch):
        engine.add(here.request_of(index, CONTEXT, 4 * steps))
    engine._admit()
    for sequence in engine._running:
        assert sequence.lease is not None
        sequence.lease.length = CONTEXT - 1
    seconds: list[float] = []
    while len(seconds) < steps + 10:
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    for sequence in list(engine._running):
        engine.cancel(sequence.request.request_id)
    engine.step()
    torch.cuda.synchronize()
    return statistics.median(seconds[10:]) * 1e3


def timed(owner: Any, name: str, into: list[float]) -> Callable[[], None]:
    """Note how long each call of a function takes; returns what ends that."""
    call = getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments, **named)
        finally:
            into.append(time.perf_counter() - started)

    setattr(owner, name, noted)
    return lambda: setattr(owner, name, call)


def pieces(engine: PagedEngine, memory: OnDeviceExchange, batch: int, steps: int) -> str:
    """Where the time between a step's tokens and the launch of what needs their rows goes, and what hides it."""
    names = {
        "wait for the tokens": (engine, "_learn"),
        "hash": (decode_step, "newest_rows"),
        "gather and send": (memory, "prefetch"),
        "from launched to rows sent": (decode_step.DecodeStep, "_rows_come"),
    }
    found: dict[str, list[float]] = {name: [] for name in names}
    ends = [timed(owner, name, found[said]) for said, (owner, name) in names.items()]
    step_ms(engine, batch, steps)
    for end in ends:
        end()
    # Steps take the tokens once within and once, in vain, at their end.
    found["wait for the tokens"] = [s for s in found["wait for the tokens"] if s > 3e-6]
    said = [f"{name} {statistics.median(seconds) * 1e6:.0f} us" for name, seconds in found.items()]
    graphs = engine.paged._decodes[batch].graphs
    return ", ".join([*said, *(f"graph {i + 1} {device_us(g):.0f} us" for i, g in enumerate(graphs))])


def device_us(graph: torch.cuda.CUDAGraph, repeats: int = 50) -> float:
    """Microseconds that a graph takes on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats * 1e3


def engine_of(
    kind: type[PagedEngine], config: ModelConfig, layout: DSELayout, memory: OnDeviceExchange, longest: int
) -> PagedEngine:
    """An engine over random weights.

    Args:
        kind: of engine.
        config: of the model; without memory layers the layout and the memory are of no use.
        layout, memory: of the tables.
        longest: tokens of a request.
    """
    of_model, has_memory = torch.device("cuda"), bool(config.dse.layers)
    model, experts = here.drawn(config, of_model, layout if has_memory else None)
    return kind(
        model, experts, memory if has_memory else None, max_batch=64, max_model_len=longest, prefill_chunk=128
    )


def whole(run: Callable[[Callable[[], None]], Tensor], pool: Any) -> Any:
    """A step as one graph, which waits for its rows.

    Args:
        run, pool: as of `recorded`.
    """
    return recorded(lambda _: run(nothing), pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=100_000, help="of each head's table")
    options = parser.parse_args()
    # As a slot has by default: a team of threads takes longer to wake than a few rows to hash.
    torch.set_num_threads(1)
    config = here.model_of("1b_memory")
    config = replace(config, dse=replace(config.dse, rows_per_head=options.rows))
    layout = DSELayout.from_token_map(config.dse, np.arange(config.vocab_size), vocab_size=config.vocab_size)
    memory = tables(config, layout, torch.device("cuda"))
    ways: list[tuple[str, type[PagedEngine], ModelConfig, Any]] = [
        ("no memory", PagedEngine, replace(config, dse=DSEConfig()), recorded),
        ("rows first", Waiting, config, whole),
        ("rows beside the layers before", PagedEngine, config, recorded),
    ]
    for name, kind, of_way, record in ways:
        with patch.object(decode_step, "recorded", record):
            engine = engine_of(kind, of_way, layout, memory, CONTEXT + 4 * options.steps + 8)
        for batch in options.batches:
            print(f"| {name} | {batch} | {step_ms(engine, batch, options.steps):.3f} ms |", flush=True)
            if of_way is config and record is recorded:
                print(f"  {pieces(engine, memory, batch, options.steps)}", flush=True)
        del engine
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
