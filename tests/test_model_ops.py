"""The model computes the same with the plain operations and with the Triton kernels (interpreted without a GPU)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton_interpreter  # Must come before anything that imports Triton.
from nsa_sizes import DEVICE, small_tiles
from paged_runs import Served
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.compiled_ops import COMPILED
from sparseray.kernels.ops import REFERENCE, BranchKeys, Ops, ops_for
from sparseray.kernels.triton_ops import TRITON
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig, NSAConfig
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.statistics import collect
from sparseray.model.transformer import Transformer, cross_entropy_sum

assert triton_interpreter
assert small_tiles  # A fixture of every test here.

PAGE = 16
SMALL = ModelConfig(
    vocab_size=40,
    hidden=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=24,
    attention=("full", "nsa"),
    max_seq_len=64,
    nsa=NSAConfig(block=4, stride=2, select_block=4, num_selected=3, num_local=1, window=6),
    moe=MoEConfig(num_experts=4, top_k=2, expert_dim=16, num_groups=2, topk_groups=1, balance_loss=0.1),
    dse=DSEConfig(layers=(1,), heads=2, rows_per_head=16, head_dim=4, num_buckets=2),
)


class Net:
    """A whole model in this process."""

    def __init__(self, ops: Ops, config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        layout = DSELayout.from_token_map(config.dse, np.arange(40) % 30)
        self.model = Transformer(config, layout, seed=1, ops=ops)
        self.experts = LocalExperts(config, seed=1, ops=ops)
        self.memory = LocalMemory(config, layout, seed=1)
        for part in self.parts():
            for p in part.parameters():
                # Large enough that gates, routing and selection differ from token to token.
                p.data = (p.data * (1.0 if p.dim() == 1 else 8.0)).to(DEVICE, dtype)
            part.to(DEVICE)

    def parts(self) -> tuple[torch.nn.Module, ...]:
        return self.model, self.experts, self.memory

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for part in self.parts():
            yield from part.named_parameters()

    def loss(self, tokens_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        out = self.model(tokens_BT, experts=self.experts, memory=self.memory, document_starts_BT=starts_BT)
        targets = tokens_BT.roll(-1, 1)
        return cross_entropy_sum(self.model, out.hidden_BTH, targets) / targets.numel() + out.aux_loss

    def train(self, steps: int) -> tuple[list[float], dict[str, Tensor]]:
        """Losses of some steps of plain descent, and the gradients of the last."""
        losses = []
        for step in range(steps):
            tokens = random_tokens(2, 15, step)
            starts = torch.rand(2, 15, generator=torch.Generator().manual_seed(step)) < 0.1
            for _, p in self.named():
                p.grad = None
            loss = self.loss(tokens, starts.to(DEVICE))
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for _, p in self.named():
                    p -= 0.05 * p.grad
        return losses, {name: p.grad for name, p in self.named() if p.grad is not None}


def random_tokens(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_training_with_triton_gives_the_losses_and_gradients_of_the_plain_operations() -> None:
    losses, gradients = Net(REFERENCE).train(3)
    found_losses, found = Net(TRITON).train(3)
    assert losses[0] != losses[1]
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_serving_with_triton_gives_the_hidden_states_of_the_plain_operations() -> None:
    tokens, found = random_tokens(1, 17, 9)[0], []
    for ops in (REFERENCE, TRITON):
        net = Net(ops)
        found.append(Served(net.model, net.experts, net.memory, page=PAGE).text(tokens, [9, 1, 7]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_triton_notes_the_statistics_of_the_plain_operations() -> None:
    noted = []
    for ops in (REFERENCE, TRITON):
        with collect() as values, torch.no_grad():
            Net(ops).loss(random_tokens(2, 21, 0))
        noted.append({(name, *labels.values()): value for name, labels, value in values})
    assert len(noted[0]) == 7
    assert noted[1] == pytest.approx(noted[0], rel=1e-4)


def test_kernels_are_chosen_by_key_and_device() -> None:
    cpu = torch.device("cpu")
    assert ops_for("auto", cpu) is COMPILED
    assert ops_for("reference", cpu) is REFERENCE
    assert ops_for("triton", torch.device(DEVICE)) is TRITON
    with pytest.raises(ConfigError, match="capability 9"):
        ops_for("triton", torch.device("meta"))


def test_what_a_kernel_does_not_take_is_refused_with_the_cure() -> None:
    x = torch.zeros(3, 16, dtype=torch.float64, device=DEVICE)
    options = {
        "top_k": 1,
        "router": "v3",
        "bias_E": None,
        "num_groups": 1,
        "topk_groups": 1,
        "group_scores": 2,
    }
    with pytest.raises(ConfigError, match=r"triton: the router got torch.float64; .* kernels=reference"):
        TRITON.route(x, **options, normalize=None, scaling=1.0)
    weights = torch.zeros(2, 8, 16, device=DEVICE), torch.zeros(2, 16, 4, device=DEVICE)
    routed = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    with pytest.raises(ConfigError, match=r"the experts got torch.bfloat16, torch.float32"):
        TRITON.experts(x.bfloat16(), *routed, *weights)


@pytest.mark.parametrize("router", ["v3", "v2", "gshard", "dense"])
def test_a_model_in_bf16_runs_forward_and_backward_near_its_fp32_twin(router: str) -> None:
    config = replace(SMALL, moe=replace(SMALL.moe, router=router))
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        net = Net(REFERENCE, config, dtype)
        loss = net.loss(random_tokens(2, 21, 0))
        assert loss.dtype == torch.float32
        loss.backward()
        for name, p in net.named():
            if config.moe_layers or not name.startswith(("gate_up", "down")):
                assert p.grad is not None and p.grad.dtype == dtype, name
                assert torch.isfinite(p.grad).all(), name
        results[dtype] = loss.item()
    assert results[torch.bfloat16] == pytest.approx(results[torch.float32], rel=0.05)


def test_a_model_in_bf16_serves_from_caches_of_its_dtype() -> None:
    tokens = random_tokens(1, 17, 9)[0]
    net = Net(REFERENCE, SMALL, torch.bfloat16)
    hidden = Served(net.model, net.experts, net.memory, page=PAGE).text(tokens, [9, 1, 7])
    with torch.no_grad():
        out = net.model(tokens[None], experts=net.experts, memory=net.memory)
    error = (hidden - out.hidden_BTH[0]).float().norm() / out.hidden_BTH.float().norm()
    assert out.hidden_BTH.dtype == torch.bfloat16
    assert error < 0.05


def test_a_head_wider_than_the_kernels_take_is_refused_with_the_cure() -> None:
    sizes = SMALL.nsa.sizes
    q, k, v = (torch.zeros(1, 8, heads, 208, device=DEVICE) for heads in (2, 1, 1))
    keys = BranchKeys(k_cmp=k[:, :3], v_cmp=v[:, :3], k_slc=k, v_slc=v, k_win=k, v_win=v)
    with pytest.raises(
        ConfigError, match=r"at most 192 channels, not 208; set model\.head_dim=128 and model\.v_head_dim=128"
    ):
        TRITON.nsa_attention(q, keys, torch.zeros(1, 8, 2, 3, device=DEVICE), sizes)
