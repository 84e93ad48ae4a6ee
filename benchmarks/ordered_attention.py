"""Full attention in training whose gradients come in one order: what it costs, by which kernels. On one GPU, bf16, causal.

`cuDNN` is what `fast` takes, and has no order; `FlashAttention in order` is what `bitwise` takes (kernels/attention/ordered.py); `ranges`
are NSA's kernels of keys that are all read, as where a sequence has no more blocks than are selected. Each is asked twice for the same
gradients. Prints Markdown:

  PYTHONPATH=. python -m benchmarks.ordered_attention
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.mla_train import Attend, by
from benchmarks.moe import guarded, milliseconds, say
from sparseray.kernels.attention.ordered import ordered_attention
from sparseray.kernels.nsa.geometry import KEYS, uniform
from sparseray.kernels.nsa.range_backward import range_backward
from sparseray.kernels.nsa.range_forward import range_forward

SHAPES = (
    (8, 4096, 16, 16, 64, 64),
    (8, 4096, 16, 16, 128, 128),
    (8, 4096, 16, 4, 128, 128),
    (1, 32768, 16, 16, 64, 64),
    (8, 4096, 16, 16, 192, 128),
)
"""Sequences, tokens, query heads, key/value heads, and their sizes."""
ALL: dict[str, Any] = {"kind": KEYS, "block": 1, "stride": 1, "window": 0}


class Ranges(torch.autograd.Function):
    """Causal attention [B, T, heads, D] by NSA's kernels of a range of keys, of which every query sees all."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, T, scale = *q.shape[:2], q.shape[-1] ** -0.5
        geometry = uniform(B, T, 0, T, T, 0, 0, q.device)
        ctx.geometry, ctx.scale, ctx.shapes = geometry, scale, (q.shape, k.shape, v.shape)
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        out, lse = range_forward(q, k, v, geometry, scale=scale, **ALL)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.view(B, T, *out.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        do = grads[0].flatten(0, 1).contiguous()
        rows, dq = (do.float() * out.float()).sum(-1), torch.empty_like(q)
        dk, dv = range_backward(
            q, k, v, do, lse, rows, dq, ctx.geometry, scale=ctx.scale, add=False, **ALL
        )  # fmt: skip
        return tuple(x.view(shape) for x, shape in zip((dq, dk, dv), ctx.shapes))


def ranges(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `Ranges`."""
    out: Tensor = Ranges.apply(q, k, v)
    return out


def fused(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By one of torch's, with values as wide as the keys."""
    wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    heads = (x.transpose(1, 2) for x in (q, k, wide))
    return attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)[..., : v.shape[-1]]


WAYS: dict[str, Attend] = {
    "cuDNN": partial(fused, partial(by, SDPBackend.CUDNN_ATTENTION)),
    "FlashAttention in order": partial(fused, ordered_attention),
    "ranges": ranges,
}


def tensors(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys, values and the gradient of the output."""
    B, T, Q, G, D, V = shape
    torch.manual_seed(0)
    *inputs, dout = (
        torch.randn(B, T, *of, device=device, dtype=dtype) for of in ((Q, D), (G, D), (G, V), (Q, V))
    )
    return *(x.requires_grad_() for x in inputs), dout


def time_one(name: str, attend: Attend, shape: tuple[int, ...]) -> None:
    """One line of the table."""
    q, k, v, dout = tensors(shape, "cuda", torch.bfloat16)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), dout)

    first = both()
    same = all(all(map(torch.equal, first, both())) for _ in range(5))
    with torch.no_grad():
        forward = milliseconds(lambda: attend(q, k, v))
    backward = milliseconds(both) - forward
    B, T, Q, _, D, V = shape
    flop = B * T * T * Q * (D + V)
    say(
        f"| {B} x {T} | {Q} of {D}, {V}; {shape[3]} | {name} | {forward:.2f} | {flop / forward / 1e9:.0f} | {backward:.2f} |"
        f" {2.5 * flop / backward / 1e9:.0f} | {'the same' if same else 'others'} |"
    )


def main() -> None:
    """Every shape by every way."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    say(
        f"# Full attention in training, in one order: {torch.cuda.get_device_name()}, torch {torch.__version__}\n"
    )
    say("| tokens | heads; of keys | by | forward ms | TFLOP/s | backward ms | TFLOP/s | five times more |")
    say("|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for name, attend in WAYS.items():
            guarded(f"{shape}, {name}", partial(time_one, name, attend, shape))


if __name__ == "__main__":
    main()
