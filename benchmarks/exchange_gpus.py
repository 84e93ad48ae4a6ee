"""Time of one MoE layer's dispatch and combine between two GPUs of one host, without the experts: peer memory alone.

Two processes, each with a GPU, open each other's memory (actors/state/shared_buffer.py) and launch what the exchange of
training launches (actors/peers/token_exchange.py): tokens with their expert ids and weights go to both, a word says so, half of
the rows of each come back at their places, a word says so, and the rows are combined. Replayed from a CUDA graph; what came is
compared with what should have come. Prints a line for each size:

  PYTHONPATH=. python -m benchmarks.exchange_gpus
"""

import statistics
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from sparseray.actors.peers.regions import Regions, Sizes
from sparseray.actors.state.shared_buffer import Buffer, open_buffer
from sparseray.kernels import peer, peer_rows
from sparseray.kernels.triton_ops import TRITON

HIDDEN, TOP_K, WORD, LATER = 2048, 6, 1 << 32, 2 << 32
TOKENS = (8, 128, 4096, 32768)
REPEATS = 50
LIMIT_S = 60.0


class Side:
    """One GPU's half of the layer.

    Args:
        rank: 0 or 1.
        memory: own, and the peer's, cut alike.
        tokens: of each.
        state: of the slot, as in kernels/peer.py.
    """

    def __init__(self, rank: int, memory: tuple[Regions, Regions], tokens: int, state: Tensor) -> None:
        self.rank, (self.own, self.theirs), self.state = rank, memory, state
        device = state.device
        self.end = peer.new_end(device)
        self.x_TH = tokens_of(rank, tokens, device)
        # Every other (token, k) has its expert at the peer.
        self.ids_TK = (torch.arange(tokens * TOP_K, device=device).view(tokens, TOP_K) % 2).int()
        self.weights_TK = torch.ones(tokens, TOP_K, device=device)
        # Rows that are computed here, of both sources.
        rows = torch.arange(2 * tokens * TOP_K, device=device, dtype=torch.int32)
        self.order_R = rows.view(-1, 2)[:, rank].contiguous()
        self.held = torch.tensor(len(self.order_R), dtype=torch.int32, device=device)
        # What stands for the experts' outputs: rows that say whose they are.
        self.y_RH = torch.full((len(self.order_R), HIDDEN), float(1 + rank), device=device).bfloat16()
        both = (self.own, self.theirs) if rank == 0 else (self.theirs, self.own)
        sent = (self.x_TH, "x_STH"), (self.ids_TK, "ids_STK"), (self.weights_TK, "weights_STK")
        self.sent = [(t, peer.table_of([getattr(r, name)[rank] for r in both], device)) for t, name in sent]
        self.rows = peer.table_of([regions.rows_RH for regions in both], device)
        self.flags = peer.table_of([self.theirs.flags_S], device)

    def _signal(self, count: int) -> None:
        peer.signal_all(self.flags, self.rank, WORD + count, self.state)

    def _wait(self, count: int) -> None:
        peer.wait(self.own.flags_S, 1 << (1 - self.rank), WORD + count, LATER, self.state, self.end, LIMIT_S)

    def send(self) -> None:
        """Dispatch."""
        for numbers, table in self.sent:
            peer.put_all(numbers, table, self.state)
        self._signal(1)

    def answer(self) -> None:
        """Give back."""
        self._wait(1)
        span = self.ids_TK.numel()
        peer_rows.give_rows(self.y_RH, self.order_R, self.held, self.rows, span, HIDDEN, self.state)
        self._signal(2)

    def combine(self) -> Tensor:
        """Sum up what has come back."""
        self._wait(2)
        self.state[1] += 2
        T = len(self.x_TH)
        return TRITON.combine_slots(self.own.rows_RH[: T * TOP_K].view(T, TOP_K, HIDDEN), self.weights_TK)

    def layer(self) -> Tensor:
        """All of it."""
        self.send()
        self.answer()
        return self.combine()


def tokens_of(rank: int, tokens: int, device: torch.device) -> Tensor:
    """What a rank sends; both know it."""
    generator = torch.Generator(device).manual_seed(rank)
    return torch.randn(tokens, HIDDEN, generator=generator, device=device).bfloat16()


def sizes_of(tokens: int) -> Sizes:
    """Two slots' regions for so many tokens."""
    small = {"nodes": 1, "dense": 1, "dense_slice": 1, "shares": 1}
    return Sizes(slots=2, tokens=tokens, top_k=TOP_K, hidden=HIDDEN, dtype=torch.bfloat16, **small)


def run(rank: int, handles: Any, barrier: Any) -> None:
    """One process: open, then check and time every size."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    buffer = Buffer(sizes_of(max(TOKENS)).num_bytes, device)
    torch.cuda.synchronize()
    handles[rank].put(buffer.handle)
    # Switches peer access on, where a process sees both GPUs.
    torch.zeros(1, device=f"cuda:{1 - rank}").to(device)
    theirs = open_buffer(handles[1 - rank].get(), device, 1 - rank)
    state = peer.new_state(device)
    for tokens in TOKENS:
        sizes = sizes_of(tokens)
        side = Side(rank, (sizes.cut(buffer.bytes), sizes.cut(theirs)), tokens, state)
        measure(side, barrier)


def measure(side: Side, barrier: Any) -> None:
    """Check what comes, time replays, and let rank 0 print."""
    device, T = side.state.device, len(side.x_TH)
    torch.cuda.synchronize()
    barrier.wait()
    for _ in range(3):
        side.layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TH = side.layer()
    barrier.wait()
    times = []
    for _ in range(REPEATS):
        begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(begin.elapsed_time(stop) * 100)
    barrier.wait()
    is_right = (
        int(side.state[0]) == peer.OK
        and torch.equal(side.own.x_STH[1 - side.rank], tokens_of(1 - side.rank, T, device))
        and torch.equal(out_TH, torch.full_like(out_TH, 3 * TOP_K / 2))
    )
    sent, us = T * (HIDDEN * 2 + TOP_K * 8) + len(side.y_RH) // 2 * HIDDEN * 2, statistics.median(times)
    if side.rank == 0 or not is_right:
        verdict = "right" if is_right else f"WRONG (rank {side.rank}, state {side.state.tolist()})"
        size = f"{sent / 2**20:.2f} MiB a direction"
        print(f"{T:6} tokens: {us:8.1f} us, {sent / us / 1e3:6.1f} GB/s of {size}; {verdict}", flush=True)


def main() -> int:
    """Time all sizes on the first two GPUs."""
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, top {TOP_K} of width {HIDDEN}, bf16",
        flush=True,
    )
    context = mp.get_context("spawn")
    handles, barrier = [context.Queue(), context.Queue()], context.Barrier(2, timeout=LIMIT_S)
    sides = [context.Process(target=run, args=(rank, handles, barrier)) for rank in range(2)]
    for side in sides:
        side.start()
    for side in sides:
        side.join(2 * LIMIT_S)
        if side.is_alive():
            side.kill()
    return max(abs(side.exitcode or 0) for side in sides)


if __name__ == "__main__":
    raise SystemExit(main())
