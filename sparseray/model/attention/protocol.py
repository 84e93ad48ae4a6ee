"""What the network, the caches and the counts need of a kind of attention, and all that they know about it.

A new kind is a class of these five methods, a name in `config.ATTENTIONS` and a line in `attention.ATTENTIONS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sparseray.kernels.ops import KeyValues, Ops
from sparseray.model.config import ModelConfig
from sparseray.model.layers import Angles, Batch
from sparseray.model.paged import PageCounts


class LayerCache(Protocol):
    """What one layer keeps of all sequences in inference; its attention alone knows what it is."""

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        ...


@dataclass(frozen=True, kw_only=True)
class AttentionFlops:
    """Operations of one token's forward pass.

    Attributes:
        linear: of the matrix products with weights.
        attention: of scores and values.
    """

    linear: float
    attention: float


class Attention(nn.Module, ABC):
    """The attention of one layer.

    Args:
        config: of the model.
        layer: 0-based, the index of its caches.
        ops: what it computes with.
    """

    num_readers = 1
    """Matrices that the normed hidden states are multiplied with."""
    takes_bounds = False
    """Whether chunks of prompts may have bounds that the device alone knows (`Pages`)."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.layer, self.ops = layer, ops

    @abstractmethod
    def forward(self, xs_RH: Sequence[Tensor], batch: Batch, angles: Angles) -> Tensor:
        """Attend within each sequence; [R, H].

        Args:
            xs_RH: normed hidden states, `num_readers` times.
            batch: which rows are whose; in inference it has pages and pools, to which the chunks are appended.
            angles: rotary encoding.
        """

    @classmethod
    @abstractmethod
    def new_pool(
        cls, config: ModelConfig, num_pages: PageCounts, page: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Empty pages of a layer for all sequences together.

        Args:
            num_pages: how many.
            page: tokens of a page.
        """

    @classmethod
    def recent_reach(cls, config: ModelConfig) -> int:
        """Tokens before a row that are read of recent pages when it is computed; 0: the layer has none."""
        return 0

    @classmethod
    def page_overlap(cls, config: ModelConfig) -> int:
        """Tokens after the end of a page of `new_pool` that what it keeps depends on too."""
        return 0

    @classmethod
    @abstractmethod
    def num_parameters(cls, config: ModelConfig) -> int:
        """Parameters of a layer."""

    @classmethod
    @abstractmethod
    def keys_per_query(cls, config: ModelConfig, seq_len: int) -> dict[str, float]:
        """Mean number of keys that a query reads in each branch, over the positions of a sequence."""

    @classmethod
    @abstractmethod
    def flops_per_token(cls, config: ModelConfig, seq_len: int) -> AttentionFlops:
        """Operations of a layer's forward pass for a token, averaged over a sequence."""


def score_flops(config: ModelConfig, keys: dict[str, float]) -> float:
    """Operations of scores and values of all query heads, for queries that read so many keys a branch."""
    return 2 * sum(keys.values()) * config.num_heads * (config.head_dim + config.value_dim)


def new_pages(
    config: ModelConfig, num_pages: int, page: int, dtype: torch.dtype, device: torch.device
) -> KeyValues:
    """Keys [pages, page, G, D] and values [pages, page, G, V], zeros: kernels read beyond a sequence's end."""
    shape = (num_pages, page, config.num_kv_heads)
    k, v = (
        torch.zeros(*shape, width, dtype=dtype, device=device)
        for width in (config.head_dim, config.value_dim)
    )
    return k, v
