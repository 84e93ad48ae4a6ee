"""The paged engine on one GPU without a server: weights drawn on the GPU, decoding at a long context, reading prompts.

Shapes: R rows.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.drafting_model import DraftingModel
from sparseray.actors.serving.paged_engine import PREFILL_ROWS, PagedEngine
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.actors.state.dense_slab import computes_in_fp32
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.ops import Ops, ops_for
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer
from sparseray.platform.config import load_yaml

ROOT = Path(__file__).resolve().parent.parent


def model_of(name: str, **changes: object) -> ModelConfig:
    """The model of a file in configs/, with changes."""
    return replace(load_yaml(ROOT / "configs" / f"{name}.yaml").model, **changes)  # type: ignore[arg-type]


def drawn(
    config: ModelConfig, device: torch.device, layout: DSELayout | None = None
) -> tuple[Transformer, LocalExperts]:
    """A bf16 model with random weights, drawn where it computes."""
    ops: Ops = ops_for("auto", device)
    with torch.device("meta"):
        model, experts = Transformer(config, layout, ops=ops), LocalExperts(config, ops=ops)
    generator = torch.Generator(device).manual_seed(0)
    for module in (model, experts):
        module.to_empty(device=device)
        for name, parameter in module.named_parameters():
            dtype = torch.float32 if computes_in_fp32(name) else torch.bfloat16
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            parameter.data = value.fill_(1.0) if is_norm else value.normal_(0, 0.02, generator=generator)
            parameter.requires_grad_(False)
        for name, buffer in module.named_buffers():
            if name.endswith("router_bias"):
                buffer.zero_()
    for name, buffer in type(model.rope)(config).named_buffers():
        setattr(model.rope, name, buffer.to(device))
    return model.eval(), experts.eval()


def engine_of(config: ModelConfig, *, max_batch: int, max_model_len: int) -> PagedEngine:
    """An engine over random weights."""
    model, experts = drawn(config, torch.device("cuda"))
    return PagedEngine(
        model, experts, None, max_batch=max_batch, max_model_len=max_model_len, prefill_chunk=PREFILL_ROWS
    )


def request_of(index: int, prompt: int, new: int, **draws: float) -> GenerationRequest:
    """A request with a prompt of its own, greedy unless `draws` says otherwise."""
    tokens = tuple((1 + i * 7919 + index * 104729) % 32000 for i in range(prompt))
    settings: dict[str, Any] = {"temperature": 0.0, "seed": index, **draws}
    return GenerationRequest(request_id=str(index), prompt_tokens=tokens, max_tokens=new, **settings)


def decode_ms(config: ModelConfig, batch: int, context: int, steps: int = 40) -> tuple[float, list[str]]:
    """Median milliseconds of an engine's step that adds a token to `batch` requests of `context` tokens, and `profile`.

    The caches hold random keys and values: what is in them does not change the time. Requests that find no pages would wait,
    and a smaller batch be timed: it ends with an error.
    """
    # An engine before this one may stand in a cycle.
    gc.collect()
    torch.cuda.empty_cache()
    engine = engine_of(config, max_batch=batch, max_model_len=context + 4 * steps)
    for pool in engine.paged.pools:
        for tensor in pool.tensors():
            for page in tensor.split(64):
                page.normal_()
    for index in range(batch):
        engine.add(request_of(index, context, 4 * steps))
    engine._admit()
    if len(engine._running) < batch:
        held = sum(t.nbytes for pool in engine.paged.pools for t in pool.tensors())
        raise SystemExit(
            f"{batch} requests of {context} tokens: pages of {held / 2**30:.0f} GiB hold {len(engine._running)};"
            " take fewer key/value heads, a shorter context or a smaller batch"
        )
    for sequence in engine._running:
        assert sequence.lease is not None
        sequence.lease.length = context - 1
    seconds: list[float] = []
    while len(seconds) < steps + 5:
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[5:]) * 1e3, profile(engine)


def finish(engine: PagedEngine) -> None:
    """Compute until nothing is left."""
    while engine.has_work:
        engine.step()


def prompt_seconds(engine: PagedEngine, count: int, prompt: int, offset: int) -> float:
    """Seconds until each of `count` requests has its first token."""
    for index in range(count):
        engine.add(request_of(offset + index, prompt, 1))
    torch.cuda.synchronize()
    started = time.perf_counter()
    finish(engine)
    return time.perf_counter() - started


def generate_rate(engine: PagedEngine, batch: int, prompt: int, new: int, offset: int) -> float:
    """Tokens per second of `batch` requests, prompts included."""
    for index in range(batch):
        engine.add(request_of(offset + index, prompt, new))
    torch.cuda.synchronize()
    started = time.perf_counter()
    finish(engine)
    return batch * new / (time.perf_counter() - started)


def forward_rate(engine: PagedEngine, length: int, rows: int) -> float:
    """Tokens per second of the training's forward pass without gradients."""
    model = engine.model
    tokens = torch.randint(0, 32000, (rows // length, length), device="cuda")
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            model(tokens, experts=engine.experts, memory=None)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return rows / min(seconds)


@triton.jit
def _told_kernel(p_slots, p_length, p_draft, p_table, width):  # type: ignore[no-untyped-def]
    slot = tl.load(p_slots + tl.program_id(0))
    tl.store(p_draft + slot, tl.load(p_table + slot * width + tl.load(p_length + slot) + 1))


class ToldModel(DraftingModel):
    """Has drafts from a table of what stands where, so that a model with random weights accepts them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        shape = (len(self.latest_S), self.width * self.page + 2)
        self.table_SL = torch.zeros(shape, dtype=torch.int32, device=self.device)

    def _drafted_anew(self, slots_B: Tensor) -> None:
        """One small launch, which the step would not have."""
        state = self.state_S
        at = (slots_B, state.length_S, state.draft_S, self.table_SL, self.table_SL.shape[1])
        launch_kernel(_told_kernel, (len(slots_B),), *at, num_warps=1)


class ToldEngine(DraftingEngine):
    """Drafts by the table."""

    runs_on = ToldModel


def drafting(config: ModelConfig, batch: int, prompt: int, new: int, **draws: float) -> dict[str, float]:
    """Tokens per second of decoding by engine: without drafts, with drafts of which none or all are accepted.

    "rests" accepts none either, and goes without for a while, as a server does.

    Args:
        config: of a model with modules that predict further tokens.
        batch, prompt, new: requests, tokens of their prompts, and of their answers.
        draws: how tokens are drawn, as of `request_of`.
    """
    model, experts = drawn(config, torch.device("cuda"))
    texts: dict[str, list[int]] = {}
    rates: dict[str, float] = {}
    options = {"max_batch": batch, "max_model_len": prompt + new, "prefill_chunk": PREFILL_ROWS}
    kinds = [("without", PagedEngine), *((name, ToldEngine) for name in ("none", "rests", "all"))]
    for name, kind in kinds:
        engine = kind(model, experts, None, cache_bytes=8 << 30, **options)
        if isinstance(engine, ToldEngine) and name != "rests":
            engine.worth = 0.0
        for _ in range(3):
            for index in range(batch):
                engine.add(request_of(index, prompt, new, **draws))
            events = []
            while any(s.in_prompt for s in engine._running) or engine._waiting:
                events += engine.step()
            if isinstance(engine.paged, ToldModel):
                for s in engine._running:
                    text = texts[s.request.request_id] if name == "all" else [32000] * (prompt + new)
                    assert s.lease is not None
                    told = torch.tensor(text, dtype=torch.int32, device="cuda")
                    engine.paged.table_SL[s.lease.slot, : len(text)] = told
            torch.cuda.synchronize()
            started, before = time.perf_counter(), len(events)
            while engine.has_work:
                events += engine.step()
            rate = (len(events) - before) / (time.perf_counter() - started)
            rates[name] = max(rates.get(name, 0.0), rate)
            for index in range(batch):
                said = [e.token_id or 0 for e in events if e.request_id == str(index)]
                whole = [*request_of(index, prompt, new).prompt_tokens, *said]
                if texts.setdefault(str(index), whole) != whole:
                    rates[f"texts that differ, {name}"] = rates.get(f"texts that differ, {name}", 0) + 1
        del engine
        torch.cuda.empty_cache()
    return rates


def profile(engine: PagedEngine, steps: int = 20) -> list[str]:
    """Share of the next steps by kernel, the ten largest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.device_time_total)
    whole = sum(e.device_time_total for e in events)
    lines = [f"device time a step: {whole / steps:.0f} us"]
    for e in events[:10]:
        share = e.device_time_total / whole
        lines.append(
            f"{share:6.1%} {e.device_time_total / steps:8.1f} us {e.count // steps:4d}x {e.key[:70]}"
        )
    return lines
