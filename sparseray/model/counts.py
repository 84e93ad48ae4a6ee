"""How many parameters a model has, and how many floating-point operations a token costs.

Pure arithmetic on the configuration, for reports, plans and utilisation figures; "active" is what one token
uses, "total" is all that exists. A multiplication and an addition are two operations.
"""

from __future__ import annotations

import numpy as np

from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import draw_primes


def _attention_parameters(config: ModelConfig, layer: int) -> int:
    hidden, heads, kv = config.hidden, config.num_heads, config.num_kv_heads
    size, value = config.head_dim, config.value_dim
    out = heads * value * hidden
    if config.attention[layer] == "full":
        return hidden * (heads * size + kv * (size + value)) + out
    keys = kv * (1 if config.nsa.shared_kv else 3)
    projections = hidden * (heads * size + keys * (size + value) + 3 * heads) + out
    return projections + sum(_compressor_parameters(config, width) for width in (size, value))


def _compressor_parameters(config: ModelConfig, width: int) -> int:
    inner, block = config.nsa.compress_hidden or 2 * width, config.nsa.block
    return block * width + inner * (block * width + 1) + width * (inner + 1)


def _memory_layer_parameters(config: ModelConfig) -> int:
    """The fusion of one memory layer: projections, three norms and the convolution."""
    return config.hidden * (2 * config.dse.width + 2 + 3 + config.dse.kernel_size)


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
        dense += _attention_parameters(config, layer)
        if layer in config.moe_layers:
            dense += hidden * moe.num_experts + 3 * hidden * moe.num_shared * moe.expert_dim
        else:
            dense += 3 * hidden * config.dense_width(layer)
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

    The selected count is of causal keys in whole blocks and the query's own; exact when num_local is at
    least 1.
    """
    t = np.arange(seq_len)
    if config.attention[layer] == "full":
        return {"full": float((t + 1).mean())}
    nsa = config.nsa
    compressed = np.maximum(0, (t + 1 - nsa.block) // nsa.stride + 1)
    # All selected blocks are whole but the query's own, which ends at the query.
    whole = np.minimum(t // nsa.select_block, nsa.num_selected - 1) * nsa.select_block
    selected = whole + t % nsa.select_block + 1
    return {
        "compressed": float(compressed.mean()),
        "selected": float(selected.mean()),
        "window": float(np.minimum(t + 1, nsa.window).mean()),
    }


def flops_per_token(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Operations of the forward pass, averaged over the tokens of a sequence.

    Args:
        config: of the model.
        seq_len: tokens of the sequence.

    Returns:
        "linear": projections, MLPs, router, shared experts and head; "experts": the chosen routed experts;
        "attention": scores and values; "active": their sum, which a token costs; "total": the same if every
        routed expert ran; "training": forward and backward, 3 * active.
    """
    counts = count_parameters(config)
    hidden, moe, head = config.hidden, config.moe, config.vocab_size * config.hidden
    linear = counts["dense"] - counts["embedding"] + head
    attention = 0.0
    for layer in range(config.num_layers):
        keys = sum(keys_per_query(config, layer, seq_len).values())
        attention += 2 * keys * config.num_heads * (config.head_dim + config.value_dim)
        if config.attention[layer] == "nsa":
            # A compressor runs once for each stride and key/value head, not once for each token.
            size = sum(_compressor_parameters(config, w) for w in (config.head_dim, config.value_dim))
            per_token = (max(0, seq_len - config.nsa.block) // config.nsa.stride + 1) / seq_len
            if seq_len < config.nsa.block:
                per_token = 0.0
            linear += int(size * (per_token * config.num_kv_heads - 1))
    expert = 2.0 * 3 * hidden * moe.expert_dim * len(config.moe_layers)
    active = 2.0 * linear + attention + expert * moe.top_k
    return {
        "linear": 2.0 * linear,
        "experts": expert * moe.top_k,
        "attention": attention,
        "active": active,
        "total": active + expert * (moe.num_experts - moe.top_k),
        "training": 3 * active,
    }
