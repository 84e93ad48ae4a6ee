"""`capturing`: what is launched goes into a CUDA graph, and nothing else that happens in the process ends the recording."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Record what this thread launches; other threads go on copying.

    Garbage in cycles waits until it is over: with another graph among it (an engine's that was thrown away, say) the driver
    is asked for something that a recording does not survive, in the midst of any launch.

    Args:
        graph: an empty one.
        options: of `torch.cuda.graph`.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            yield
    finally:
        if was_enabled:
            gc.enable()
