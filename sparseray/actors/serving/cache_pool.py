"""`CachePool`: which pages of the paged caches belong to which request; host memory only.

A request gets all its pages when it begins, so that it never waits half way; without enough of them it waits in
the queue. Pages of whole prompt pages are found again by a hash of the tokens up to their end, and are then held by
several requests; they are never written again. A page that nobody holds keeps its tokens' hash until it is given
to somebody else, the longest unused first. Page 0 belongs to nobody (model/paged.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from sparseray.errors import ConfigError


@dataclass(kw_only=True)
class Lease:
    """The pages of one request.

    Args:
        pages: in the order of its positions.
        length: tokens whose keys and values are in them; at first those of a shared prefix.
        max_len: tokens that the request may have.
        slot: its place among the requests of the engine, from 1 on.
        keys: hash of the prompt up to the end of each of its whole pages.
        state: what the engine stored with the last shared page.
        stop: tokens after which the engine stores a state, so that a prompt that begins alike shares all it can.
    """

    pages: list[int]
    length: int
    max_len: int
    slot: int
    keys: list[bytes] = field(default_factory=list)
    state: dict[int, Tensor] | None = None
    stop: int = 0


def page_keys(tokens: Sequence[int], page: int) -> list[bytes]:
    """A hash of the tokens up to the end of every whole page.

    Args:
        tokens: of a prompt.
        page: tokens of a page.
    """
    found, digest = [], b""
    values = np.array(tokens[: len(tokens) // page * page], dtype="<i4").reshape(-1, page)
    for row in values:
        digest = blake2b(digest + row.tobytes(), digest_size=16).digest()
        found.append(digest)
    return found


class CachePool:
    """Gives out pages and slots.

    Args:
        num_pages: with page 0.
        page: tokens of a page.
        num_slots: requests at a time.
        keeps_state: a prefix is shared only where the engine stored a state with its end.
        overlaps: what a page keeps depends on the next page too (blocks of NSA's compression reach over its end), so
            of the pages that are known, the last is computed again.

    Raises:
        ConfigError: there is no page to give out.
    """

    def __init__(
        self,
        num_pages: int,
        page: int,
        num_slots: int,
        *,
        keeps_state: bool = False,
        overlaps: bool = False,
    ) -> None:
        if num_pages < 2:
            raise ConfigError(
                f"the cache has room for {num_pages} pages of {page} tokens; raise serve.cache_gib, or serve a"
                " smaller model"
            )
        self.num_pages, self.page = num_pages, page
        self.keeps_state, self.overlaps = keeps_state, overlaps
        self._free: dict[int, None] = dict.fromkeys(range(1, num_pages))
        self._holders = [0] * num_pages
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._states: dict[int, dict[int, Tensor]] = {}
        self._slots = list(range(num_slots, 0, -1))
        self.shared_tokens = 0

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest request that fits an empty pool."""
        return (self.num_pages - 1) * self.page

    @property
    def usage(self) -> float:
        """Pages that requests hold, of all."""
        return 1.0 - len(self._free) / (self.num_pages - 1)

    def acquire(self, prompt: Sequence[int], max_len: int, keys: list[bytes] | None = None) -> Lease | None:
        """Give a request its pages, shared ones first; None while there are not enough.

        Args:
            prompt: its tokens; at least one of them is left to compute.
            max_len: tokens that it may have.
            keys: `page_keys` of the prompt, where they are known.
        """
        needed = -(-max_len // self.page)
        keys = page_keys(prompt, self.page) if keys is None else keys
        shared = self._shared(keys[: (len(prompt) - 1) // self.page])
        free = len(self._free) - sum(1 for page in shared if page in self._free)
        if not self._slots or needed - len(shared) > free:
            return None
        for page in shared:
            self._hold(page)
        pages = shared + [self._take() for _ in range(needed - len(shared))]
        length = len(shared) * self.page
        self.shared_tokens += length
        reusable = (len(prompt) - 1) // self.page - self.overlaps if self.keeps_state else 0
        return Lease(
            pages=pages,
            length=length,
            max_len=max_len,
            slot=self._slots.pop(),
            keys=keys,
            state=self._states.get(shared[-1]) if shared else None,
            stop=reusable * self.page,
        )

    def _shared(self, keys: Sequence[bytes]) -> list[int]:
        """Pages that hold the longest known prefix."""
        pages: list[int] = []
        for key in keys:
            if key not in self._by_key:
                break
            pages.append(self._by_key[key])
        if self.overlaps:
            pages = pages[:-1]
        while self.keeps_state and pages and pages[-1] not in self._states:
            pages.pop()
        return pages

    def _hold(self, page: int) -> None:
        self._free.pop(page, None)
        self._holders[page] += 1

    def _take(self) -> int:
        page = next(iter(self._free))
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._by_key[key]
        self._states.pop(page, None)
        self._hold(page)
        return page

    def publish(self, lease: Lease, state: dict[int, Tensor] | None = None) -> None:
        """Let others find the whole pages of a request's prompt that are filled.

        Args:
            lease: whose keys and values are there, or will be before anything that is started later.
            state: what the engine needs to go on after the last of them.
        """
        filled = min(lease.length // self.page, len(lease.keys))
        for key, page in zip(lease.keys[:filled], lease.pages):
            if key not in self._by_key:
                self._by_key[key], self._key_of[page] = page, key
        if state is not None and filled and lease.length == filled * self.page:
            last = self._by_key[lease.keys[filled - 1]]
            self._states[last] = state

    def forget(self, lease: Lease) -> None:
        """Let nobody find a request's pages any more: what they shall hold has not been computed."""
        for page in lease.pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._by_key[key]
            self._states.pop(page, None)

    def release(self, lease: Lease) -> None:
        """Take a request's pages and slot back."""
        # The end of a prefix is given away before its beginning.
        for page in reversed(lease.pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free[page] = None
        self._slots.append(lease.slot)
        lease.pages = []


def table_of(lease: Lease, width: int) -> Tensor:
    """A request's row of the table, int32 [width]; page 0 after its end.

    Args:
        lease: of the request.
        width: pages of a row.
    """
    row = torch.zeros(width, dtype=torch.int32)
    row[: len(lease.pages)] = torch.tensor(lease.pages, dtype=torch.int32)
    return row
