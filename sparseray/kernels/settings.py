"""What a caller of an operation chooses, as plain values: NSA's sizes, the routers' names, the kind of kernels.

Imports neither torch nor Triton, so that a command can check a configuration before it loads either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparseray.errors import ConfigError

Kernels = Literal["auto", "reference", "triton"]
"""Values of the key `kernels` of a run: see `ops.ops_for`."""

ROUTERS = ("v3", "v2", "gshard", "switch")
"""DeepSeek-V3's sigmoid with a selection bias, DeepSeek-V2's softmax, GShard's top-2, Switch's top-1."""


def num_compressed(length: int, block: int, stride: int) -> int:
    """Number of complete compression blocks in a sequence of `length` tokens."""
    return max(0, (length - block) // stride + 1)


@dataclass(frozen=True, kw_only=True)
class NSASizes:
    """Sizes of native sparse attention, all in tokens or blocks; every operation of NSA takes this one value.

    Args:
        block: tokens per compression block, l.
        stride: tokens between the starts of neighbouring compression blocks, d; divides both block sizes.
        select_block: tokens per selection block, l', at least `block`.
        num_selected: selected blocks per query, n, the forced ones included.
        window: tokens of the sliding window, the query's own included.
        num_initial: first blocks that are always selected.
        num_local: blocks, ending with the query's own, that are always selected.

    Raises:
        ConfigError: sizes for which the paper's equations are not defined.

    Source: arXiv 2502.11089 sections 3.3 and 4.1.
    """

    block: int
    stride: int
    select_block: int
    num_selected: int
    window: int
    num_initial: int = 1
    num_local: int = 2

    def __post_init__(self) -> None:
        if min(self.block, self.stride, self.select_block, self.window) < 1:
            raise ConfigError(
                f"nsa.block={self.block}, nsa.stride={self.stride}, nsa.select_block={self.select_block} and"
                f" nsa.window={self.window} must be at least 1"
            )
        if min(self.num_initial, self.num_local) < 0:
            raise ConfigError(
                f"nsa.num_initial={self.num_initial} and nsa.num_local={self.num_local} must not be negative"
            )
        if self.block % self.stride or self.select_block % self.stride or self.block > self.select_block:
            raise ConfigError(
                f"nsa.stride={self.stride} must divide nsa.block={self.block} and nsa.select_block="
                f"{self.select_block}, and block must not exceed select_block; try block=32, stride=16,"
                " select_block=64"
            )
        if self.num_selected < max(1, self.num_initial + self.num_local):
            raise ConfigError(
                f"nsa.num_selected={self.num_selected} is less than num_initial + num_local ="
                f" {self.num_initial + self.num_local}, which are always selected; raise num_selected"
            )

    def num_compressed(self, length: int) -> int:
        """Compressed tokens of a sequence of `length` tokens."""
        return num_compressed(length, self.block, self.stride)


NSA_CHANNELS, NSA_VALUES, NSA_GROUP = 192, 128, 64
"""Of a head at most; of a value head beside wider ones; query heads of a key/value head. Beyond them a program of the NSA
kernels does not fit into a multiprocessor's shared memory (tests/model_compile.py)."""
NSA_BLOCK, NARROW = 128, 64
"""Tokens of a selection block beside heads of more channels than `NARROW`, for the same reason."""


def nsa_complaint(heads: tuple[int, int], widths: tuple[int, int], select_block: int) -> str:
    """What of a layer's sizes the kernels of NSA do not take, with what to set instead; empty where they take all.

    Args:
        heads: query heads, and key/value heads.
        widths: channels of a head's keys, and of its values.
        select_block: tokens of a selection block.
    """
    group, widest = heads[0] // heads[1], max(widths)
    if widest > NSA_CHANNELS:
        names = zip(("model.head_dim", "model.v_head_dim"), widths)
        cure = " and ".join(f"{name}={NSA_VALUES}" for name, width in names if width > NSA_VALUES)
        return f"heads of at most {NSA_CHANNELS} channels, not {widest}; set {cure}"
    if min(widths) > NSA_VALUES:
        return f"values of at most {NSA_VALUES} channels beside heads of {widths[0]}; set model.v_head_dim={NSA_VALUES}"
    if group > NSA_GROUP:
        fewest = next(n for n in range(-(-heads[0] // NSA_GROUP), heads[0] + 1) if heads[0] % n == 0)
        return f"at most {NSA_GROUP} query heads for a key/value head, not {group}; set model.num_kv_heads={fewest}"
    if select_block > NSA_BLOCK and widest > NARROW:
        return (
            f"selection blocks of at most {NSA_BLOCK} tokens with heads of {widest} channels, not {select_block}; set"
            f" model.nsa.select_block={NSA_BLOCK}"
        )
    return ""


ROW_BLOCK = 128
"""Rows go through a CPU's matrix products in blocks of at most so many, so a row's bits do not depend on its
company: MKL sums in another order below 16 rows and above some 130 (seen at inner sizes from 704 up)."""

ROW_PADDING = 32
"""Two vectors of 16 floats, what one turn of torch's widest elementwise loop takes; divides `ROW_BLOCK`."""


def padded(rows: int) -> int:
    """Rows after padding to a multiple of `ROW_PADDING`."""
    return -(-rows // ROW_PADDING) * ROW_PADDING
