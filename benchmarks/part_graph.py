"""Steps of one slot on one GPU without a scheduler: parts launched by the host, and replayed as one CUDA graph.

Both ways begin with the same weights and must come to the same losses where `determinism` is bitwise. One line each with
the median step, the time until the host has launched it, and the peak of the memory that torch reserved:

  PYTHONPATH=. python -m benchmarks.part_graph --data data/stdlib --configs 1b_nsa,1b_full --steps 12
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.installation import JobSpec
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.training.worker import AttentionWorker
from sparseray.actors.wire.messages import PartDone
from sparseray.platform.config import DataConfig, RunConfig, load_yaml
from sparseray.platform.fleet.job import SlotJob
from sparseray.platform.fleet.weights_port import WeightsPort
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.plain_values import to_dict

ROOT = Path(__file__).resolve().parent.parent


class Nobody:
    """A mailbox whose messages nobody reads."""

    def post(self, *message: object, **about: object) -> None:
        """Forget it."""


@dataclass
class Steps:
    """What some steps took and gave."""

    seconds: list[float] = field(default_factory=list)
    launched: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gib: float = 0.0


class Alone:
    """A slot that has everything, with its weights drawn anew.

    Args:
        config: of a run on one GPU, without memory layers.
        is_graph: whether parts are replayed.
    """

    def __init__(self, config: RunConfig, *, is_graph: bool) -> None:
        self.job = SlotJob(JobSpec(config=json.dumps(to_dict(config))), Metrics({}), WeightsPort())
        self.held = self.job.holdings()
        model, experts = config.model, self.held.experts
        keys = [(i, e) for i in range(len(model.moe_layers)) for e in range(model.moe.num_experts)]
        pieces: list[Piece] = [DENSE, *(("expert", *key) for key in keys)]
        self.held.initialize(pieces)
        experts.assign(keys, keys)
        dense = self.held.dense
        assert isinstance(dense, DenseSlabs) and isinstance(experts, SlabExperts)
        self.exchange = OnDeviceExchange(dense, experts, None, Nobody())  # type: ignore[arg-type]
        self.worker = AttentionWorker(dense, self.exchange)
        if not is_graph:
            self.worker.graph = None

    def run(self, count: int) -> Steps:
        """Run some steps."""
        found, parts = Steps(), range(self.job.config.train.logical_shards)
        torch.cuda.reset_peak_memory_stats()
        reduce, began = self.exchange.reduce, 0.0

        def timed(*arguments: object) -> None:
            launched.append(time.perf_counter() - began)
            reduce(*arguments)  # type: ignore[arg-type]

        self.exchange.reduce = timed  # type: ignore[method-assign, assignment]
        for step in range(1, count + 1):
            done: dict[int, PartDone] = {}
            launched: list[float] = []
            began = time.perf_counter()
            self.worker.run_step(step, parts, self.job.train_batches(), done.__setitem__)
            counts_LE = torch.stack([d.counts_LE for d in done.values()]).sum(0)
            self.held.apply(lr=1e-4, memory_lr=0.0, scale=1.0, counts_LE=counts_LE)
            found.seconds.append(time.perf_counter() - began)
            found.launched.append(launched[-1])
            found.losses.append(sum(d.loss_sum for d in done.values()))
        torch.cuda.synchronize()
        found.gib = torch.cuda.max_memory_reserved() / 2**30
        return found


def compare(name: str, config: RunConfig, steps: int, warmup: int) -> None:
    """Print a line for each way.

    Args:
        name: of the configuration.
        config: of the run.
        steps: of each way.
        warmup: steps of them that do not count.
    """
    losses = []
    for is_graph in (False, True):
        found = Alone(config, is_graph=is_graph).run(steps)
        step, launched = (1e3 * statistics.median(x[warmup:]) for x in (found.seconds, found.launched))
        way = "replayed" if is_graph else "launched"
        print(
            f"{name} {way}: {step:.1f} ms a step, on its way after {launched:.1f} ms,"
            f" {found.gib:.1f} GiB, last loss {found.losses[-1]:.4f}",
            flush=True,
        )
        losses.append(found.losses)
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{name}: the losses are {'the same' if losses[0] == losses[1] else 'others'}", flush=True)


def main() -> int:
    """Measure the chosen configurations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare --vocab_size 32768`")
    parser.add_argument("--configs", default="1b_nsa,1b_full")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4)
    options = parser.parse_args()
    for name in options.configs.split(","):
        config = load_yaml(ROOT / "configs" / f"{name}.yaml")
        data = DataConfig(path=str(Path(options.data).absolute()), verify=False)
        compare(name, replace(config, data=data), options.steps, options.warmup)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
