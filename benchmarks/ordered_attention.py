"""Full attention in training whose gradients come in one order: what it costs, by which kernels. On one GPU, bf16, causal.

`cuDNN` is what `fast` takes, and has no order; `ordered` is what `bitwise` takes (kernels/attention/ordered.py); `FlashAttention in order`
is torch's, told to keep one. Each is asked several times for the same gradients. Prints Markdown:

  PYTHONPATH=. python -m benchmarks.ordered_attention
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.mla_train import Attend, by
from benchmarks.moe import guarded, milliseconds, say
from sparseray.kernels.attention.ordered import ordered_attention

SHAPES = (
    (8, 4096, 16, 16, 64, 64),
    (8, 4096, 16, 16, 128, 128),
    (8, 4096, 16, 4, 128, 128),
    (1, 32768, 16, 16, 64, 64),
    (8, 4096, 16, 16, 192, 128),
)
"""Sequences, tokens, query heads, key/value heads, and their sizes."""


def fused(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By one of torch's, with values as wide as the keys."""
    wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    heads = (x.transpose(1, 2) for x in (q, k, wide))
    return attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)[..., : v.shape[-1]]


WAYS: dict[str, Attend] = {
    "cuDNN": partial(fused, partial(by, SDPBackend.CUDNN_ATTENTION)),
    "FlashAttention in order": partial(fused, partial(by, SDPBackend.FLASH_ATTENTION)),
    "ordered": ordered_attention,
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

    # Torch takes FlashAttention's order only while what has none is refused.
    torch.use_deterministic_algorithms(name != "cuDNN")

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
