"""Decoding on caches equals the full forward pass, and a sequence never depends on its batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.model.cache import Cache
from sparseray.model.config import MLAConfig, ModelConfig, MoEConfig, NSAConfig, RopeConfig, preset
from sparseray.model.decode import greedy
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer, cross_entropy_sum

TINY = preset("tiny")
ODD = replace(
    TINY,
    num_layers=3,
    attention=("nsa", "full", "nsa"),
    v_head_dim=12,
    tie_embeddings=False,
    nsa=NSAConfig(block=8, stride=4, select_block=12, num_selected=3, num_local=1, window=7, shared_kv=True),
    moe=MoEConfig(router="v2", num_shared=0, top_k=2, leading_dense=0, num_groups=4, topk_groups=2),
    dse=replace(TINY.dse, orders=(2, 4), document_end_id=5, layers=(0, 2)),
)
LATENT = replace(
    TINY,
    attention=("mla", "full", "mla", "nsa"),
    mla=MLAConfig(q_lora_rank=24, kv_lora_rank=40, qk_nope_head_dim=12, qk_rope_head_dim=10, v_head_dim=14),
    rope=RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=64, mscale=1.0, mscale_all_dim=0.7),
)


class Net:
    """A model with all its parts; the zero-initialised convolution is filled so that its history matters."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.layout = DSELayout.from_token_map(config.dse, np.arange(2048) % 1500)
        self.model = Transformer(config, self.layout)
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
    def full(self, tokens_T: Tensor, starts_T: Tensor | None = None) -> Tensor:
        starts = None if starts_T is None else starts_T[None]
        out = self.model(tokens_T[None], experts=self.experts, memory=self.memory, document_starts_BT=starts)
        return out.hidden_BTH[0]

    def chunked(self, tokens_T: Tensor, sizes: list[int], starts_T: Tensor | None = None) -> Tensor:
        cache, out, at = Cache(self.config, tokens_T.numel()), [], 0
        for size in sizes:
            piece = slice(at, at + size)
            starts = None if starts_T is None else [starts_T[piece]]
            out += self.model.run_chunks(
                [(tokens_T[piece], cache)],
                experts=self.experts,
                memory=self.memory,
                document_starts=starts,
            )
            at += size
        assert cache.length == at == tokens_T.numel()
        return torch.cat(out)

    def chunks(self, chunks: list[tuple[Tensor, Cache]]) -> list[Tensor]:
        return self.model.run_chunks(chunks, experts=self.experts, memory=self.memory)


@pytest.fixture(scope="module", params=["tiny", "odd", "latent"])
def net(request: pytest.FixtureRequest) -> Net:
    return Net({"tiny": TINY, "odd": ODD, "latent": LATENT}[request.param])


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(6, 2048, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [[1] * 71, [3, 1, 17, 5, 1, 29, 15], [70, 1], [71], [8, 8, 8, 47]])
def test_decoding_with_caches_equals_the_full_pass_at_every_token(net: Net, sizes: list[int]) -> None:
    tokens = random_tokens(71, 1)
    starts = torch.zeros(71, dtype=torch.bool)
    starts[[0, 9, 10, 33, 64]] = True
    full = net.full(tokens, starts)
    torch.testing.assert_close(net.chunked(tokens, sizes, starts), full, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(net.full(tokens), full, atol=1e-3), "documents must matter"


def test_documents_are_found_from_the_end_token_in_training_and_serving_alike() -> None:
    net = Net(ODD)
    tokens = random_tokens(40, 2)
    tokens[[7, 8, 21]] = 5
    starts = torch.zeros(40, dtype=torch.bool)
    starts[[8, 9, 22]] = True
    full = net.full(tokens, starts)
    assert torch.equal(net.full(tokens), full)
    for sizes in ([1] * 40, [8, 1, 13, 18], [7, 15, 18]):
        torch.testing.assert_close(net.chunked(tokens, sizes), full, rtol=1e-4, atol=2e-5)


def prefilled(net: Net, tokens: Tensor) -> Cache:
    cache = Cache(net.config, 200)
    net.chunks([(tokens, cache)])
    return cache


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [20, 1, 31, 140, 2], [1, 1, 1, 13, 1]])
def test_a_decode_step_has_the_same_bits_alone_and_among_five_others(net: Net, sizes: list[int]) -> None:
    prompt, token = random_tokens(29, 3), random_tokens(1, 4)
    mine = prefilled(net, prompt)
    alone = net.chunks([(token, mine)])[0]
    others = [
        (random_tokens(size, 5 + i), prefilled(net, random_tokens(4 + 11 * i, i)))
        for i, size in enumerate(sizes)
    ]
    for place in (0, 3, 5):
        again = prefilled(net, prompt)
        fresh = [(t, prefilled(net, random_tokens(4 + 11 * i, i))) for i, (t, _) in enumerate(others)]
        together = net.chunks([*fresh[:place], (token, again), *fresh[place:]])[place]
        assert torch.equal(alone, together)
        for a, b in zip(mine.layers, again.layers, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
        assert all(torch.equal(mine.conv[layer], again.conv[layer]) for layer in mine.conv)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 130])
