"""How many parameters a model has, and how many floating-point operations a token costs.

Pure arithmetic on the configuration, for reports, plans and utilisation figures; "active" is what one token
uses, "total" is all that exists. A multiplication and an addition are two operations.
"""

from __future__ import annotations

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


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count parameters.

    Returns:
        "dense": parameters of `Transformer`; "experts" and "memory": routed experts and table entries, all of
        them; "embedding": the part of "dense" that is embedding and head; "total": dense + experts + memory;
        "active": dense + the experts and table rows that one token uses.
    """
    hidden, moe = config.hidden, config.moe
    embedding = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    dense = embedding + hidden * (1 + 2 * config.num_layers)
    for layer in range(config.num_layers):
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
        routed expert ran; "training": forward and backward, 3 * active.
    """
    hidden, moe, dse = config.hidden, config.moe, config.dse
    linear = 2.0 * config.vocab_size * hidden
    linear += 2.0 * len(dse.layers) * hidden * (2 * dse.width + dse.kernel_size)
    attention = 0.0
    for layer in range(config.num_layers):
        found = attention_of(config, layer).flops_per_token(config, seq_len)
        linear += found.linear + 2.0 * _feed_forward_parameters(config, layer)
        attention += found.attention
    expert = 2.0 * 3 * hidden * moe.expert_dim * len(config.moe_layers)
    active = linear + attention + expert * moe.top_k
    return {
        "linear": linear,
        "experts": expert * moe.top_k,
        "attention": attention,
        "active": active,
        "total": active + expert * (moe.num_experts - moe.top_k),
        "training": 3 * active,
    }
