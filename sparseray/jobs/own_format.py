"""Models that Hugging Face's format has no words for, as an export of a type of our own: tensors by our names, and a page
that says what each is.

Nothing has to be run to read such an export: it is safetensors, JSON and that page, FORMAT.md, from which the network can
be written anew (tests/test_hub_own_format.py does).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparseray.model.config import ModelConfig
from sparseray.model.hub import Entry
from sparseray.platform.config import to_dict

TYPE, PAGE = "sparseray", "FORMAT.md"
LAYOUT_FILES = ("dse_layout.json", "dse_token_map.bin")
"""Of a model with conditional memory: which rows a text addresses."""


def own_entries(tensors: Mapping[str, Mapping[str, Any]]) -> Iterator[Entry]:
    """Every tensor of a checkpoint but the optimizer's, by its own name.

    Args:
        tensors: of the checkpoint's manifest.
    """
    for name, saved in tensors.items():
        if "@" not in name:
            yield Entry(name=name, shape=tuple(saved["shape"]), theirs=(name,))


def own_config(model: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model: a few keys that other tools look for, and all settings under `model`."""
    end = model.dse.document_end_id
    return {
        "model_type": TYPE,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "eos_token_id": end if end >= 0 else None,
        "model": to_dict(model),
    }


def page(model: ModelConfig, entries: Sequence[Entry]) -> str:
    """Say what every tensor of a model is, and how it is computed.

    Args:
        model: its configuration.
        entries: its tensors.
    """
    parts = [HEAD, _table(entries), NETWORK]
    kinds = {*model.attention}
    for is_there, text in (
        ("full" in kinds, FULL),
        ("nsa" in kinds, NSA),
        ("mla" in kinds, MLA),
        (bool(model.moe_layers), MOE),
        (bool(model.dse.layers), MEMORY),
        (bool(model.mtp.depth), MTP),
    ):
        parts += [text] if is_there else []
    return "\n".join(parts)


def _table(entries: Sequence[Entry]) -> str:
    """Names with numbers left out, their shapes and how many there are."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for entry in entries:
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "N", entry.name), []).append(entry.shape)
    rows = ["| name | shape | number |", "|---|---|---|"]
    for name, shapes in sorted(found.items()):
        shown = " or ".join(str(list(shape)) for shape in sorted(set(shapes))[:4])
        rows.append(f"| `{name}` | {shown} | {len(shapes)} |")
    return "\n".join(rows) + "\n"


HEAD = """# A model of sparseray

`config.json` has the settings under `model` (`m` below); the shards are safetensors with an index; `tokenizer.json` is of the
tokenizers library. Matrices are [outputs, inputs]: y = W x. N stands for the number of a layer, expert, bucket or module, from 0.
"""
NETWORK = """
## Network

norm(x, w) = x / sqrt(mean(x^2) + m.norm_eps) * w, in fp32. h = rows of `embedding`; then for every layer, in this order, what it has:
h += memory(h); h += attention(norm(h, `attention_norm`)); h += mlp(norm(h, `ffn_norm`)), where mlp is `ffn` or `moe`.
logits = `head` (`embedding` where m.tie_embeddings) x norm(h, `final_norm`).
`gate_up` and `down`: the first half of gate_up's rows is the gate, mlp(x) = down (silu(gate x) * (up x)).

Rotary encoding turns channels i and i + D/2 of a head of D = m.head_dim by position * m.rope_theta^(-2i/D). With
m.rope.scaling = yarn: frequencies of the released formula (arXiv 2309.00071; beta_fast, beta_slow, factor, original_max_seq_len),
s(x) = 0.1 x ln(factor) + 1; the cosines and sines are multiplied by s(mscale) / s(mscale_all_dim) (s(1) where one of them is 0) and
scores by s(mscale_all_dim)^2.
"""
FULL = """
## Attention: full

`qkv` gives m.num_heads queries, then m.num_kv_heads keys, then as many values of m.v_head_dim (m.head_dim where null); queries and
keys are turned. Query head q reads key/value head q // (num_heads / num_kv_heads). Causal softmax of q k / sqrt(D), then `out`.
"""
NSA = """
## Attention: nsa (arXiv 2502.11089)

