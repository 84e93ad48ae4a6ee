"""What memory layers add to a training step on one GPU, piece by piece: on the device, and in the staging thread.

Tables of 10 GB (with moments) in host memory, 8 x 4096 tokens, two layers, hidden 1024; addresses are as skewed as
n-grams of text. Device times are medians of events, host times of the clock. One line each, ms for both layers. Without a
GPU the host's lines alone, with tables of a quarter. How much the staging thread holds up another one, which
launches kernels, is seen from a loop of small operations beside it:

  PYTHONPATH=. python -m benchmarks.memory_step
"""

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.state.row_block import LayerRows
from sparseray.actors.state.staged_memory import Addresses, StagedMemory, StagedStep
from sparseray.kernels.dse.fusion import memory_output
from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.dse.reference import memory_output as plain
from sparseray.kernels.ops import ops_for
from sparseray.model.config import DSEConfig
from sparseray.model.presets import preset

SECONDS = 1.0
SLEEP_CYCLES = 10_000_000
LAYERS, HEADS, ROWS, WIDTH, HIDDEN, SHAPE = 2, 8, 12_800_000, 64, 1024, (8, 4096)
REPEATS = 20
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    ROWS //= 4


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if HAS_GPU:
        torch.cuda.synchronize()


def on_device(name: str, call: Callable[[], object]) -> None:
    """Print the median time of a call on the device."""
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits until the host has launched all of it, so that a busy host does not count.
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    print(f"device  {name:52} {statistics.median(times[3:]):8.3f} ms", flush=True)


def on_host(name: str, call: Callable[[int], object]) -> None:
    """Print the median time of a call with rising numbers on the host, the device's work included."""
    times = []
    for number in range(8):
        synchronize()
        started = time.perf_counter()
        call(number)
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    print(f"host    {name:52} {statistics.median(times[2:]):8.3f} ms", flush=True)


def addresses(step: int) -> list[Addresses]:
    """Of one part: seven in ten read one of few rows."""
    rng = np.random.default_rng(step)
    found = {}
    for layer in range(LAYERS):
        shape = (SHAPE[0] * SHAPE[1], HEADS)
        frequent = (rng.random(shape) ** 2 * 30_000).astype(np.int64)
        drawn = np.where(rng.random(shape) < 0.7, frequent, rng.integers(0, ROWS, shape))
        scattered = drawn * 7_368_787 % ROWS
        found[layer] = torch.from_numpy(scattered)
    return [found]


def staging() -> None:
    """The staging thread's work, and what a step adds on the device."""
    device = torch.device("cuda" if HAS_GPU else "cpu")
    ops = ops_for("auto", device)
    dse = DSEConfig(layers=tuple(range(LAYERS)), head_dim=WIDTH, row_dtype="bfloat16")
    model = preset("tiny").__class__(**{**vars(preset("tiny")), "dse": dse})
    memory = StagedMemory(
        model, [ROWS] * LAYERS, seed=0, num_parts=1, betas=(0.9, 0.95), eps=1e-8, device=device, ops=ops,
        determinism="bitwise",
    )  # fmt: skip
    keys = [(layer, bucket) for layer in range(LAYERS) for bucket in range(dse.num_buckets)]
    started = time.perf_counter()
    memory.initialize(keys)
    memory.assign(keys, keys)
    print(f"host    tables drawn in {time.perf_counter() - started:.1f} s", flush=True)
    known = [addresses(step) for step in range(12)]
    on_host("stage a step: distinct, gather, send", lambda n: memory._stage(known.__getitem__, n))
    one, two = (memory._stage(known.__getitem__, n) for n in (0, 1))
    print(f"        distinct rows of a step: {one.num_rows:,} of {LAYERS * known[0][0][0].numel():,}")
    done = torch.cuda.current_stream().record_event() if HAS_GPU else None
    on_host("write a step back", lambda n: memory._write_back(one, done, n))
    beside(memory, known, one, done)
    if HAS_GPU:
        device_pieces(memory, one, two)
        steps(memory, known)


def beside(
    memory: StagedMemory, known: list[list[Addresses]], one: StagedStep, done: torch.cuda.Event | None
) -> None:
    """How long this thread sleeps, and how many small operations it makes, while another stages steps without end.

    A thread that has work sleeps only for the interpreter's lock; that it waits for a core does not count.
    """
    x = torch.zeros(1)

    def operations(work: Callable[[int], object] | None) -> tuple[float, float, float, int]:
        stop, rounds = threading.Event(), [0]

        def repeat() -> None:
            while work is not None and not stop.is_set():
                work(rounds[0])
                rounds[0] += 1

        thread = threading.Thread(target=repeat)
        thread.start()
        count, longest, begun, scheduled = 0, 0.0, time.perf_counter(), scheduled_s()
        last = begun
        while last < begun + SECONDS:
            x.add_(1)
            now = time.perf_counter()
            count, longest, last = count + 1, max(longest, now - last), now
        asleep = last - begun - (scheduled_s() - scheduled)
        done = rounds[0]
        stop.set()
        thread.join()
        return count, 1e3 * asleep, 1e3 * longest, done

    def both(n: int) -> None:
        memory._stage(known.__getitem__, n % len(known))
        memory._write_back(one, done, n)

    pairs = [(operations(None), operations(both)) for _ in range(5)]
    share = statistics.median(busy[0] / free[0] for free, busy in pairs)
    asleep, longest = (
        statistics.median(busy[i] / (busy[3] if i == 1 else 1) for _, busy in pairs) for i in (1, 2)
    )
    print(
        f"host    beside staging ({sum(busy[3] for _, busy in pairs) / 5 / SECONDS:.0f} steps/s) another thread waits "
        f"{asleep:.2f} ms a step for the interpreter, at most {longest:.1f} ms, and makes {share:.3f} of its operations",
        flush=True,
    )


