"""Compile every kernel that a model needs, in training and in serving, for compute capability 9.0 without a GPU.

Run by a test in a process of its own, as Triton's interpreter replaces the compiler: `python model_compile.py [NAME ...]`. The
model runs on a CPU in bf16, with tensors of zeros, and every launch compiles its kernel instead. Prints a line for each that
does not compile, or takes more shared memory than a multiprocessor has, and at last how many there were.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dense_compile import kind
from serving_parts import make_tokenizer
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.prompt_graphs import PromptGraph
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.actors.state.dense_slab import computes_in_fp32
from sparseray.kernels import paged_triton_ops, triton_ops
from sparseray.kernels.moe import ffn
from sparseray.kernels.triton_ops import TRITON
from sparseray.model.attention import attention_of
from sparseray.model.config import DSEConfig, MLAConfig, ModelConfig, MoEConfig, NSAConfig
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"attention": ("full", "nsa")},
    "heads of 80": {"attention": ("full", "nsa"), "head_dim": 80},
    "heads of 8": {"attention": ("full", "nsa"), "head_dim": 8},
    "heads of 192 and 128": {"attention": ("full", "nsa"), "head_dim": 192, "v_head_dim": 128},
    "heads of 128 and 192": {"attention": ("full", "nsa"), "head_dim": 128, "v_head_dim": 192},
    "heads of 256": {"head_dim": 256},
    "a key for each head": {"attention": ("nsa",), "num_kv_heads": 4, "head_dim": 48, "v_head_dim": 40},
    "three heads a group": {"attention": ("full", "nsa"), "num_heads": 6, "num_kv_heads": 2},
    "64 heads a group": {"attention": ("full", "nsa"), "num_heads": 64, "num_kv_heads": 1, "head_dim": 128},
    "blocks of 128": {
        "attention": ("nsa",),
        "head_dim": 192,
        "v_head_dim": 128,
        "nsa": NSAConfig(block=32, stride=16, select_block=128, num_selected=3, window=128),
    },
    "blocks of 512": {
        "attention": ("nsa",),
        "head_dim": 64,
        "nsa": NSAConfig(block=32, stride=16, select_block=512, num_selected=3, window=128),
    },
    "blocks of 48": {
        "attention": ("nsa",),
        "nsa": NSAConfig(block=24, stride=12, select_block=48, num_selected=4, window=100),
    },
    "hidden 100, vocabulary 321": {"hidden": 100, "vocab_size": 321},
    "experts of 50": {"moe": MoEConfig(num_experts=6, top_k=3, expert_dim=50)},
    "384 experts": {"moe": MoEConfig(num_experts=384, top_k=8, expert_dim=32)},
    "rows of 20": {"dse": DSEConfig(layers=(1,), rows_per_head=97, head_dim=20, num_buckets=4)},
    "latents of 40": {
        "attention": ("mla",),
        "mla": MLAConfig(
            q_lora_rank=24, kv_lora_rank=40, qk_rope_head_dim=10, qk_nope_head_dim=20, v_head_dim=20
        ),
    },
}
"""Sizes that are let through (platform/kernels_fit.py) and are none of those that the kernels were tuned for."""
SHARED_BYTES = 227 << 10
"""Of one multiprocessor of compute capability 9.0, for one program."""


class Compiler:
    """Stands in for `launch_kernel`."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, ...], str] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        constants = {name: value for name, value in named.items() if name in kernel.arg_names}
        signature = {name: kind(arg) for name, arg in zip(kernel.arg_names, args)}
        signature |= dict.fromkeys(constants, "constexpr")
        constants |= {n: a for n, a in zip(kernel.arg_names, args) if signature[n] == "constexpr"}
        aligned = [["tt.divisibility", 16]]
        attrs = {
            (i,): aligned
            for i, arg in enumerate(args)
            if isinstance(arg, Tensor) or (isinstance(arg, int) and arg % 16 == 0)
        }
        key = (kernel.fn.__name__, *map(str, (signature, constants, attrs, options)))
        if key in self.seen:
            return
        places = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
        try:
            source = ASTSource(kernel, signature, places, attrs)
            shared = compile_source(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared
            said = f"{shared} bytes of shared memory" if shared > SHARED_BYTES else ""
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[-400:]
        self.seen[key] = said
        if said:
            print(f"{key[0]}: {said}", flush=True)


def stand_in(compiler: Compiler) -> None:
    """Have every kernel of the operations compiled, and nothing waits for a GPU."""

    def zeros(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments, **options: make(*arguments, **options).zero_()

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (Tensor, "new_empty"),
        (torch, "empty_strided"),
    ):
        setattr(owner, name, zeros(getattr(owner, name)))

    def can_copy(x: Tensor) -> bool:
        return x.element_size() == 2 and x.shape[0] > 0 and x.shape[1] * x.shape[2] % 8 == 0

    patched = {
        "launch_kernel": compiler,
        "can_copy": can_copy,
        "default_config": lambda x: ffn.HOPPER if x.element_size() == 2 else ffn.SMALL,
    }
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("sparseray.kernels"):
            for name, new in patched.items():
                if hasattr(module, name):
                    setattr(module, name, new)
    for owner in (triton_ops, paged_triton_ops):
        owner.check = lambda what, *tensors: None


def model_of(
    dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tuple[Transformer, LocalExperts, LocalMemory | None]:
    """A model with the kernels; changes are of its configuration."""
    tokenizer = make_tokenizer()
    config = ModelConfig(
        **{"vocab_size": 320, "hidden": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "max_seq_len": 2048, **changes}
    )  # fmt: skip
    layout = None
    if config.dse.layers:
        layout = DSELayout.build(config.dse, tokenizer, vocab_size=config.vocab_size)
    model, experts = Transformer(config, layout, ops=TRITON), LocalExperts(config, ops=TRITON)
    for module in (model, experts):
        for name, parameter in module.named_parameters():
            if not computes_in_fp32(name):
                parameter.data = parameter.data.to(dtype)
    return model, experts, None if layout is None else LocalMemory(config, layout)


def train(model: Transformer, experts: LocalExperts, memory: LocalMemory | None, tokens: int) -> None:
    """Forward and backward of two sequences."""
    tokens_BT = torch.zeros(2, tokens, dtype=torch.int64)
    hidden_BTH = model(tokens_BT, experts=experts, memory=memory).hidden_BTH
    losses = model.ops.head_loss(hidden_BTH.flatten(0, 1), model.head_weight, tokens_BT.flatten())
    losses.sum().backward()


@torch.no_grad()
def serve(model: Transformer, experts: LocalExperts, memory: LocalMemory | None) -> None:
    """A long prompt and a short one, then single tokens of both; prompts as a graph reads them."""
    engine = PagedEngine(
        model.eval(), experts, memory, max_batch=4, max_model_len=1024, prefill_chunk=1024, page=256
    )
    for index, count in enumerate((600, 5)):
        engine.add(GenerationRequest(request_id=str(index), prompt_tokens=(0,) * count, max_tokens=3))
    while engine.has_work:
        engine.step()
    paged = engine.paged
    if memory is None and all(
        attention_of(model.config, i).takes_bounds for i in range(model.config.num_layers)
    ):
        PromptGraph(model, paged.pools, paged.table_SW, 256, 128).run(experts)


def main(names: Sequence[str]) -> None:
    compiler = Compiler()
    stand_in(compiler)
    for name in names:
        before = len(compiler.seen)
        parts = model_of(**CONFIGS[name])
        for run in (lambda parts=parts: train(*parts, 1100), lambda parts=parts: serve(*parts)):
            try:
                run()
            except Exception as error:
                traceback.print_exc()
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
        print(f"{name}: {len(compiler.seen) - before} kernels", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CONFIGS))
