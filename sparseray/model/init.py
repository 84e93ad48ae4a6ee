"""Initial weights by logical name: any holder makes any tensor alone, and all holders make the same.

The generator of a tensor is seeded from the model's seed and the tensor's name, so neither the order of
construction nor the number of workers matters.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from sparseray.model.config import ModelConfig

EXPERT_PARTS = ("gate", "up", "down")
MOST_THREADS = 16
_T = TypeVar("_T")
_rooms = threading.local()


def initial_tensor(
    name: str, shape: Sequence[int], *, seed: int, std: float, room: Tensor | None = None
) -> Tensor:
    """Draw a tensor from N(0, std^2).

    Args:
        name: logical name of the tensor.
        shape: its shape.
        seed: of the model.
        std: standard deviation.
        room: contiguous fp32 on the CPU that the values are drawn in; None for new memory.

    Returns:
        fp32 on the CPU; equal wherever it is made.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(tuple(shape), dtype=torch.float32) if room is None else room
    return values.normal_(generator=generator).mul_(std)


def room_for(target: Tensor) -> Tensor:
    """Where values are drawn that go to `target`: it itself where it can be, or memory that this thread's next ones reuse.

    New memory for each would cost as much as drawing, and from what is pinned a device copies several times as fast.
    """
    if target.device.type == "cpu" and target.dtype == torch.float32 and target.is_contiguous():
        return target
    count = target.numel()
    room: Tensor | None = getattr(_rooms, "room", None)
    if room is None or room.numel() < count:
        room = _rooms.room = torch.empty(count, dtype=torch.float32, pin_memory=target.is_cuda)
    return room[:count].view(target.shape)


def draw_each(draw: Callable[[_T], object], things: Sequence[_T]) -> None:
    """Draw the values of many things, in threads: each draw has a generator of its own and lets others run.

    Args:
        draw: draws one and puts it where it belongs; called without gradients.
        things: whatever has values.
    """
    without_gradients = torch.no_grad()(draw)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "draw") as pool:
        list(pool.map(without_gradients, things))


def initial_dense(
    name: str, shape: Sequence[int], *, seed: int, std: float, room: Tensor | None = None
) -> Tensor:
    """Initial value of a parameter of `Transformer`: norms 1, biases and convolutions 0, the rest normal.

    Args:
        name, shape, seed, std: as of `initial_tensor`.
        room: as there, of what is drawn.
    """
    if name.endswith("norm.weight"):
        return torch.ones(tuple(shape))
    if name.endswith((".bias", "conv.weight")):
        return torch.zeros(tuple(shape))
    return initial_tensor(name, shape, seed=seed, std=std, room=room)


def expert_name(layer: int, expert: int, part: str) -> str:
    """Logical name of one matrix of one expert; part is gate, up or down."""
    return f"layers.{layer}.moe.experts.{expert}.{part}"


def expert_shape(config: ModelConfig, part: str) -> tuple[int, int]:
    """Shape of an expert's gate, up ([I, H]) or down ([H, I])."""
    inner, hidden = config.moe.expert_dim, config.hidden
    return (hidden, inner) if part == "down" else (inner, hidden)


def initial_expert(config: ModelConfig, layer: int, expert: int, *, seed: int) -> dict[str, Tensor]:
    """Initial gate, up and down of one expert, fp32."""
    return {
        part: initial_tensor(
            expert_name(layer, expert, part), expert_shape(config, part), seed=seed, std=config.init_std
        )
        for part in EXPERT_PARTS
    }


def expert_views(layer: int, gate_up_E2IH: Tensor, down_EHI: Tensor) -> dict[str, Tensor]:
    """The logical tensors of a layer's experts as views of its slabs.

    Args:
        layer: 0-based model layer.
        gate_up_E2IH: gate rows first, then up rows; down_EHI: down projections.

    Returns:
        gate [I, H], up [I, H] and down [H, I] of every expert, by logical name.
    """
    found: dict[str, Tensor] = {}
    for expert in range(down_EHI.shape[0]):
        parts = (*gate_up_E2IH[expert].chunk(2), down_EHI[expert])
        found |= {expert_name(layer, expert, part): view for part, view in zip(EXPERT_PARTS, parts)}
    return found


def bucket_name(layer: int, bucket: int) -> str:
    """Logical name of one bucket of a layer's memory table."""
    return f"dse.{layer}.bucket.{bucket}"


def initial_bucket(config: ModelConfig, layer: int, bucket: int, rows: int, *, seed: int) -> Tensor:
    """Initial rows [rows, head_dim] of one bucket, fp32."""
    return initial_tensor(
        bucket_name(layer, bucket), (rows, config.dse.head_dim), seed=seed, std=config.init_std
    )