def scheduled_s() -> float:
    """Seconds for which this thread ran or waited for a core."""
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except OSError:
        return time.thread_time()
    return (int(ran) + int(waited)) / 1e9


def device_pieces(memory: StagedMemory, one: StagedStep, two: StagedStep) -> None:
    """Rows of tokens, sums, norms, update and refresh."""
    grads = [torch.randn(SHAPE[0] * SHAPE[1] * HEADS, WIDTH, device="cuda").bfloat16() for _ in range(LAYERS)]

    def both(function: Callable[[LayerRows, Tensor], object]) -> Callable[[], object]:
        return lambda: [function(rows, grad) for rows, grad in zip(one.layers, grads)]

    ops = memory.ops
    on_device("rows of the tokens", both(lambda r, _: ops.take_rows(r.weight_UD, r.places[0])))
    on_device("sums of gradients", both(lambda r, g: ops.row_sums(g, r.orders[0], r.firsts[0])))
    sums = [ops.row_sums(g, r.orders[0], r.firsts[0]) for r, g in zip(one.layers, grads)]
    on_device("norms by bucket", lambda: [ops.range_norms(s, r.buckets_B1) for s, r in zip(sums, one.layers)])

    def update() -> None:
        for r, total in zip(one.layers, sums):
            ops.row_adam(*r.fields, r.ids_U, total, scale=1.0, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, seed=3)

    def refresh() -> None:
        for older, newer in zip(two.layers, one.layers):
            ops.take_newer(older.fields, older.ids_U, newer.fields, newer.ids_U)

    on_device("update", update)
    on_device("refresh", refresh)


def steps(memory: StagedMemory, known: list[list[Addresses]]) -> None:
    """Whole steps with nothing between them: what must fit beside a step of the model."""
    grads = [torch.randn(SHAPE[0] * SHAPE[1] * HEADS, WIDTH, device="cuda").bfloat16() for _ in range(LAYERS)]

    def step(number: int) -> None:
        memory.open_step(number, lambda n: known[n % len(known)])
        memory.add_row_gradients(0, grads)
        torch.cat(memory.norms_on_device()).tolist()
        memory.apply(lr=1e-3, scale=1.0)

    on_host("steps of the memory alone, one after another", step)
    memory.settle()


def fusion() -> None:
    """Gate and convolution, forward and backward, with our kernels and with plain operations; the projection."""
    B, T = SHAPE
    torch.manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    h, both, conv = new(B, T, HIDDEN), new(B, T, 2 * HIDDEN), new(HIDDEN, 4)
    norms = [new(HIDDEN) for _ in range(3)]
    starts = torch.rand(B, T, device="cuda") < 0.001
    learnt = Fusion(
        query_norm_C=norms[0], key_norm_C=norms[1], value_norm_C=norms[2], conv_CK=conv, dilation=3,
        gate_eps=1e-7, conv_eps=1e-5,
    )  # fmt: skip
    grad, found = torch.randn_like(h), []

    def plain_output(h: Tensor, both: Tensor, learnt: Fusion, *, document_starts_BT: Tensor) -> Tensor:
        key, value = both.chunk(2, -1)
        return plain(h, key, value, learnt, document_starts_BT=document_starts_BT)

    for name, function in (("kernels", memory_output), ("plain operations", plain_output)):

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            return function(h, both, learnt, document_starts_BT=starts)

        def whole(forward: Callable[[], Tensor] = forward) -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), [h, both, conv, *norms], grad)

        on_device(f"one layer's gate and convolution, {name}, forward", forward)
        on_device(f"one layer's gate and convolution, {name}, both ways", whole)
        found.append(whole())
    for mine, theirs in zip(*found):
        error = float((mine - theirs).float().norm() / theirs.float().norm())
        assert error < 2e-2, f"relative error {error:.2e}"
    x, weight = new(B * T, HEADS * WIDTH), new(2 * HIDDEN, HEADS * WIDTH)
    out = x @ weight.T
    on_device(
        "one layer's projection, both ways",
        lambda: torch.autograd.grad(x @ weight.T, [x, weight], out.detach()),
    )


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name() if HAS_GPU else 'no GPU'}, torch {torch.__version__}")
    if HAS_GPU:
        fusion()
    staging()
