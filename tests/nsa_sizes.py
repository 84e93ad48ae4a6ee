"""What the tests of the NSA kernels share: sizes, tiles small enough for tiny inputs, errors.

Without a GPU the kernels run in Triton's interpreter at tiny odd shapes; with one, the marked tests run at
real sizes in half precision.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter  # Must come before anything that imports Triton.
from torch import Tensor

from sparseray.kernels.nsa import inverse, tuning
from sparseray.kernels.settings import NSASizes

assert triton_interpreter
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
TINY = NSASizes(block=8, stride=4, select_block=16, num_selected=4, window=9)
TINY_SPARSE = replace(TINY, select_block=8, num_selected=3)
PAPER = NSASizes(block=32, stride=16, select_block=64, num_selected=16, window=512)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that tiny inputs cross their borders, in the interpreter only."""
    if HAS_GPU:
        return
    for name, launch in tuning.LAUNCH.items():
        small = {"rows": 16, "keys": 16, "chunk": 32, "part": 8, "piece": 4}
        if name == "range_dkdv":
            small |= {"split": 16, "programs": 64}
        monkeypatch.setitem(tuning.LAUNCH, name, {k: small.get(k, v) for k, v in launch.items()})
    monkeypatch.setattr(inverse, "PARTIAL_BYTES", 1 << 16)


def relative(found: Tensor, wanted: Tensor) -> float:
    if wanted.numel() == 0:
        return 0.0
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-30))
