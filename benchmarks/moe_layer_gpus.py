"""Time of one whole MoE layer over several GPUs of one host, forward and backward, against the same tokens on one.

A process for each GPU runs what a slot runs in training (actors/peers/token_exchange.py): tokens go to all GPUs, each computes
the rows of its experts, rows or their sums come back, and the gradients the same way. Prints a line for each model and
order: milliseconds of the device and of the host's launches, and, with --profile, what they are of.

  PYTHONPATH=. python -m benchmarks.moe_layer_gpus --gpus 2
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from sparseray.actors.peers.device_link import DeviceLink
from sparseray.actors.peers.meter import Meter
from sparseray.actors.peers.regions import Regions, Sizes
from sparseray.actors.peers.table import Table
from sparseray.actors.peers.token_exchange import TokenExchange
from sparseray.actors.state.shared_buffer import Buffer, open_buffer
from sparseray.kernels import peer
from sparseray.kernels.triton_ops import TRITON

TOKENS, TOP_K, EXPERTS = 32768, 6, 64
REPEATS = 10
LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer's widths."""

    name: str
    hidden: int
    inner: int


SHAPES = (
    Shape(name="1.24 B", hidden=1024, inner=512),
    Shape(name="Moonlight", hidden=2048, inner=1408),
)


def noise(*shape: int, device: torch.device) -> Tensor:
    """Normal bf16 numbers."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def nothing(name: str, value: float, **labels: str) -> None:
    """Records no metric."""


class Mailbox:
    """Of a slot that gets no message."""

    generation = 1

    def __init__(self, slot: int) -> None:
        self.slot = slot

    def serve_until(self, is_done: Any, *_: Any, **__: Any) -> None:
        """Wait."""
        while not is_done():
            pass


class Layer:
    """One GPU's part.

    Args:
        rank: of it.
        shape: of the layer.
        regions: memory of all.
        determinism: order of sums.
    """

    def __init__(self, rank: int, shape: Shape, regions: dict[int, Regions], determinism: str) -> None:
        device, count = torch.device("cuda", rank), EXPERTS // len(regions)
        torch.manual_seed(rank)
        own = range(rank * count, rank * count + count)
        self.slabs = (
            noise(count, 2 * shape.inner, shape.hidden, device=device) * 0.02,
            noise(count, shape.hidden, shape.inner, device=device) * 0.02,
        )
        self.x_TH = noise(TOKENS, shape.hidden, device=device)
        self.dout_TH = noise(TOKENS, shape.hidden, device=device)
        self.ids_TK = torch.rand(TOKENS, EXPERTS, device=device).topk(TOP_K).indices.int()
        self.weights_TK = torch.rand(TOKENS, TOP_K, device=device)
        slab: Any = SimpleNamespace(rows={e: i for i, e in enumerate(own)}, compute=self.slabs)
        moe = SimpleNamespace(top_k=TOP_K, num_experts=EXPERTS)
        held: Any = SimpleNamespace(
            slabs=[slab], computed={(0, e) for e in own}, config=SimpleNamespace(moe=moe)
        )
        dense: Any = SimpleNamespace(ops=TRITON, sum=SimpleNamespace(determinism=determinism), device=device)
        self.slots = tuple(regions)
        mailbox: Any = Mailbox(rank)
        link = DeviceLink(mailbox, print, LIMIT_S, self.slots, (peer.new_state(device), peer.new_end(device)))
        holders = tuple((e // count,) for e in range(EXPERTS))
        plan: Any = SimpleNamespace(expert_primaries=self.slots, experts=(holders,))
        self.exchange = TokenExchange(
            plan, dense, held, Table(slots=self.slots, regions=regions), rank, link, Meter(link, nothing)
        )

    def forward(self) -> Tensor:
        """Tokens out, rows back."""
        self.exchange.send(0, self.x_TH, (self.ids_TK, self.weights_TK))
        self.exchange.forward(0, self.slots, TOKENS, keep=True)
        return self.exchange.returned(0, TOKENS, self.weights_TK)

    def run(self) -> None:
        """Forward and backward."""
        self.forward()
        self.exchange.send(0, self.dout_TH, None)
        self.exchange.backward(0, self.slots, TOKENS)
        self.exchange.returned(0, TOKENS, None)
        self.exchange.take_gradients()
        self.exchange.meter.forget()


class Alone:
    """All experts on one GPU."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.x_TH = noise(TOKENS, shape.hidden, device=device).requires_grad_()
        self.ids_TK = torch.rand(TOKENS, EXPERTS, device=device).topk(TOP_K).indices
        self.weights_TK = torch.rand(TOKENS, TOP_K, device=device).requires_grad_()
        self.slabs = [
            (noise(EXPERTS, *each, device=device) * 0.02).requires_grad_()
            for each in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
        ]
        self.dout_TH = noise(TOKENS, shape.hidden, device=device)

    def run(self) -> None:
        """Forward and backward."""
        out = TRITON.experts(self.x_TH, self.ids_TK, self.weights_TK, *self.slabs)
        torch.autograd.grad(out, [self.x_TH, self.weights_TK, *self.slabs], self.dout_TH)


