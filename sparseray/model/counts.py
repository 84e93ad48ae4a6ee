"""How many parameters a model has, and how many floating-point operations a token costs.

Pure arithmetic on the configuration, for reports, plans and utilisation figures; "active" is what one token
uses, "total" is all that exists. A multiplication and an addition are two operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparseray.model.attention import attention_of
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import draw_primes


def _memory_layer_parameters(config: ModelConfig) -> int:
    """The fusion of one memory layer: projections, three norms and the convolution."""
    return config.hidden * (2 * config.dse.width + 2 + 3 + config.dse.kernel_size)


def _feed_forward_parameters(config: ModelConfig, layer: int) -> int:
    """Router and shared experts of a MoE layer, or the dense MLP; all of them in matrices."""
    hidden, moe = config.hidden, config.moe
    if layer in config.moe_layers:
        return hidden * moe.num_experts + 3 * hidden * moe.num_shared * moe.expert_dim
    return 3 * hidden * config.dense_width(layer)


def _module_parameters(config: ModelConfig) -> int:
    """What a module that predicts a further token has beside its block: projection and three norms."""
    return config.hidden * (2 * config.hidden + 3)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count parameters.

    Returns:
        "dense": parameters of `Transformer`; "experts" and "memory": routed experts and table entries, all of
        them; "embedding": the part of "dense" that is embedding and head; "total": dense + experts + memory;
        "active": dense + the experts and table rows that one token uses. Modules that predict further tokens are
        in all of them.
    """
    hidden, moe = config.hidden, config.moe
    embedding = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    dense = embedding + hidden * (1 + 2 * config.num_blocks) + config.mtp.depth * _module_parameters(config)
    for layer in range(config.num_blocks):
        dense += attention_of(config, layer).num_parameters(config)
        dense += _feed_forward_parameters(config, layer)
    dense += len(config.dse.layers) * _memory_layer_parameters(config)
    expert = 3 * hidden * moe.expert_dim
    experts = len(config.moe_layers) * moe.num_experts * expert
    rows = sum(prime for layer in draw_primes(config.dse) for order in layer for prime in order)
    memory = rows * config.dse.head_dim
    active = dense + len(config.moe_layers) * moe.top_k * expert + len(config.dse.layers) * config.dse.width
    return {
        "dense": dense,
        "experts": experts,
        "memory": memory,
        "embedding": embedding,
        "total": dense + experts + memory,
        "active": active,
    }


def keys_per_query(config: ModelConfig, layer: int, seq_len: int) -> dict[str, float]:
    """Mean number of keys that a query reads in each branch of a layer, over the positions of a sequence.

    Args:
        config: of the model.
        layer: 0-based.
        seq_len: tokens of the sequence.
    """
    return attention_of(config, layer).keys_per_query(config, seq_len)


def flops_per_token(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Operations of the forward pass, averaged over the tokens of a sequence.

    Counted exactly: every matrix product and the memory's convolution. Left out, as is usual (below 1 % of the
    rest): norms, biases, position encodings, activations, softmax and the look-ups of embedding and memory.

    Args:
        config: of the model.
        seq_len: tokens of the sequence.

    Returns:
        "linear": projections, MLPs, router, shared experts and head; "experts": the chosen routed experts;
        "attention": scores and values; "active": their sum, which a token costs; "total": the same if every
        routed expert ran; "mtp": all of the modules that predict further tokens, of which no other figure but the
        next has a part; "training": forward and backward, 3 * (active + mtp).
    """
    hidden, dse = config.hidden, config.dse
    linear = 2.0 * config.vocab_size * hidden
    linear += 2.0 * len(dse.layers) * hidden * (2 * dse.width + dse.kernel_size)
    attention = experts = every_expert = 0.0
    for layer in range(config.num_layers):
        found = _block_flops(config, layer, seq_len)
        linear, attention, experts = (
            linear + found.linear,
            attention + found.attention,
            experts + found.experts,
        )
        every_expert += found.every_expert
    active = linear + attention + experts
    mtp = 0.0
    for depth in range(1, min(config.mtp.depth, seq_len - 1) + 1):
        # It has no row for a sequence's last tokens.
        block = _block_flops(config, config.num_layers + depth - 1, seq_len - depth)
        ends = 2.0 * hidden * (2 * hidden + config.vocab_size)
        mtp += (block.linear + block.attention + block.experts + ends) * (seq_len - depth) / seq_len
    return {
        "linear": linear,
        "experts": experts,
        "attention": attention,
        "active": active,
        "total": active - experts + every_expert,
        "mtp": mtp,
        "training": 3 * (active + mtp),
    }


@dataclass(frozen=True, kw_only=True)
class _BlockFlops:
    linear: float
    attention: float
    experts: float
    every_expert: float


def _block_flops(config: ModelConfig, layer: int, seq_len: int) -> _BlockFlops:
    """Of attention and MLP of one layer; the memory is not among it."""
    moe, found = config.moe, attention_of(config, layer).flops_per_token(config, seq_len)
    expert = 2.0 * 3 * config.hidden * moe.expert_dim if layer in config.moe_layers else 0.0
    return _BlockFlops(
        linear=found.linear + 2.0 * _feed_forward_parameters(config, layer),
        attention=found.attention,
        experts=expert * moe.top_k,
        every_expert=expert * moe.num_experts,
    )
