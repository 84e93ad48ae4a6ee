"""`CacheSizes`: how many pages of each kind the caches of an engine have, and the bytes of them; pure arithmetic.

What a request holds of recent pages is bounded: those that its next rows read or write. So all requests together never
need more than `needed`, and an engine that has so many never waits for one. Where there are fewer pages at all, there is
a recent one for each.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import partial

import torch

from sparseray.actors.serving.cache_pool import CachePool
from sparseray.model.attention import attention_of
from sparseray.model.config import ModelConfig
from sparseray.model.paged import PageCounts
from sparseray.model.transformer import Transformer

PAGE, CPU_PAGE = 256, 16
"""Tokens of a page: kernels want long ones; short ones share more of a prefix."""
SPREAD, DRAFTING_SPREAD = 8, 32
"""Tokens from the first that is still computed for a request to its newest one; more with modules that lag behind."""
ENDS = 64
"""Pages for each recent one beyond what is needed, so that ends of prompts stay for those that go on there."""


def page_of(model: Transformer) -> int:
    """Tokens of a page: a CPU's are whole selection blocks."""
    if model.embedding.device.type == "cuda":
        return PAGE
    unit = model.config.nsa.select_block
    return -(-CPU_PAGE // unit) * unit


def recent_reach(config: ModelConfig) -> int:
    """Tokens before a row that any layer reads of recent pages; 0 where none has such.

    Args:
        config: of the model.
    """
    return max(attention_of(config, layer).recent_reach(config) for layer in range(config.num_blocks))


def page_bytes(config: ModelConfig, page: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a page, and of a recent page, in all pools.

    Args:
        config: the model.
        page: tokens of a page.
        dtype: of keys and values.
    """
    meta, found = torch.device("meta"), []
    for counts in (PageCounts(whole=1, recent=0), PageCounts(whole=0, recent=1)):
        pools = [
            attention_of(config, i).new_pool(config, counts, page, dtype, meta)
            for i in range(config.num_blocks)
        ]
        found.append(sum(t.numel() * t.element_size() for pool in pools for t in pool.tensors()))
    return found[0], found[1]


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """Of an engine's caches.

    Args:
        each: bytes of a page, and of a recent page.
        needed: recent pages that all requests together hold at most, with page 0; 0 where no layer has any.
    """

    each: tuple[int, int]
    needed: int

    @classmethod
    def of(
        cls, config: ModelConfig, *, page: int, dtype: torch.dtype, places: int, prompt_rows: int
    ) -> CacheSizes:
        """Those of an engine.

        Args:
            config: the model.
            page: tokens of a page.
            dtype: of keys and values.
            places: requests at a time.
            prompt_rows: tokens of all prompts together in a step.
        """
        reach, depth = recent_reach(config), config.mtp.depth
        span = reach + (DRAFTING_SPREAD + 2 * depth if depth else SPREAD)
        # N tokens in a row lie on (N + page - 2) // page + 1 pages at most, wherever the first one lies.
        needed = 1 + places + (places * (span + page - 2) + prompt_rows) // page
        return cls(each=page_bytes(config, page, dtype), needed=needed if reach else 0)

    def recent(self, num_pages: int) -> int:
        """Recent pages beside so many, page 0 of both included."""
        return min(num_pages, self.needed + num_pages // ENDS) if self.needed else 0

    def bytes(self, num_pages: int) -> int:
        """Of so many pages, with the recent ones beside them."""
        return num_pages * self.each[0] + self.recent(num_pages) * self.each[1]

    def fitting(self, most: int, cache_bytes: int | None) -> PageCounts:
        """As many pages as fit.

        Args:
            most: that are of any use.
            cache_bytes: of all; None for no limit.
        """
        whole = most
        if cache_bytes is not None:
            whole = bisect_right(range(most + 1), cache_bytes, key=partial(CacheSizes.bytes, self)) - 1
        return PageCounts(whole=whole, recent=self.recent(whole))


def new_pool(config: ModelConfig, counts: PageCounts, page: int, num_slots: int) -> CachePool:
    """The pages of a model's caches, all free.

    Args:
        config: the model.
        counts: how many there are.
        page: tokens of a page.
        num_slots: requests at a time.

    Raises:
        ConfigError: there is no page to give out.
    """
    kinds = [attention_of(config, layer) for layer in range(config.num_blocks)]
    # A module that predicts further tokens has read the next page's first ones.
    overlap = max(config.mtp.depth, *(kind.page_overlap(config) for kind in kinds))
    return CachePool(
        counts.whole,
        page,
        num_slots,
        keeps_state=bool(config.dse.layers),
        overlap=-(-overlap // page),
        num_recent=counts.recent,
        reach=recent_reach(config),
    )
