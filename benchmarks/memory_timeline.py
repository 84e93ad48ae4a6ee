"""Where the time goes that memory layers add to a step on one GPU: the product's step in this process, three times.

Without memory, with it, and with it while nothing is staged beside (rows come and go between two steps, which are not
timed): the second less the third is what staging costs the thread that launches kernels. Of one step each, the kernels of
the main stream, and how long and before which kernels it had nothing to do.

  PYTHONPATH=. python -m benchmarks.memory_timeline DATA [--config 1b_memory] [--steps 12] [--traces FOLDER]
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.state.staged_memory import StagedMemory
from sparseray.actors.training.token_data import TokenBatches, TokenDataset
from sparseray.actors.training.worker import AttentionWorker
from sparseray.kernels.ops import ops_for
from sparseray.model.dse_layout import DSELayout
from sparseray.platform.config import RunConfig, load_yaml

ROOT = Path(__file__).resolve().parent.parent
GAP_US = 15.0


class Between:
    """Stands in for the staging thread: what it is given is done when `run` is called."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Put a call aside."""
        future: Future[Any] = Future()
        self._calls.append((future, function, arguments))
        return future

    def run(self) -> None:
        """Make the calls."""
        while self._calls:
            future, function, arguments = self._calls.popleft()
            future.set_result(function(*arguments))


class Nobody:
    """A mailbox whose messages nobody reads."""

    def post(self, *_: object, **__: object) -> None:
        """Nothing."""


class Step:
    """The product's step of one device in this process.

    Args:
        config: of the run.
        data: folder of the tokens.
    """

    def __init__(self, config: RunConfig, data: Path) -> None:
        model, train, optim = config.model, config.train, config.optim
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        layout = None
        if model.dse.layers:
            token_map = np.arange(model.vocab_size, dtype=np.int64)
            layout = DSELayout.from_token_map(model.dse, token_map, vocab_size=model.vocab_size)
        of_all: dict[str, Any] = {
            "device": device,
            "ops": ops_for("auto", device),
            "determinism": config.determinism,
            "seed": train.seed,
            "num_parts": 1,
            "betas": (optim.beta1, optim.beta2),
            "eps": optim.eps,
        }
        moments = {"moments": getattr(torch, optim.moments), "weight_decay": optim.weight_decay}
        dense = DenseSlabs(model, layout, dtype=torch.bfloat16, recompute=False, **moments, **of_all)
        experts = SlabExperts(model, compute_dtype=torch.bfloat16, **moments, **of_all)
        keys = [(layer, e) for layer in range(len(model.moe_layers)) for e in range(model.moe.num_experts)]
        experts.initialize(keys)
        experts.assign(keys, keys)
        self.memory: StagedMemory | None = None
        if layout is not None:
            self.memory = StagedMemory(
                model, [layout.num_rows(layer) for layer in model.dse.layers], **of_all
            )
            keys = [(i, b) for i in range(len(model.dse.layers)) for b in range(model.dse.num_buckets)]
            self.memory.initialize(keys)
            self.memory.assign(keys, keys)
        self.held = Holdings(lambda: dense, experts, self.memory)
        self.held.dense, self.held._owns_dense = dense, True
        exchange = OnDeviceExchange(dense, experts, self.memory, Nobody())  # type: ignore[arg-type]
        self.worker = AttentionWorker(dense, exchange)
        self.batches = TokenBatches(
            dataset=TokenDataset(data, "train", verify=False),
            seed=0,
            num_parts=1,
            sequences_per_part=train.sequences_per_shard,
            seq_len=train.seq_len,
        )
        self.between: Between | None = None
        self.number = 0

    def __call__(self) -> float:
        """Make a step; returns its ms."""
        self.number += 1
        synchronize()
        started, found = time.perf_counter(), []
        self.worker.run_step(self.number, [0], self.batches, lambda _, done: found.append(done))
        self.held.apply(lr=1e-4, memory_lr=5e-4, scale=1.0, counts_LE=found[0].counts_LE)
        synchronize()
        passed = 1e3 * (time.perf_counter() - started)
        if self.between is not None:
            self.between.run()
        return passed

    def stage_between(self) -> None:
        """From now on stage nothing beside a step."""
        assert self.memory is not None
        self.memory.settle()
        self.memory._work.shutdown(wait=True)
        self.between = Between()
        self.memory._work = self.between  # type: ignore[assignment]


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timeline(name: str, step: Step, folder: Path) -> dict[str, float]:
    """Print what the main stream did in a step; returns its time in us by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
    path = folder / f"{name.replace(' ', '_')}.json"
    found.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "kernel"]
    if not events:
        print(f"{name}: no kernels, no GPU")
        return {}
    main, _ = Counter(e["args"]["stream"] for e in events).most_common(1)[0]
    events = sorted((e for e in events if e["args"]["stream"] == main), key=lambda e: float(e["ts"]))
    end, gaps, by_kernel = float(events[0]["ts"]), [], defaultdict[str, float](float)
    for e in events:
        start, name_of = float(e["ts"]), e["name"].split("<")[0][-48:]
        if start - end > GAP_US:
            gaps.append((start - end, end - float(events[0]["ts"]), name_of))
        by_kernel[name_of] += float(e["dur"])
        end = max(end, start + float(e["dur"]))
    whole = end - float(events[0]["ts"])
    busy, idle = sum(by_kernel.values()), sum(gap for gap, _, _ in gaps)
    print(
        f"{name}: {len(events)} kernels, {busy / 1e3:.2f} ms of {whole / 1e3:.2f}; "
        f"{len(gaps)} gaps of more than {GAP_US:.0f} us, {idle / 1e3:.2f} ms"
    )
    for gap, at, before in sorted(gaps, reverse=True)[:5]:
        print(f"    idle {gap / 1e3:.3f} ms at {at / 1e3:.1f} ms, before {before}")
    return by_kernel


def main() -> int:
    """Time and profile the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--config", default="1b_memory")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--traces", type=Path, help="folder that keeps the traces")
    options = parser.parse_args()
    config, spent = load_yaml(ROOT / "configs" / f"{options.config}.yaml"), []
    bare = replace(config, model=replace(config.model, dse=replace(config.model.dse, layers=())))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.traces or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, of in (("without memory", bare), ("with memory", config)):
            step = Step(of, options.data)
            for mode in (name, "staged between steps")[: 2 if of is config else 1]:
                if mode != name:
                    step.stage_between()
                times = [step() for _ in range(options.steps)][4:]
                print(
                    f"{mode}: {statistics.median(times):.2f} ms a step, {min(times):.2f} at best", flush=True
                )
                spent.append(timeline(mode, step, folder))
            del step
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    bare_us, whole_us = spent[:2]
    more_us = {kernel: us - bare_us.get(kernel, 0.0) for kernel, us in whole_us.items()}
    for kernel, more in sorted(more_us.items(), key=lambda item: -item[1])[:24]:
        print(f"    {more / 1e3:8.3f} ms more in {kernel}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
