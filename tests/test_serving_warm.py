"""What an engine of a GPU launches before it serves holds all kernels that requests need, interpreted without one.

Twin of tests/test_gpu_warm.py, which asks Triton; here the arguments are compared by what Triton compiles for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_interpreter
from serving_parts import finish, make_parts, request_of
from test_serving_paged import prompt_of
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from sparseray.actors.serving.device_sampler import sample_all_ways
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.kernels.triton_ops import TRITON
from sparseray.model.config import DSEConfig, NSAConfig
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

assert triton_interpreter.prepare  # Imported before anything that uses Triton.
LONGEST = 56


def kind(name: str, value: object, rules: dict[str, Any]) -> object:
    """What of an argument a kernel is compiled for."""
    if isinstance(value, Tensor):
        is_free = name in (rules["do_not_specialize_on_alignment"] or ())
        return value.dtype, is_free or value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return int if name in (rules["do_not_specialize"] or ()) else (value == 1, value % 16 == 0)
    return type(value)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Kernels, each with what it would be compiled for."""
    found: set[Any] = set()
    original = InterpretedFunction.__getitem__

    def noted(kernel: Any, grid: Any) -> Callable[..., None]:
        def call(*args: Any, **named: Any) -> None:
            kinds = [kind(name, value, kernel.kwargs) for name, value in zip(kernel.arg_names, args)]
            found.add(
                (kernel.fn.__name__, *kinds, *sorted((name, str(value)) for name, value in named.items()))
            )
            original(kernel, grid)(*args, **named)

        return call

    monkeypatch.setattr(InterpretedFunction, "__getitem__", noted)
    return found


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu_warm.py says the same of a GPU")
@pytest.mark.parametrize(
    "dse", [DSEConfig(), DSEConfig(layers=(1,), rows_per_head=512)], ids=["nsa", "memory"]
)
def test_requests_launch_nothing_that_was_not_launched_before(dse: DSEConfig, launched: set[Any]) -> None:
    nsa = NSAConfig(block=8, stride=4, select_block=8, num_selected=3, window=16)
    parts = make_parts(dse=dse, nsa=nsa)
    config = parts.model.config
    model = Transformer(config, parts.model.layout, seed=3, ops=TRITON).eval()
    experts, memory = LocalExperts(config, seed=3, ops=TRITON), parts.memory if dse.layers else None
    engine = PagedEngine(
        model, experts, memory, max_batch=2, max_model_len=LONGEST, prefill_chunk=40, page=16
    )  # fmt: skip
    engine.paged.warm_rows = 40
    with torch.no_grad():
        engine.paged.launch_prompts(experts, memory)
    sample_all_ways(model)
    # Steps that decode are recorded on a GPU, in every size.
    for company in (1, 2):
        for index in range(company):
            engine.add(request_of(f"{company} {index}", prompt_of(1, index), temperature=0.0, max_tokens=2))
        finish(engine)
    before = set(launched)
    for index, length in enumerate((2, 37, 51)):
        engine.add(request_of(f"{index}", prompt_of(length, index), temperature=0.0, max_tokens=2))
        finish(engine)
    for index in range(3):
        engine.add(
            request_of(f"beside {index}", prompt_of(5 + 7 * index, index), temperature=0.8, max_tokens=2)
        )
    finish(engine)
    assert launched == before, launched - before


@pytest.mark.parametrize("rows", [0, 3])
def test_experts_are_launched_by_themselves_for_as_many_rows_as_asked_for(rows: int) -> None:
    """For none where slots compute in rounds, whose kernels are others."""
    parts = make_parts(dse=DSEConfig(), attention=("full",))
    model, calls = parts.model.eval(), list[int]()

    def experts(layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        calls.append(len(x_TH))
        return x_TH

    engine = PagedEngine(model, experts, None, max_batch=2, max_model_len=LONGEST, prefill_chunk=40, page=16)
    engine.paged.warm_rows = 0
    with torch.no_grad():
        engine.paged.launch_prompts(experts, None)
    prompts = calls.copy()
    calls.clear()
    engine.paged.warm_rows = rows
    with torch.no_grad():
        engine.paged.launch_prompts(experts, None)
    assert prompts and calls == [*prompts, *range(1, rows + 1)]
