"""Dense kernels of a training step against torch, in one run and one table.

`python -m benchmarks.dense [--out FOLDER]` needs a GPU of compute capability 9.0 and takes some three minutes. Shapes
are those of the 1.24 B model (hidden 1024, vocabulary 32768, 16 heads of 64, 8 x 4096 tokens) and of Moonlight's
layers. Bytes are the fewest that an operation must move; peers are timed in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks.dense_checks import check_rows
from benchmarks.dense_serving import decode_rows
from benchmarks.moe import make_layer, milliseconds
from sparseray.kernels.dense import reference
from sparseray.kernels.dense.adamw import adamw_step
from sparseray.kernels.dense.embedding import embedding_grad_
from sparseray.kernels.dense.head_loss import head_loss
from sparseray.kernels.dense.rms_norm import add_rms_norm
from sparseray.kernels.dense.rope import rope
from sparseray.kernels.dense.squared_norm import squared_norm
from sparseray.kernels.dense.swiglu import swiglu
from sparseray.kernels.moe.ffn import GradientSlabs, moe_ffn
from sparseray.kernels.moe.router import route_and_plan

TOKENS = 32768
Form = Callable[..., Any]
lines: list[str] = []


def say(line: str = "") -> None:
    print(line, flush=True)
    lines.append(line)


def guarded(name: str, part: Callable[[], None]) -> None:
    """Run one part; what fails stays in the table."""
    try:
        part()
    except Exception as error:
        say(f"\n{name} failed: {type(error).__name__}: {str(error)[:300]}\n")
    torch.cuda.empty_cache()


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def both_ways(form: Form, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward pass and of the backward pass."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outs = form(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.randn_like(out) for out in outs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    backward = milliseconds(lambda: torch.autograd.grad(outs, wanted, grads, retain_graph=True))
    return milliseconds(lambda: form(*leaves)), backward


def elementwise(name: str, forms: dict[str, Form], inputs: Sequence[Tensor], moved: tuple[int, int]) -> None:
    """A row: ours, and each peer's time over ours; `moved` bytes at least, forward and backward."""
    times = {title: both_ways(form, inputs) for title, form in forms.items()}
    ours = times.pop("ours")
    rates = " | ".join(f"{t * 1e3:.0f} | {b / t / 1e6:.0f}" for t, b in zip(ours, moved))
    ratios = "; ".join(f"{title} {t[0] / ours[0]:.2f}x / {t[1] / ours[1]:.2f}x" for title, t in times.items())
    say(f"| {name} | {rates} | {ratios} |")


def compiled(form: Form) -> Form:
    # Otherwise its backward pass may run only once.
    torch._functorch.config.donated_buffer = False
    return torch.compile(form, dynamic=False)


def heads() -> None:
    say("\n| head with loss, forward + backward: tokens, hidden, vocabulary | ms | TFLOP/s | peak GiB | torch ms |"
        " torch peak GiB | ratio |")  # fmt: skip
    say("|---|---|---|---|---|---|---|")
    for R, H, V in ((TOKENS, 1024, 32768), (TOKENS // 2, 2048, 131072)):
        hidden, weight = rand(R, H).requires_grad_(), (rand(V, H) * 0.02).requires_grad_()
        targets, weights = torch.randint(0, V, (R,), device="cuda"), torch.full((R,), 1 / R, device="cuda")

        def plain(hidden: Tensor = hidden, weight: Tensor = weight, targets: Tensor = targets) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight).float(), targets)

        def ours(
            hidden: Tensor = hidden,
            weight: Tensor = weight,
            targets: Tensor = targets,
            weights: Tensor = weights,
        ) -> Tensor:
            return head_loss(hidden, weight, targets, weights)

        found = []
        for form in (ours, plain):

            def both(form: Form = form, leaves: list[Tensor] = [hidden, weight]) -> None:  # noqa: B006
                torch.autograd.grad(form(), leaves)

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            both()
            peak = (torch.cuda.max_memory_allocated() - base) / 2**30
            found.append((milliseconds(both, 7), peak))
        (mine, peak), (theirs, their_peak) = found
        say(
            f"| {R}, {H}, {V} | {mine:.2f} | {6 * R * H * V / mine / 1e9:.0f} | {peak:.2f} | {theirs:.2f} |"
            f" {their_peak:.2f} | {theirs / mine:.2f}x |"
        )


