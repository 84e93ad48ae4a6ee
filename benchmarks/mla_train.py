"""Latent attention in training on one GPU: torch's fused attentions at heads of 192 and 128, forward and backward.

One layer of 16 heads, causal, bf16. `padded` gives the values zeros up to 192 channels, which FlashAttention-2 needs; what
`Ops.attend` runs is last. Prints Markdown:

  PYTHONPATH=. python -m benchmarks.mla_train
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.moe import guarded, milliseconds, say
from sparseray.kernels.ops import ops_for

SHAPES = ((8, 4096, 16), (1, 16384, 16), (1, 4096, 128))
"""Sequences, tokens, heads."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True, enable_gqa: bool = False
) -> Tensor:
    """By one backend alone."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By FlashAttention-2 with wider values."""
    wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return by(SDPBackend.FLASH_ATTENTION, q, k, wide)[..., : v.shape[-1]]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the model runs."""
    attend = ops_for("auto", q.device).attend
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


WAYS: dict[str, Attend] = {
    "cuDNN": partial(by, SDPBackend.CUDNN_ATTENTION),
    "memory-efficient": partial(by, SDPBackend.EFFICIENT_ATTENTION),
    "padded": padded,
    "ours": ours,
}


def time_one(name: str, attend: Attend, shape: tuple[int, int, int]) -> None:
    """One line of the table."""
    B, T, heads = shape
    q, k = (
        torch.randn(B, T, heads, 192, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(2)
    )
    v = torch.randn(B, T, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    with torch.no_grad():
        forward = milliseconds(lambda: attend(q, k, v))
    out = attend(q, k, v)
    gradient = torch.randn_like(out)

    def both() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)

    whole = milliseconds(both)
    flop = B * T * T * heads * (192 + 128)
    say(
        f"| {B} x {T} | {heads} | {name} | {forward:.2f} | {flop / forward / 1e9:.0f} | {whole - forward:.2f} |"
        f" {2.5 * flop / (whole - forward) / 1e9:.0f} |"
    )


def main() -> None:
    """Every shape by every way."""
    say(f"# Latent attention in training: {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    say("| tokens | heads | by | forward ms | TFLOP/s | backward ms | TFLOP/s |")
    say("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for name, attend in WAYS.items():
            guarded(name, partial(time_one, name, attend, shape))


if __name__ == "__main__":
    main()
