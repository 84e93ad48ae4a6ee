"""The DeepSeek family's names at Hugging Face beside ours: one table, read in both directions.

Every logical tensor is the rows of one or two of theirs, one after another; nothing is transposed or permuted, so a
model goes in and out without a change of a bit. What their configurations say is in hub_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sparseray.model.config import ModelConfig
from sparseray.model.init import EXPERT_PARTS, expert_name, expert_shape

SCALE_SUFFIX = "_scale_inv"
"""Ends the name of an FP8 weight's factors, one for each block."""
FP8_BLOCK = 128
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_IGNORED = re.compile(r".+\.rotary_emb\.inv_freq")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One logical tensor.

    Args:
        name: ours.
        shape: ours.
        theirs: names of the tensors whose rows, one after another and equally many of each, are ours; none for what
            only we have, which is zero.
        copies: further names of the same tensor: every module that predicts further tokens is released with an
            embedding and a head of its own, equal to the model's. An export has them, an import may.
    """

    name: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    copies: tuple[str, ...] = ()

    @property
    def piece(self) -> tuple[int, ...]:
        """Shape of each of theirs."""
        return (self.shape[0] // max(1, len(self.theirs)), *self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Where an expert's matrix is in files that keep all experts of a layer in one tensor.

    Args:
        name: of that tensor.
        expert: its first index.
        part: gate and up share a tensor, gate rows first.
    """

    name: str
    expert: int
    part: str


def fused(name: str) -> Fused | None:
    """The other place where an expert's matrix may be; None for what is no expert's."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return None
    whole = "down_proj" if found[3] == "down" else "gate_up_proj"
    return Fused(name=f"{found[1]}.{whole}", expert=int(found[2]), part=found[3])


def is_ignored(name: str) -> bool:
    """Whether a tensor says nothing that the configuration does not say."""
    return _IGNORED.fullmatch(name) is not None


def is_of_a_later_layer(name: str, num_layers: int) -> bool:
    """Whether a tensor belongs to a layer beyond the model's own: a module that predicts further tokens.

    Args:
        name: theirs.
        num_layers: of the model.
    """
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= num_layers


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every logical tensor of a model that `hub_config.hub_type` knows, dense weights and experts."""
    V, H = config.vocab_size, config.hidden
    modules = [f"model.layers.{layer}" for layer in range(config.num_layers, config.num_blocks)]
    embeddings = tuple(f"{module}.embed_tokens.weight" for module in modules)
    heads = tuple(f"{module}.shared_head.head.weight" for module in modules)
    copies = embeddings + heads if config.tie_embeddings else embeddings
    yield Entry(name="embedding", shape=(V, H), theirs=("model.embed_tokens.weight",), copies=copies)
    for layer in range(config.num_layers):
        yield from _block(config, f"layers.{layer}", layer)
    yield _one("final_norm.weight", "model.norm.weight", H)
    if not config.tie_embeddings:
        yield Entry(name="head", shape=(V, H), theirs=("lm_head.weight",), copies=heads)
    for index, theirs in enumerate(modules):
        ours = f"mtp.{index}"
        yield _one(f"{ours}.embedding_norm.weight", f"{theirs}.enorm.weight", H)
        yield _one(f"{ours}.hidden_norm.weight", f"{theirs}.hnorm.weight", H)
        yield _one(f"{ours}.projection.weight", f"{theirs}.eh_proj.weight", H, 2 * H)
        yield from _block(config, f"{ours}.block", config.num_layers + index)
        yield _one(f"{ours}.final_norm.weight", f"{theirs}.shared_head.norm.weight", H)


def _block(config: ModelConfig, ours: str, layer: int) -> Iterator[Entry]:
    """A layer of the model, or the block of a module, which they number as a layer after the last."""
    theirs = f"model.layers.{layer}"
    yield _one(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", config.hidden)
    yield from _attention(config, ours, theirs)
    yield _one(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", config.hidden)
    if layer in config.moe_layers:
        yield from _moe(config, f"{ours}.moe", layer)
    else:
        yield from _mlp(config, f"{ours}.ffn", f"{theirs}.mlp", config.dense_width(layer))


def _one(ours: str, theirs: str, *shape: int) -> Entry:
    return Entry(name=ours, shape=shape, theirs=(theirs,))


def _attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    mla, H = config.mla, config.hidden
    ours, theirs = f"{ours}.attention", f"{theirs}.self_attn"
    queries, rank = config.num_heads * mla.qk_head_dim, mla.q_lora_rank
    if rank is None:
        yield _one(f"{ours}.q.weight", f"{theirs}.q_proj.weight", queries, H)
    else:
        yield _one(f"{ours}.q_down.weight", f"{theirs}.q_a_proj.weight", rank, H)
        yield _one(f"{ours}.q_norm.weight", f"{theirs}.q_a_layernorm.weight", rank)
        yield _one(f"{ours}.q_up.weight", f"{theirs}.q_b_proj.weight", queries, rank)
    latent, values = mla.kv_lora_rank, config.num_heads * mla.v_head_dim
    yield _one(f"{ours}.kv_down.weight", f"{theirs}.kv_a_proj_with_mqa.weight", mla.cache_width, H)
    yield _one(f"{ours}.kv_norm.weight", f"{theirs}.kv_a_layernorm.weight", latent)
    up = config.num_heads * mla.qk_nope_head_dim + values
    yield _one(f"{ours}.kv_up.weight", f"{theirs}.kv_b_proj.weight", up, latent)
    yield _one(f"{ours}.out.weight", f"{theirs}.o_proj.weight", H, values)


def _mlp(config: ModelConfig, ours: str, theirs: str, inner: int) -> Iterator[Entry]:
    gate_up = tuple(f"{theirs}.{part}_proj.weight" for part in ("gate", "up"))
    yield Entry(name=f"{ours}.gate_up.weight", shape=(2 * inner, config.hidden), theirs=gate_up)
    yield _one(f"{ours}.down.weight", f"{theirs}.down_proj.weight", config.hidden, inner)


def _moe(config: ModelConfig, ours: str, layer: int) -> Iterator[Entry]:
    moe, theirs = config.moe, f"model.layers.{layer}.mlp"
    yield _one(f"{ours}.router.weight", f"{theirs}.gate.weight", moe.num_experts, config.hidden)
    biases = (f"{theirs}.gate.e_score_correction_bias",) if moe.router == "v3" else ()
    yield Entry(name=f"{ours}.router_bias", shape=(moe.num_experts,), theirs=biases)
    if moe.num_shared:
        yield from _mlp(config, f"{ours}.shared", f"{theirs}.shared_experts", moe.num_shared * moe.expert_dim)
    for expert in range(moe.num_experts):
        for part in EXPERT_PARTS:
            name = f"{theirs}.experts.{expert}.{part}_proj.weight"
            yield _one(expert_name(layer, expert, part), name, *expert_shape(config, part))
