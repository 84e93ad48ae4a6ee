"""What a graph of prompts holds, run without one: any chunks that fit give the hidden states that they have alone."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from paged_runs import Served
from serving_parts import make_parts
from test_serving_paged import prompt_of

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.prompt_graphs import PromptGraph
from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.kernels.triton_ops import TRITON
from sparseray.model.config import DSEConfig
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu_serving.py says the same of a GPU")
@pytest.mark.parametrize(
    "ops", [REFERENCE, pytest.param(TRITON, marks=pytest.mark.long)], ids=["plain", "kernels"]
)
def test_chunks_of_a_graph_equal_chunks_of_their_own(ops: Ops) -> None:
    config = make_parts(attention=("full",), dse=DSEConfig()).model.config
    model, experts = Transformer(config, None, seed=3, ops=ops).eval(), LocalExperts(config, seed=3, ops=ops)
    texts = [torch.tensor(prompt_of(count, count)) for count in (40, 9, 23)]
    served = Served(model, experts, None, page=32)
    # Of the first text half is known already.
    served.read([(1, texts[0][:20])])
    graph = PromptGraph(model, served.paged.pools, served.paged.table_SW, 32, 96)
    for _ in range(2):
        pieces: list[tuple[Lease, int, list[int]]] = [
            (lease, lease.length, text_T[lease.length :].tolist())
            for lease, text_T in zip(served.leases, texts)
        ]
        bounds = graph.place(pieces)
        found_RH = graph.run(experts)
        assert bounds == [0, 20, 29, 52]
        for slot, (text_T, start, stop) in enumerate(zip(texts, bounds, bounds[1:]), 1):
            alone = Served(model, experts, None, page=32)
            wanted_TH = alone.read([(1, text_T)])[0][-(stop - start) :]
            torch.testing.assert_close(found_RH[start:stop], wanted_TH, rtol=1e-4, atol=1e-5, msg=str(slot))
        assert found_RH.isfinite().all()
        texts = [text_T.flip(0) if slot else text_T for slot, text_T in enumerate(texts)]
