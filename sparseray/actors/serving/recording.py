"""CUDA graphs of what a call launches: one, or several where the host has something to do between them.

A graph is launched as one, so nothing that the host does can come in the middle of it. What is cut is recorded in one
pool of memory: tensors that a part leaves to the next one stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sparseray.kernels.capture import capturing


def nothing() -> None:
    """Do nothing."""


def recorded(
    run: Callable[[Callable[[], None]], Tensor], pool: Any
) -> tuple[list[torch.cuda.CUDAGraph], Tensor]:
    """Graphs of what runs, and the tensor that is there when they were replayed in order.

    Args:
        run: without a wait for the device; called some times first. It is given what ends a graph and begins the next.
        pool: of memory, which graphs share that run one after another.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(nothing)
    torch.cuda.current_stream().wait_stream(stream)
    graphs: list[torch.cuda.CUDAGraph] = []
    with ExitStack() as recording:

        def cut() -> None:
            recording.close()
            graphs.append(torch.cuda.CUDAGraph())
            recording.enter_context(capturing(graphs[-1], pool=pool))

        cut()
        found = run(cut)
    return graphs, found


def captured(run: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """One graph of what runs, and the tensor that a replay fills.

    Args:
        run, pool: as of `recorded`.
    """
    (graph,), found = recorded(lambda _: run(), pool)
    return graph, found
