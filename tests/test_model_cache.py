"""Serving on pages equals the full forward pass, and a sequence depends neither on its company nor on its chunks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from paged_runs import Served, greedy
from torch import Tensor

from sparseray.kernels.compiled_ops import COMPILED
from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.config import MLAConfig, ModelConfig, MoEConfig, NSAConfig, RopeConfig
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.presets import preset
from sparseray.model.transformer import Transformer, cross_entropy_sum

END = 5
TINY = preset("tiny")
TINY = replace(TINY, dse=replace(TINY.dse, document_end_id=END))
ODD = replace(
    TINY,
    num_layers=3,
    attention=("nsa", "full", "nsa"),
    v_head_dim=12,
    tie_embeddings=False,
    nsa=NSAConfig(block=8, stride=4, select_block=12, num_selected=3, num_local=1, window=7, shared_kv=True),
    moe=MoEConfig(router="v2", num_shared=0, top_k=2, leading_dense=0, num_groups=4, topk_groups=2),
    dse=replace(TINY.dse, orders=(2, 4), layers=(0, 2)),
)
LATENT = replace(
    TINY,
    attention=("mla", "full", "mla", "nsa"),
    mla=MLAConfig(q_lora_rank=24, kv_lora_rank=40, qk_nope_head_dim=12, qk_rope_head_dim=10, v_head_dim=14),
    rope=RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=64, mscale=1.0, mscale_all_dim=0.7),
)


class Net:
    """A model with all its parts; the zero-initialised convolution is filled so that its history matters."""

    def __init__(self, config: ModelConfig, ops: Ops = COMPILED) -> None:
        self.config = config
        self.layout = DSELayout.from_token_map(config.dse, np.arange(2048) % 1500)
        self.model = Transformer(config, self.layout, ops=ops)
        self.experts, self.memory = LocalExperts(config), LocalMemory(config, self.layout)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name.endswith("conv.weight"):
                    p.copy_(torch.randn(p.shape, generator=g) * 0.3)
            for p in [*self.model.parameters(), *self.experts.parameters(), *self.memory.parameters()]:
                if p.dim() == 2:
                    p.mul_(2.0)

    @torch.no_grad()
    def full(self, tokens_T: Tensor) -> Tensor:
        out = self.model(tokens_T[None], experts=self.experts, memory=self.memory)
        return out.hidden_BTH[0]

    def served(self) -> Served:
        # Of whole selection blocks: 12 in one of the models, 16 in the other.
        return Served(self.model, self.experts, self.memory, page=48)


@pytest.fixture(scope="module", params=["tiny", "odd", "latent"])
def net(request: pytest.FixtureRequest) -> Net:
    return Net({"tiny": TINY, "odd": ODD, "latent": LATENT}[request.param])


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(6, 2048, (count,), generator=torch.Generator().manual_seed(seed))


def text_with_documents(count: int, seed: int) -> Tensor:
    tokens = random_tokens(count, seed)
    tokens[[8, 9, 32, 63]] = END
    return tokens


@pytest.mark.one_in(8)
@pytest.mark.parametrize("ops", [COMPILED, REFERENCE], ids=["compiled", "plain"])
@pytest.mark.parametrize("config", [TINY, ODD, LATENT], ids=["tiny", "odd", "latent"])
@pytest.mark.parametrize("sizes", [[1] * 71, [3, 1, 17, 5, 1, 29, 15], [70, 1], [71], [8, 8, 8, 47]])
def test_reading_in_chunks_equals_the_full_pass_at_every_token(
    config: ModelConfig, ops: Ops, sizes: list[int]
) -> None:
    net, tokens = Net(config, ops), text_with_documents(71, 1)
    full = net.full(tokens)
    torch.testing.assert_close(net.served().text(tokens, sizes), full, rtol=1e-4, atol=2e-5)
    tokens[63] = 6
    assert not torch.allclose(net.full(tokens)[64:], full[64:], atol=1e-3), "documents must matter"


@pytest.mark.one_in(5)
@pytest.mark.parametrize("sizes", [[1] * 130, [64, 64, 2], [127, 3], [16, 1, 1, 33, 79]])
def test_chunks_and_single_tokens_give_the_bits_of_one_chunk(net: Net, sizes: list[int]) -> None:
    tokens = text_with_documents(130, 2)
    whole, cut = net.served(), net.served()
    hidden = whole.text(tokens, [130])
    assert torch.equal(cut.text(tokens, sizes), hidden)
    decoded = net.served()
    decoded.text(tokens[:40], [40])
    for at in range(40, 130):
        logits_1V = decoded.decode([(1, tokens[at : at + 1])])
        with torch.no_grad():
            assert torch.equal(logits_1V, net.model.logits(hidden[at : at + 1])), at
    for other in (cut, decoded):
        for layer, history_SLH in whole.paged.histories.items():
            assert torch.equal(history_SLH[1], other.paged.histories[layer][1])


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_decode_step_has_the_same_bits_alone_and_among_five_others(net: Net, place: int) -> None:
    prompt, token = random_tokens(29, 3), random_tokens(1, 4)
    alone = net.served()
    alone.text(prompt, [29], slot=2)
    wanted = alone.decode([(2, token)])
    crowd, slots = net.served(), [1, 3, 4, 5, 6]
    crowd.read([(2, prompt), *((slot, random_tokens(4 + 11 * slot, slot)) for slot in slots)])
    pieces = [(slot, random_tokens(1, slot)) for slot in slots]
    pieces.insert(place, (2, token))
    assert torch.equal(crowd.decode(pieces)[place], wanted[0])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 130])
def test_a_prompt_has_the_same_bits_alone_and_among_others(net: Net, length: int) -> None:
    tokens = random_tokens(length, 6)
    alone = net.served().read([(4, tokens)])[0]
    others = [(slot, random_tokens(n, n)) for slot, n in ((1, 3), (2, 50), (3, 1))]
    assert torch.equal(net.served().read([*others, (4, tokens)])[3], alone)
    with torch.no_grad():
        together = net.model.logits(torch.cat([torch.randn(7, alone.shape[1]), alone]))
        assert torch.equal(together[7:], net.model.logits(alone))


def test_training_rows_do_not_depend_on_the_other_sequences_beyond_rounding(net: Net) -> None:
    tokens = torch.stack([random_tokens(40, i) for i in range(3)])
    with torch.no_grad():
        out = net.model(tokens, experts=net.experts, memory=net.memory).hidden_BTH
    for b in range(3):
        torch.testing.assert_close(out[b], net.full(tokens[b]), rtol=1e-4, atol=2e-5)


def test_greedy_continues_as_a_decoder_on_pages_does(net: Net) -> None:
    prompt, served = random_tokens(21, 7), net.served()
    wanted = greedy(net.model, prompt, 12, experts=net.experts, memory=net.memory)
    with torch.no_grad():
        tokens = [net.model.logits(served.text(prompt, [21])[-1:]).argmax(-1)]
    for _ in range(11):
        tokens.append(served.decode([(1, tokens[-1])]).argmax(-1))
    assert torch.cat(tokens).tolist() == wanted.tolist()


def test_every_parameter_of_the_model_learns() -> None:
    net = Net(TINY)
    tokens = torch.stack([random_tokens(48, i) for i in range(2)])
    out = net.model(tokens, experts=net.experts, memory=net.memory)
    (cross_entropy_sum(net.model, out.hidden_BTH, tokens.roll(-1, 1)) + out.aux_loss).backward()
    parts = (net.model, net.experts, net.memory)
    parameters = [item for part in parts for item in part.named_parameters()]
    for name, p in parameters:
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    silent = [n for n, p in net.model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert silent == []