def timed(run: Any, barrier: Any) -> tuple[float, float]:
    """Median milliseconds of the device, and of the host until it has launched everything."""
    for _ in range(3):
        run()
    times, launches = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        barrier()
        begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = time.perf_counter()
        begin.record()
        run()
        stop.record()
        launches.append((time.perf_counter() - started) * 1e3)
        stop.synchronize()
        times.append(begin.elapsed_time(stop))
    return statistics.median(times), statistics.median(launches)


def puts(layer: Layer, barrier: Any) -> str:
    """Bytes per second to the other GPUs by how many programs store, all GPUs at once."""
    exchange, found = layer.exchange, []
    regions = [exchange.table.regions[s].x_STH for s in layer.slots if s != exchange.me]
    table = peer.table_of([x[exchange.me] for x in regions], layer.x_TH.device)
    state = peer.new_state(layer.x_TH.device)
    usual = peer.BESIDE_PROGRAMS
    for programs in (8, 16, 32, 64, 0):
        peer.BESIDE_PROGRAMS = programs or usual

        def put(beside: bool = programs > 0) -> None:
            peer.put_all(layer.x_TH, table, state, beside=beside)

        took, _ = timed(put, barrier)
        rate = len(regions) * layer.x_TH.numel() * 2 / took / 1e6
        found.append(f"{programs or peer.MOST_PROGRAMS}: {rate:.0f}")
    peer.BESIDE_PROGRAMS = usual
    return "  GB/s of tokens out, by programs: " + ", ".join(found)


def profiled(run: Any) -> str:
    """The kernels that take the most time of a pass, in microseconds each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
    names = (row.key.split("(")[0].replace("void ", "").replace("at::native::", "")[:44] for row in rows)
    return "\n".join(
        f"    {row.self_device_time_total / 3:8.0f} us {row.count / 3:5.1f}x {name}"
        for row, name in zip(rows, names)
    )


def run(rank: int, gpus: int, handles: Any, barrier: Any, is_profiled: bool) -> None:
    """One process: open the memory of all, then time every model and order."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    widest = max(shape.hidden for shape in SHAPES)
    buffer = Buffer(_sizes(gpus, widest).num_bytes, device)
    torch.cuda.synchronize()
    for other in range(gpus):
        handles[rank].put(buffer.handle)
        # Switches peer access on, where a process sees all GPUs.
        torch.zeros(1, device=f"cuda:{other}").to(device)
    memory = {
        other: buffer.bytes if other == rank else open_buffer(handles[other].get(), device, other)
        for other in range(gpus)
    }
    for shape in SHAPES:
        lines = []
        if rank == 0:
            alone, launch = timed(Alone(shape, device).run, lambda: None)
            lines.append(f"{shape.name}: one GPU {alone:.2f} ms (launches {launch:.2f})")
        for determinism in ("fast", "bitwise"):
            for is_counted in (True, False):
                barrier.wait()
                regions = {slot: _sizes(gpus, shape.hidden).cut(bytes_) for slot, bytes_ in memory.items()}
                regions[rank].flags_S.zero_()
                torch.cuda.synchronize()
                barrier.wait()
                layer = Layer(rank, shape, regions, determinism)
                layer.exchange.counts_rows = is_counted
                took, launch = timed(layer.run, barrier.wait)
                counts = "counted" if is_counted else "room for all"
                if rank == 0:
                    ratio = f"{took / alone:.2f} of one GPU"
                    lines.append(f"  {determinism}, {counts}: {took:.2f} ms, {ratio}, launches {launch:.2f}")
                if determinism == "fast" and not is_counted:
                    line = puts(layer, barrier.wait)
                    lines += [line] if rank == 0 else []
                if is_profiled:
                    barrier.wait()
                    table = profiled(layer.run)
                    lines += [table] if rank == 0 else []
                del layer
        if lines:
            print("\n".join(lines), flush=True)


def _sizes(gpus: int, hidden: int) -> Sizes:
    small = {"nodes": 1, "dense": 1, "dense_slice": 1, "shares": 1, "returned": max(TOP_K, gpus)}
    return Sizes(slots=gpus, tokens=TOKENS, top_k=TOP_K, hidden=hidden, dtype=torch.bfloat16, **small)


def main() -> int:
    """Time all models on the first GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.gpus} GPUs"
    print(f"{title}, {TOKENS} tokens a GPU, top {TOP_K} of {EXPERTS}, bf16, forward and backward", flush=True)
    context = mp.get_context("spawn")
    handles = [context.Queue() for _ in range(options.gpus)]
    barrier = context.Barrier(options.gpus, timeout=LIMIT_S)
    arguments = options.gpus, handles, barrier, options.profile
    sides = [context.Process(target=run, args=(rank, *arguments)) for rank in range(options.gpus)]
    for side in sides:
        side.start()
    for side in sides:
        side.join(3 * LIMIT_S)
        if side.is_alive():
            side.kill()
    return max(abs(side.exitcode or 0) for side in sides)


if __name__ == "__main__":
    raise SystemExit(main())
