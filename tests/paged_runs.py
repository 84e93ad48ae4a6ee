"""Texts on paged caches without an engine: chunks and single tokens of several sequences, in any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.cache_sizes import recent_reach
from sparseray.actors.serving.paged_model import Chunk, PagedModel
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.paged import PageCounts
from sparseray.model.transformer import Transformer

LONGEST, SLOTS = 200, 8


class Served:
    """A model on pages; a sequence is known by its slot, from 1 on.

    Args:
        model, experts, memory: what computes.
        page: tokens of a page.
    """

    def __init__(self, model: Transformer, experts: Experts, memory: Memory | None, *, page: int) -> None:
        self.experts, self.memory, per = experts, memory, -(-LONGEST // page)
        num, reach = 1 + SLOTS * per, recent_reach(model.config)
        counts = PageCounts(whole=num, recent=num if reach else 0)
        self.paged = PagedModel(model, num_pages=counts, page=page, num_slots=SLOTS, max_len=LONGEST)
        if reach:
            self.paged.place_recent({found: num - found for found in range(1, num)})
        order = (1 + torch.randperm(SLOTS * per, generator=torch.Generator().manual_seed(0))).view(SLOTS, per)
        self.leases = [
            Lease(pages=pages, length=0, max_len=LONGEST, slot=slot)
            for slot, pages in enumerate(order.tolist(), 1)
        ]
        self.known: list[list[int]] = [[] for _ in self.leases]
        for lease in self.leases:
            self.paged.begin(lease)

    def _chunks(self, pieces: Sequence[tuple[int, Tensor]]) -> list[Chunk]:
        found = []
        for slot, tokens_T in pieces:
            self.known[slot - 1] += tokens_T.tolist()
            lease = self.leases[slot - 1]
            found.append(Chunk(lease=lease, known=self.known[slot - 1], count=tokens_T.numel()))
        return found

    def read(self, pieces: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        """Hidden states [T, H] of the next tokens of some sequences, read as chunks."""
        chunks = self._chunks(pieces)
        found = self.paged.prefill(chunks, self.experts, self.memory)
        for chunk in chunks:
            chunk.lease.length += chunk.count
        return found

    def decode(self, pieces: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Logits [B, V] after one token of each of some sequences."""
        chunks = self._chunks(pieces)
        logits_BV = self.paged.decode(chunks, self.experts, self.memory).clone()
        for chunk in chunks:
            chunk.lease.length += 1
        return logits_BV

    def text(self, tokens_T: Tensor, sizes: Sequence[int], slot: int = 1) -> Tensor:
        """Hidden states of a text read in chunks of these sizes."""
        return torch.cat([self.read([(slot, piece)])[0] for piece in tokens_T.split(list(sizes))])


@torch.no_grad()
def greedy(
    model: Transformer, prompt_T: Tensor, num_tokens: int, *, experts: Experts, memory: Memory | None
) -> Tensor:
    """The most probable continuation, from a forward pass over the whole text for each token."""
    tokens_T = prompt_T
    for _ in range(num_tokens):
        hidden_BTH = model(tokens_T[None], experts=experts, memory=memory).hidden_BTH
        tokens_T = torch.cat([tokens_T, model.logits(hidden_BTH[0, -1:]).argmax(-1)])
    return tokens_T[len(prompt_T) :]
