"""Inference on caches: chunks of several sequences at once, and plain greedy decoding.

`forward_chunks` is what a serving worker calls for each step of its batch: prefill chunks and single decode
tokens mixed as they come. Position-wise work runs on the rows of all chunks together, attention for each
sequence alone, and a sequence's hidden states have the same bits whatever else is in the call.

Shapes: T tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseray.model.cache import Cache
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.transformer import Transformer


def forward_chunks(
    model: Transformer,
    chunks: Sequence[tuple[Tensor, Cache]],
    *,
    experts: Experts,
    memory: Memory | None,
) -> list[Tensor]:
    """Run the next chunk of each sequence and append it to its cache.

    Args:
        model: the dense part.
        chunks: (tokens int64 [T], cache) of each sequence, T >= 1; no cache twice.
        experts: the routed experts.
        memory: the memory tables; None for a model without memory layers.

    Returns:
        Hidden states [T, H] of each chunk, after the final norm.

    Raises:
        ConfigError: a chunk is empty or does not fit its cache, or a cache is given twice.
    """
    return model.run_chunks(chunks, experts=experts, memory=memory)[0]


@torch.no_grad()
def greedy(
    model: Transformer,
    prompt_T: Tensor,
    num_tokens: int,
    *,
    experts: Experts,
    memory: Memory | None,
    chunk: int | None = None,
) -> Tensor:
    """Continue a prompt with the most probable tokens; the plain twin of the serving path.

    Args:
        model: the dense part.
        prompt_T: int64, at least one token.
        num_tokens: how many to add, at least 1.
        experts, memory: as in `forward_chunks`.
        chunk: prefill in chunks of this many tokens; None for one chunk.

    Returns:
        int64 [num_tokens].

    Raises:
        ConfigError: the prompt is empty, or prompt and continuation exceed the model's length.
    """
    cache = Cache(model.config, prompt_T.numel() + num_tokens, device=prompt_T.device)
    hidden_TH = prompt_T.new_zeros(0)
    for piece in torch.split(prompt_T, chunk or max(1, prompt_T.numel())):
        (hidden_TH,) = forward_chunks(model, [(piece, cache)], experts=experts, memory=memory)
    tokens = [model.logits(hidden_TH[-1:]).argmax(-1)]
    while len(tokens) < num_tokens:
        (hidden_TH,) = forward_chunks(model, [(tokens[-1], cache)], experts=experts, memory=memory)
        tokens.append(model.logits(hidden_TH).argmax(-1))
    return torch.cat(tokens)