def test_a_prefill_has_the_same_bits_alone_and_among_others(net: Net, length: int) -> None:
    tokens = random_tokens(length, 6)
    alone = net.chunks([(tokens, Cache(net.config, 200))])[0]
    others = [(random_tokens(n, n), Cache(net.config, 200)) for n in (3, 50, 1)]
    together = net.chunks([*others, (tokens, Cache(net.config, 200))])[3]
    assert torch.equal(alone, together)
    with torch.no_grad():
        logits = net.model.logits(alone)
        assert torch.equal(
            net.model.logits(torch.cat([*net.chunks([(random_tokens(7, 1), Cache(net.config, 9))]), alone]))[
                7:
            ],
            logits,
        )


def test_training_rows_do_not_depend_on_the_other_sequences_beyond_rounding(net: Net) -> None:
    tokens = torch.stack([random_tokens(40, i) for i in range(3)])
    with torch.no_grad():
        out = net.model(tokens, experts=net.experts, memory=net.memory).hidden_BTH
    for b in range(3):
        torch.testing.assert_close(out[b], net.full(tokens[b]), rtol=1e-4, atol=2e-5)


def test_greedy_continues_as_repeated_full_passes_would(net: Net) -> None:
    prompt = random_tokens(21, 7)
    got = greedy(net.model, prompt, 12, experts=net.experts, memory=net.memory, chunk=5)
    tokens = prompt
    with torch.no_grad():
        for _ in range(12):
            best = net.model.logits(net.full(tokens)[-1:]).argmax(-1)
            tokens = torch.cat([tokens, best])
    assert got.tolist() == tokens[21:].tolist()


def test_cache_refuses_what_does_not_fit() -> None:
    net = Net(TINY)
    with pytest.raises(ConfigError, match="max_seq_len"):
        Cache(TINY, 513)
    cache = Cache(TINY, 10)
    net.chunks([(random_tokens(8, 0), cache)])
    with pytest.raises(ConfigError, match="does not fit"):
        net.chunks([(random_tokens(3, 0), cache)])
    with pytest.raises(ConfigError, match="twice"):
        net.chunks([(random_tokens(1, 0), cache), (random_tokens(1, 0), cache)])
    with pytest.raises(ConfigError, match="empty"):
        net.chunks([(random_tokens(0, 0), cache)])
    assert cache.length == 8


def test_nsa_cache_is_close_to_the_size_of_one_branch() -> None:
    config = replace(TINY, attention=("nsa",), max_seq_len=4096)
    full = Cache(replace(config, attention=("full",)), 4096).num_bytes
    assert Cache(config, 4096).num_bytes < 1.2 * full


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