def norms() -> None:
    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, 1e-6), total

    for R, H in ((TOKENS, 1024), (TOKENS, 2048), (64, 2048)):
        inputs = [rand(R, H), rand(R, H), rand(H)]
        forms: dict[str, Form] = {"ours": lambda x, r, w: add_rms_norm(x, r, w, 1e-6), "eager": plain}
        if (R, H) == (TOKENS, 1024):
            forms["compiled"] = compiled(plain)
        elementwise(f"residual + RMSNorm {R} x {H}", forms, inputs, (8 * R * H, 8 * R * H))


def rotary() -> None:
    for heads, width, start, half, is_interleaved in (
        ((16, 16, 16), 64, 0, 32, False), ((16, 16, 16), 128, 0, 64, False), ((16, 0, 0), 192, 128, 32, True),
    ):  # fmt: skip
        cos, sin = (torch.randn(4096, half, device="cuda") for _ in range(2))
        positions = torch.arange(TOKENS, device="cuda") % 4096
        fused, turned = rand(TOKENS, sum(heads), width), heads[0] + heads[1]
        options: dict[str, Any] = {"heads": heads, "start": start, "is_interleaved": is_interleaved}

        def ours(
            x: Tensor,
            positions: Tensor = positions,
            cos: Tensor = cos,
            sin: Tensor = sin,
            options: Any = options,
        ) -> Any:
            return tuple(part for part in rope(x, positions, cos, sin, **options) if part.shape[1])

        def plain(
            x: Tensor, positions: Tensor = positions, cos: Tensor = cos, sin: Tensor = sin, start: int = start,
            turned: int = turned, is_interleaved: bool = is_interleaved,
        ) -> Any:  # fmt: skip
            part = x[:, :turned, start:]
            part = reference.rope_reference(
                part, cos[positions], sin[positions], is_interleaved=is_interleaved
            )
            part = torch.cat([x[:, :turned, :start], part], dim=-1) if start else part
            return (part, x[:, turned:].contiguous()) if turned < x.shape[1] else part

        forms: dict[str, Form] = {"ours": ours, "eager": plain}
        if width == 64:
            forms["compiled"] = compiled(plain)
        pairing = "interleaved" if is_interleaved else "halves"
        elementwise(
            f"rotary {heads} heads of {width}, {2 * half} channels, {pairing}",
            forms,
            [fused],
            (4 * fused.numel(),) * 2,
        )


def gated() -> None:
    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    for I in (512, 2816, 11264):
        forms: dict[str, Form] = {"ours": swiglu, "eager": plain}
        if I == 2816:
            forms["compiled"] = compiled(plain)
        elementwise(f"SwiGLU {TOKENS} x {I}", forms, [rand(TOKENS, 2 * I)], (6 * TOKENS * I, 10 * TOKENS * I))


def elementwise_operations() -> None:
    say("\n| operation | forward us | GB/s | backward us | GB/s | peers over ours, forward / backward |")
    say("|---|---|---|---|---|---|")
    for part in (norms, rotary, gated):
        guarded(part.__name__, part)


def optimizer() -> None:
    say("\n| optimizer, 268 M weights in four slabs | ms | GB/s | peer | peer ms | ratio |")
    say("|---|---|---|---|---|---|")
    shape, count = (64, 1024, 1024), 4
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    parameters = [torch.nn.Parameter(rand(*shape, dtype=torch.float32)) for _ in range(count)]
    copies = [p.detach().bfloat16() for p in parameters]
    for p in parameters:
        p.grad = rand(*shape, dtype=torch.float32)
    fused = torch.optim.AdamW(parameters, fused=True, **options)

    def theirs() -> None:
        fused.step()
        torch._foreach_copy_(copies, [p.detach() for p in parameters])

    their_ms, scale = milliseconds(theirs, 7), torch.ones((), device="cuda")
    fused.state.clear()
    for moments, gradient in ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2):
        states = [[torch.zeros(shape, dtype=moments, device="cuda") for _ in range(2)] for _ in range(count)]
        grads = [p.grad.to(gradient) for p in parameters if p.grad is not None]

        def ours(states: Any = states, grads: list[Tensor] = grads) -> None:
            for p, copy, state, grad in zip(parameters, copies, states, grads):
                adamw_step(p.detach(), state[0], state[1], grad, copy=copy, scale=scale, step=3, **options)

        ms = milliseconds(ours, 7)
        moved = count * parameters[0].numel() * (8 + 2 + 4 * moments.itemsize + gradient.itemsize)
        say(f"| AdamW with bf16 copy, moments {str(moments)[6:]}, gradient {str(gradient)[6:]} | {ms:.2f} |"
            f" {moved / ms / 1e6:.0f} | torch fused, all fp32, then copied | {their_ms:.2f} | {their_ms / ms:.2f}x |")  # fmt: skip
        norm = milliseconds(partial(squared_norm, grads))
        peer = milliseconds(partial(torch.nn.utils.get_total_norm, grads))
        moved = count * grads[0].numel() * gradient.itemsize
        say(f"| squared norm, {str(gradient)[6:]} | {norm:.2f} | {moved / norm / 1e6:.0f} |"
            f" torch get_total_norm | {peer:.2f} | {peer / norm:.2f}x |")  # fmt: skip


