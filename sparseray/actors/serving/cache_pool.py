"""`CachePool`: which pages of the paged caches belong to which request; host memory only.

A request gets all its pages when it begins, so that it never waits half way; without enough of them it waits in
the queue. Pages of whole prompt pages are found again by a hash of the tokens up to their end, and are then held by
several requests; they are never written again. A page that nobody holds keeps its tokens' hash until it is given
to somebody else, the longest unused first. Page 0 belongs to nobody (model/paged.py).

What layers read of the newest tokens alone lies on recent pages (recent_pages.py): a request takes those of a page when
it comes to write there, and gives them back once it has moved on. Others can go on only after pages whose recent ones, as
far as the next row reads, are still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.serving.recent_pages import END, LOST, MIDST, RecentPages
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
        recent: first of its pages with a recent page that it holds, and the one after the last.
        ends: likewise, ranges of its pages whose recent ones a later prompt is likely to ask for.
    """

    pages: list[int]
    length: int
    max_len: int
    slot: int
    keys: list[bytes] = field(default_factory=list)
    state: dict[int, Tensor] | None = None
    stop: int = 0
    recent: tuple[int, int] = (0, 0)
    ends: tuple[tuple[int, int], ...] = ()


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
        overlap: pages after a page that what it keeps depends on too (blocks of NSA's compression reach over its end), so
            of the pages that are known, so many are computed again.
        num_recent: recent pages, with page 0.
        reach: tokens before a row that are read of recent pages; 0: there are none.

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
        overlap: int = 0,
        num_recent: int = 0,
        reach: int = 0,
    ) -> None:
        if num_pages < 2:
            raise ConfigError(
                f"the cache has room for {num_pages} pages of {page} tokens; raise serve.cache_gib, or serve a"
                " smaller model"
            )
        self.num_pages, self.page = num_pages, page
        self.keeps_state, self.overlap = keeps_state, overlap
        self._free: dict[int, None] = dict.fromkeys(range(1, num_pages))
        self._holders = [0] * num_pages
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._states: dict[int, dict[int, Tensor]] = {}
        self._slots = list(range(num_slots, 0, -1))
        self.shared_tokens = 0
        self.reach, self.recent = reach, RecentPages(num_recent, num_pages) if reach else None

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
        known = self._known(keys[: (len(prompt) - 1) // self.page])
        shared = known[: self._usable(known)]
        free = len(self._free) - sum(1 for page in shared if page in self._free)
        if not self._slots or needed - len(shared) > free:
            return None
        for page in shared:
            self._hold(page)
        first = self._first_read(len(shared))
        if self.recent is not None:
            for page in shared[first:]:
                self.recent.hold(page)
        pages = shared + [self._take() for _ in range(needed - len(shared))]
        length = len(shared) * self.page
        self.shared_tokens += length
        reusable = max(0, (len(prompt) - 1) // self.page - self.overlap)
        return Lease(
            pages=pages,
            length=length,
            max_len=max_len,
            slot=self._slots.pop(),
            keys=keys,
            state=self._states.get(shared[-1]) if shared else None,
            stop=reusable * self.page if self.keeps_state else 0,
            recent=(first, len(shared)),
            # Where others parted from this prompt, or this one from theirs, and where it ends.
            ends=((self._first_read(len(known)), len(known)), (self._first_read(reusable), len(keys))),
        )

    def _known(self, keys: Sequence[bytes]) -> list[int]:
        """Pages that hold the longest known prefix."""
        pages: list[int] = []
        for key in keys:
            if key not in self._by_key:
                break
            pages.append(self._by_key[key])
        return pages[: max(0, len(pages) - self.overlap)]

    def _usable(self, pages: Sequence[int]) -> int:
        """The most of a prefix's pages after which a request can go on."""
        found = there = 0
        for count, page in enumerate(pages, 1):
            # Pages in a row, up to this one, whose recent pages are there.
            there = there + 1 if self.recent is None or self.recent.has(page) else 0
            if there >= count - self._first_read(count) and (not self.keeps_state or page in self._states):
                found = count
        return found

    def _first_read(self, count: int) -> int:
        """The first page whose recent page the first row after so many pages reads."""
        return max(0, count * self.page - self.reach) // self.page

    def extend(self, lease: Lease, end: int) -> None:
        """Give a request the recent pages up to a position.

        Args:
            lease: of the request.
            end: position after the last one that is written.
        """
        first, last = lease.recent
        if self.recent is not None and end > last * self.page:
            stop = min(-(-end // self.page), len(lease.pages))
            for page in lease.pages[last:stop]:
                self.recent.hold(page)
            lease.recent = first, max(last, stop)

    def trim(self, lease: Lease, position: int) -> None:
        """Take a request's recent pages back that no row from a position on reads.

        A later prompt probably goes on where another one ended or left it, so what is read there is kept longest.

        Args:
            lease: of the request.
            position: of the first row that it may still compute.
        """
        stop = (position - self.reach) // self.page
        if stop > lease.recent[0]:
            self._give_back(lease, stop)

    def _give_back(self, lease: Lease, stop: int) -> None:
        first, last = lease.recent
        if self.recent is None:
            return
        for index in range(first, min(stop, last)):
            page, worth = lease.pages[index], MIDST
            if page not in self._key_of:
                worth = LOST
            elif any(start <= index < end for start, end in lease.ends):
                worth = END
            self.recent.give_back(page, worth)
        lease.recent = stop, max(stop, last)

    def _hold(self, page: int) -> None:
        self._free.pop(page, None)
        self._holders[page] += 1

    def _take(self) -> int:
        page = next(iter(self._free))
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._by_key[key]
        self._states.pop(page, None)
        if self.recent is not None:
            self.recent.drop(page)
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
            known = self._by_key.get(key)
            if known is None or self._has_more(page, known):
                self._by_key[key], self._key_of[page] = page, key
                if known is not None:
                    del self._key_of[known]
                    if known in self._states:
                        self._states[page] = self._states.pop(known)
        if state is not None and filled and lease.length == filled * self.page:
            last = self._by_key[lease.keys[filled - 1]]
            self._states[last] = state

    def _has_more(self, page: int, known: int) -> bool:
        """Whether a page can be gone on from where another one with the same tokens cannot."""
        return self.recent is not None and self.recent.has(page) and not self.recent.has(known)

    def forget(self, lease: Lease) -> None:
        """Let nobody find a request's pages any more: what they shall hold has not been computed."""
        for page in lease.pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._by_key[key]
            self._states.pop(page, None)

    def release(self, lease: Lease) -> None:
        """Take a request's pages and slot back."""
        self._give_back(lease, len(lease.pages))
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
