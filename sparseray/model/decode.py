"""Plain greedy decoding on a cache, one sequence alone: the twin of the serving path, for tests.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseray.model.cache import Cache
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.transformer import Transformer


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
    """Continue a prompt with the most probable tokens.

    Args:
        model: the dense part.
        prompt_T: int64, at least one token.
        num_tokens: how many to add, at least 1.
        experts, memory: as in `Transformer.run_chunks`.
        chunk: prefill in chunks of this many tokens; None for one chunk.

    Returns:
        int64 [num_tokens].

    Raises:
        ConfigError: the prompt is empty, or prompt and continuation exceed the model's length.
    """
    cache = Cache(model.config, prompt_T.numel() + num_tokens, device=prompt_T.device)
    hidden_TH = prompt_T.new_zeros(0)
    for piece in torch.split(prompt_T, chunk or max(1, prompt_T.numel())):
        (hidden_TH,) = model.run_chunks([(piece, cache)], experts=experts, memory=memory)
    tokens = [model.logits(hidden_TH[-1:]).argmax(-1)]
    while len(tokens) < num_tokens:
        (hidden_TH,) = model.run_chunks([(tokens[-1], cache)], experts=experts, memory=memory)
        tokens.append(model.logits(hidden_TH).argmax(-1))
    return torch.cat(tokens)