`qkv` gives the queries, then keys of the selected, window and compressed branch, then values of the selected, window and
compressed branch (with m.nsa.shared_kv one of each for all). Queries and the first two keys are turned; compressed keys are
made of unturned ones. Compression (`compress_k`, `compress_v`): block c is the tokens from c * stride on, `block` of them;
`pos` is added, they are put one after another, token by token, and pass down gelu(up x) (exact GELU, with biases); a compressed
key is then turned at the position of its block's first token. A block is seen from its last token on.
A selection block's score is the sum, over the heads of a group and over m < select_block / stride, n < block / stride, of the
compressed branch's probability at (select_block / stride) j + m - n. The first num_initial and the last num_local blocks that a query
has reached are always among the num_selected best; ties go to the lower block. Window: the last `window` positions.
All three are causal softmax attention with 1 / sqrt(D); the output is the sum of the branches times sigmoid(`gate` x), which has
three numbers a head: compressed, selected, window. Then `out`.
"""
MLA = """
## Attention: mla (arXiv 2405.04434)

Queries: `q`, or `q_up` norm(`q_down` x, `q_norm`); of a head first m.mla.qk_nope_head_dim channels, then qk_rope_head_dim that are turned.
`kv_down` gives the latent (kv_lora_rank) and the turned part of the key, which all heads share; `kv_up` norm(latent, `kv_norm`) gives
of each head the rest of the key, then the value (v_head_dim). Here channels 2i and 2i + 1 turn together, with D = qk_rope_head_dim;
both inner norms have an eps of 1e-6. Causal softmax with s(mscale_all_dim)^2 / sqrt(qk_nope_head_dim + qk_rope_head_dim), then `out`.
"""
MOE = """
## Experts (arXiv 2401.06066, 2412.19437)

Scores: sigmoid (m.moe.router = v3), else softmax, of `router` x, in fp32. v3 chooses by score + `router_bias`; the others have no
use of it. With num_groups groups of neighbouring experts, the topk_groups best may be used: by the sum of their
group_scores largest (top_k / topk_groups where 0) in v3, by the largest else. The top_k best are chosen, ties to the lower
number; weights are the scores without bias, over their sum (+ 1e-20) where m.moe.normalize is true (null: in v3; always in gshard), times
scaling (v2, v3). Expert N is `experts.N.down` (silu(`experts.N.gate` x) * (`experts.N.up` x)). The sum is added to `shared`.
"""
MEMORY = """
## Memory (arXiv 2601.07372)

The table of layer N is `dse.N.bucket.0`, `.1`, ... one below the other. `dse_token_map.bin` (int64, little-endian) has the compressed
id of every token, `dse_layout.json` multipliers [layers][distance] and primes [layers][orders][heads]. For an order n, mix = x_t m_0 XOR
x_(t-1) m_1 XOR ... (n terms, int64); the row of a head is mix mod its prime, plus the primes of the heads and orders before it. Before the
text, and where m.dse.reset_at_document before the token after m.dse.document_end_id, x is `pad`.
The rows of a token, by order and head one after another, pass `key_value` (with bias): key, then value. v = sigmoid(r) * value, where
r = sign(d) sqrt(max(|d|, 1e-6)), d = norm(h, `query_norm`) . norm(key, `key_norm`) / sqrt(hidden), with m.dse.gate_eps. memory(h) = v +
silu(conv(norm(v, `value_norm`))), with conv_eps; conv: y_t = sum over j of `conv.weight`[:, K-1-j] * x_(t - j max(orders)), K = kernel_size,
within a document.
"""
MTP = """
## Modules for further tokens (arXiv 2412.19437)

Module k takes u = hidden states after `final_norm` of the network (of module k - 1: after its own) at position i and the embedding e of
token i + k + 1: `projection` [norm(e, `embedding_norm`); norm(u, `hidden_norm`)] passes `block`, a layer like the last one, at position i;
after its `final_norm` the network's head gives token i + k + 2. Its experts are `layers.L.moe.experts.N` with L = m.num_layers + k.
"""