def embeddings() -> None:
    say(
        "\n| gradient of an embedding, Zipf ids: tokens, rows, hidden | us | torch's backward us | index_add_ (atomics) us |"
    )
    say("|---|---|---|---|")
    for R, V, H in ((TOKENS, 32768, 1024), (TOKENS, 131072, 2048)):
        chance = 1.0 / torch.arange(1, V + 1, device="cuda")
        ids, grads = torch.multinomial(chance, R, replacement=True), rand(R, H)
        slab = torch.zeros(V, H, device="cuda")
        wide = grads.float()
        times = [
            milliseconds(lambda: embedding_grad_(slab, ids, grads, accumulate=True)),  # noqa: B023
            milliseconds(lambda: torch.ops.aten.embedding_dense_backward(grads, ids, V, -1, False)),  # noqa: B023
            milliseconds(lambda: slab.index_add_(0, ids, wide)),  # noqa: B023
        ]
        say(f"| {R}, {V}, {H} | " + " | ".join(f"{t * 1e3:.0f}" for t in times) + " |")


def expert_slabs() -> None:
    say("\n| expert layer, forward + backward: tokens, experts, top-k, hidden, inter | bf16 gradients ms | then added to"
        " fp32 ms | into fp32 slabs ms | TFLOP/s | ratio |")  # fmt: skip
    say("|---|---|---|---|---|---|")
    for T, E, K, H, I in (
        (TOKENS, 64, 6, 1024, 512),
        (TOKENS, 64, 6, 2048, 1408),
        (16384, 256, 8, 2048, 768),
    ):
        x, logits, bias, up, down = make_layer(T, E, I, "balanced", hidden=H)
        ids, weights, _, plan = route_and_plan(logits.detach(), top_k=K, bias_E=bias)
        dy, wide = torch.randn_like(x), [torch.zeros_like(w, dtype=torch.float32) for w in (up, down)]
        slabs = GradientSlabs(gate_up_E2IH=wide[0], down_EHI=wide[1])
        weights, frozen = weights.detach(), (up.detach(), down.detach())
        case = (x, ids, weights, plan, dy)

        def plain(case: Any = case, up: Tensor = up, down: Tensor = down) -> Any:
            x, ids, weights, plan, dy = case
            return torch.autograd.grad(moe_ffn(x, ids, weights, up, down, plan=plan), [x, up, down], dy)

        def added(wide: list[Tensor] = wide, plain: Form = plain) -> None:
            for total, grad in zip(wide, plain()[1:]):
                total.add_(grad)

        def direct(case: Any = case, frozen: Any = frozen, slabs: GradientSlabs = slabs) -> None:
            x, ids, weights, plan, dy = case
            y = moe_ffn(x, ids, weights, frozen[0], frozen[1], plan=plan, slabs=slabs)
            torch.autograd.grad(y, x, dy)

        a, b, c = (milliseconds(form, 7) for form in (plain, added, direct))
        rate = 18 * T * K * H * I / c / 1e9
        say(f"| {T}, {E}, {K}, {H}, {I} | {a:.2f} | {b:.2f} | {c:.2f} | {rate:.0f} | {b / c:.2f}x |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--parts", nargs="+", help="names of parts; all by default")
    arguments = parser.parse_args()
    start, device = time.perf_counter(), torch.cuda.get_device_name()
    torch.manual_seed(0)
    say(
        f"# Dense kernels on {device}: torch {torch.__version__}, triton {triton.__version__}, {date.today()}\n"
    )
    sections: dict[str, Callable[[], None]] = {
        "checks": lambda: say("\n".join(check_rows())),
        "heads": heads,
        "elementwise": elementwise_operations,
        "optimizer": optimizer,
        "embeddings": embeddings,
        "experts": expert_slabs,
        "decode": lambda: say("\n".join(decode_rows())),
    }
    for name in arguments.parts or sections:
        guarded(name, sections[name])
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    say(f"\nWhole run: {time.perf_counter() - start:.0f} s.")
    gpu = next((word for word in device.lower().split() if word.startswith(("h1", "h2", "b2"))), "gpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"dense_{gpu}_{date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
