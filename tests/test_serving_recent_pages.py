"""Recent pages: what is given back is never read again, what is kept is found again, and there are always enough."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_serving_drafting
import torch
from serving_parts import (
    MAX_MODEL_LEN,
    Parts,
    make_parts,
    moved_after,
    request_of,
    run,
    run_failing,
    tokens_of,
)
from test_serving_paged import REQUESTS, prompt_of

from sparseray.actors.serving.cache_pool import CachePool, Lease
from sparseray.actors.serving.cache_sizes import CacheSizes, new_pool
from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.engine import Ongoing
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.recent_pages import RecentPages
from sparseray.actors.serving.speculative_engine import SpeculativeEngine
from sparseray.actors.serving.text_request import TokenEvent
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.paged import DraftState
from sparseray.model.attention.nsa import NSAPool
from sparseray.model.config import DSEConfig, MTPConfig, NSAConfig
from sparseray.model.paged import PageCounts
from sparseray.model.presets import preset
from sparseray.platform.config import load_yaml

CONFIGS = Path(__file__).parent.parent / "configs"
# A window that is no multiple of a page; blocks as long as two pages; a window within a page, shorter than a block.
SIZES = {
    "odd": (16, NSAConfig(window=21, num_selected=3)),
    "short pages": (8, NSAConfig(window=37, num_selected=3)),
    "narrow": (32, NSAConfig(window=3, num_selected=3)),
}
Events = dict[str, list[TokenEvent]]


@pytest.fixture(scope="module", params=SIZES)
def sized(request: pytest.FixtureRequest) -> tuple[int, Parts]:
    """Tokens of a page, and a model of full and sparse attention with a memory, and one module for further tokens."""
    page, nsa = SIZES[request.param]
    return page, make_parts(nsa=nsa, mtp=MTPConfig(depth=1))


def engine_of(sized: tuple[int, Parts], kind: type[PagedEngine] = PagedEngine, **options: Any) -> PagedEngine:
    page, parts = sized
    options = {"max_batch": 4, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 32, "page": page, **options}
    return kind(parts.model, parts.experts, parts.memory, grammars=parts.grammars, **options)


def keeping(sized: tuple[int, Parts], kind: type[PagedEngine] = PagedEngine) -> PagedEngine:
    """An engine that gives nothing back before a request ends."""
    engine = engine_of(sized, kind, prefill_chunk=100_000)
    # For so long a chunk there is a recent page for every page; of what it reaches back to nothing is behind.
    engine.pool.reach = MAX_MODEL_LEN
    return engine


class Recording(SpeculativeEngine):
    """Notes what it drafts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.drafted: list[tuple[str, int, list[int]]] = []

    def _usable(self, sequence: Ongoing, drafts: list[int]) -> list[int]:
        self.drafted.append((sequence.request.request_id, len(sequence.tokens), drafts))
        return super()._usable(sequence, drafts)


def nsa_pools(engine: PagedEngine) -> list[NSAPool]:
    return [pool for pool in engine.paged.pools if isinstance(pool, NSAPool)]


def poisoned(engine: PagedEngine, places: int | None = None) -> RecentPages:
    """Let an engine have as many recent pages as it needs at most, which are NaN whenever they are nobody's.

    Args:
        engine: that has computed nothing.
        places: requests at a time, where there will be fewer.
    """
    page, config = engine.pool.page, engine.model.config
    rows = {"places": places or engine.places, "prompt_rows": engine.prefill_chunk}
    needed = CacheSizes.of(config, page=page, dtype=torch.float32, **rows).needed
    whole = engine.pool.num_pages
    counts = PageCounts(whole=whole, recent=min(whole, needed))
    engine.pool = new_pool(config, counts, page, engine.places)
    recent = engine.pool.recent
    assert recent is not None
    take, give_back = recent._take, recent.give_back

    def spoil(found: slice | int) -> None:
        for pool in nsa_pools(engine):
            for cache in (*pool.window, *pool.raw):
                cache[found] = torch.nan

    def taken() -> int:
        found = take()
        spoil(found)
        return found

    def given_back(page: int, worth: int) -> None:
        found = recent._of[page]
        give_back(page, worth)
        if not recent.has(page):
            spoil(found)

    recent._take, recent.give_back = taken, given_back  # type: ignore[method-assign]
    spoil(slice(None))
    return recent


def told(events: Events) -> dict[str, list[int]]:
    return {name: tokens_of(found) for name, found in events.items()}


LONG = [
    request_of(f"long{i}", prompt_of(30 + 23 * i, 20 + i), max_tokens=MAX_MODEL_LEN - 30 - 23 * i, seed=i)
    for i in range(5)
]


@pytest.fixture(scope="module")
def wanted(sized: tuple[int, Parts]) -> dict[str, list[int]]:
    return told(run(keeping(sized), [*REQUESTS, *LONG]))


@pytest.mark.one_in(12)
@pytest.mark.parametrize("chunk", [5, 32, 300])
def test_pages_that_were_given_back_are_never_read(
    sized: tuple[int, Parts], wanted: dict[str, list[int]], chunk: int
) -> None:
    engine = engine_of(sized, prefill_chunk=chunk)
    recent = poisoned(engine)
    assert told(run(engine, [*REQUESTS, *LONG])) == wanted
    assert recent.num_held == 0 and engine.cache_usage == 0.0 and engine.stats.failed_steps == 0


@pytest.mark.long
def test_nor_with_drafts_or_after_failures_or_a_move(
    sized: tuple[int, Parts], wanted: dict[str, list[int]]
) -> None:
    drafting, asked = engine_of(sized, Recording), [*REQUESTS, *LONG]
    poisoned(drafting)
    assert told(run(drafting, asked)) == wanted
    failing = engine_of(sized, max_failures=9)
    poisoned(failing)
    assert told(run_failing(failing, LONG)) == {r.request_id: wanted[r.request_id] for r in LONG}
    whole = {
        name: [TokenEvent(request_id=name, index=i, token_id=t) for i, t in enumerate(found)]
        for name, found in wanted.items()
    }
    moved, there = moved_after(7, asked, whole), engine_of(sized)
    poisoned(there)
    assert told(run(there, moved)) == {r.request_id: wanted[r.request_id][7:] for r in moved}


@pytest.mark.long
@pytest.mark.parametrize("worth", [0.0, 1.1], ids=["always", "with rests"])
@pytest.mark.parametrize("has_memory", [False, True], ids=["tokens alone", "memory"])
def test_nor_with_drafts_that_the_device_judges_one_step_ahead(has_memory: bool, worth: float) -> None:
    """With rests the module reads what it has missed, from a window before that on."""
    keys = {} if has_memory else {"dse": DSEConfig()}
    parts = make_parts(REFERENCE, nsa=SIZES["odd"][1], mtp=MTPConfig(depth=1), **keys)
    asked = [replace(request, temperature=0.0) for request in LONG]
    wanted = told(run(parts.engine(prefill_chunk=100_000), asked))
    texts = {r.request_id: [*r.prompt_tokens, *wanted[r.request_id]] for r in asked}
    engine = test_serving_drafting.told(parts, texts, test_serving_drafting.AheadEngine, page=16)
    engine.worth = worth
    poisoned(engine)
    assert told(run(engine, asked)) == wanted
    assert engine.take_counts().accepted[1] > (10 if worth else 100)


@pytest.mark.one_in(3)
def test_modules_that_lag_behind_draft_what_they_would(sized: tuple[int, Parts]) -> None:
    """After steps without drafts they read what they have missed, from a window before that on."""
    plain, poor = (keeping(sized, Recording), engine_of(sized, Recording))
    poisoned(poor)
    found = []
    for engine in (plain, poor):
        assert isinstance(engine, Recording)
        run(engine, LONG[:2])
        found.append(sorted(x for x in engine.drafted if x[1] > len(LONG[1].prompt_tokens)))
    assert found[0] == found[1] and len(found[0]) > 10


@pytest.mark.long
@pytest.mark.parametrize("worth", [0.0, 1.1], ids=["always", "with rests"])
@pytest.mark.parametrize("size", SIZES)
def test_a_module_drafts_on_the_device_what_it_would(size: str, worth: float) -> None:
    """After steps without drafts it reads what it has missed, from a window before that on."""
    page, nsa = SIZES[size]
    sized, found = (page, make_parts(REFERENCE, nsa=nsa, mtp=MTPConfig(depth=1))), []
    for is_poor in (False, True):
        engine = (engine_of if is_poor else keeping)(sized, DraftingEngine)
        assert isinstance(engine, DraftingEngine)
        engine.worth, model, noted = worth, engine._drafting, dict[tuple[int, int], int]()
        if is_poor:
            poisoned(engine)

        def note(*_: Any, state_S: DraftState = model.state_S, noted: Any = noted) -> None:
            for slot in (1, 2):
                noted[slot, int(state_S.length_S[slot])] = int(state_S.draft_S[slot])

        model._drafted_anew = note  # type: ignore[method-assign]
        run(engine, LONG[:2])
        found.append(noted)
    # How steps follow one another differs with the chunks of prompts.
    both = found[0].keys() & found[1].keys()
    assert [key for key in sorted(both) if found[0][key] != found[1][key]] == [] and len(both) > 5


def test_a_prefix_is_shared_only_where_its_recent_pages_are_there(sized: tuple[int, Parts]) -> None:
    """With those that one request needs, what a long one came to hold cannot be gone on from."""
    page, _ = sized
    # The last page that is known is computed again: from where a chunk ended, and a state was stored.
    prefix = prompt_of(128 + page)
    asked = [request_of(str(i), prefix + prompt_of(9, i), max_tokens=20, seed=i) for i in range(3)]
    plain = told(run(keeping(sized), asked))
    engine, computed = engine_of(sized), []
    poisoned(engine, places=1)
    for request in (asked[0], LONG[3], asked[1], asked[2]):
        before = engine.stats.prompt_tokens
        found = told(run(engine, [request]))[request.request_id]
        computed.append(engine.stats.prompt_tokens - before)
        assert request not in asked or found == plain[request.request_id]
    # The third begins as the first did, all of whose other pages are there.
    assert computed[0] == computed[2] == len(prefix) + 9 and computed[3] == page + 9


@pytest.mark.parametrize(("block", "shared"), [(32, 80), (16, 96), (8, 104)])
def test_blocks_over_several_pages_leave_a_shared_prefix_as_it_was(block: int, shared: int) -> None:
    """A block that begins on a shared page and ends on a later one is another one for each who shares the page."""
    nsa = NSAConfig(block=block, stride=8, select_block=32, num_selected=3, window=21)
    parts = make_parts(nsa=nsa, attention=("nsa",), dse=DSEConfig())
    asked = [request_of(str(i), prompt_of(104) + prompt_of(40, i), max_tokens=40, seed=i) for i in range(3)]
    alone = {r.request_id: told(run(engine_of((8, parts)), [r]))[r.request_id] for r in asked}
    engine, together = engine_of((8, parts)), dict[str, list[int]]()
    for i in range(400):
        # Each comes while those before it still decode.
        if i % 10 == 0 and i < 10 * len(asked):
            engine.add(asked[i // 10])
        for event in engine.step():
            together.setdefault(event.request_id, []).append(event.token_id)
    assert together == alone and engine.pool.shared_tokens == 2 * shared


def test_requests_that_wait_for_pages_come_in_their_order_whatever_their_recent_ones(
    sized: tuple[int, Parts],
) -> None:
    orders = []
    for is_spoilt in (False, True):
        page, parts = sized
        sizes = CacheSizes.of(parts.model.config, page=page, dtype=torch.float32, places=8, prompt_rows=32)
        engine = engine_of(sized, cache_bytes=sizes.bytes(-(-2 * MAX_MODEL_LEN // page)))
        begun: list[str] = []
        if is_spoilt:
            poisoned(engine)
        for request in [replace(r, priority=i % 2) for i, r in enumerate(LONG * 2)]:
            engine.add(replace(request, request_id=f"{len(engine.request_ids)}", max_tokens=30))
        while engine.has_work:
            engine.step()
            begun += [s.request.request_id for s in engine._running if s.request.request_id not in begun]
        orders.append(begun)
    assert orders[0] == orders[1] and len(orders[0]) == 10


@pytest.mark.parametrize("seed", range(6))
def test_no_order_of_steps_needs_more_recent_pages_than_there_are(seed: int) -> None:
    source = random.Random(seed)
    page, chunk, places = source.choice([4, 8, 32]), source.choice([3, 40, 200]), source.choice([1, 5, 9])
    config = replace(preset("tiny"), nsa=NSAConfig(window=source.choice([1, 8, 33, 90])))
    sizes = CacheSizes.of(config, page=page, dtype=torch.float32, places=places, prompt_rows=chunk)
    pool = new_pool(config, PageCounts(whole=10_000, recent=sizes.needed), page, places)
    leases: list[tuple[Lease, int]] = []
    held = 0
    for _ in range(300):
        while len(leases) < places and (lease := pool.acquire(range(source.randrange(1, 500)), 600)):
            leases.append((lease, source.randrange(1, 500)))
        assert pool.recent is not None
        for lease, _ in leases:
            pool.trim(lease, lease.length - 2)
        left = chunk
        for lease, prompt in leases:
            more = (
                1 if lease.length >= prompt else min(prompt - lease.length, source.randrange(chunk + 1), left)
            )
            left -= more if lease.length < prompt else 0
            pool.extend(lease, lease.length + max(2, more) if more == 1 else lease.length + more)
            lease.length += more
        held = max(held, pool.recent.num_held)
        for lease, _ in [x for x in leases if x[0].length > 590 or source.random() < 0.01]:
            pool.release(lease)
        leases = [x for x in leases if x[0].pages]
    assert sizes.needed // 3 < held < sizes.needed


def test_the_ends_of_prompts_are_kept_longest() -> None:
    """Where one ended or another one left it, later prompts go on; the midst of a prompt goes first."""
    pool = CachePool(200, 4, 3, num_recent=17, reach=7)

    def read(prompt: list[int]) -> int:
        """Tokens that are known of a prompt, which is read 8 at a time, answered, and given back."""
        lease = pool.acquire(prompt, len(prompt) + 8)
        assert lease is not None
        known = lease.length
        while lease.length < len(prompt) + 8:
            pool.trim(lease, lease.length)
            more = min(8, len(prompt) - lease.length) if lease.length < len(prompt) else 1
            pool.extend(lease, lease.length + more)
            lease.length += more
            pool.publish(lease)
        pool.release(lease)
        return known

    system = list(range(40))
    first, second, third = ([*system, *range(100 * i, 100 * i + 30)] for i in (1, 2, 3))
    assert read(first) == 0
    # Its midst has been given away, and where the second leaves it nobody knew.
    assert read([900, *range(60)]) == 0 and read(second) < 40
    assert read([800, *range(60)]) == 0 and read(third) == 40
    # A turn goes on behind the whole pages of the one before.
    assert read([*third, *range(700, 720)]) == 68


def test_caches_of_sparse_attention_are_little_larger_than_those_of_full_attention() -> None:
    """16 requests of 65,000 tokens: keys and values once, a sixteenth of them compressed, and a window for each."""
    for name in ("1b_nsa", "1b"):
        config = load_yaml(CONFIGS / f"{name}.yaml").model
        rows = {"page": 256, "dtype": torch.bfloat16, "places": 16, "prompt_rows": 8192}
        sparse = CacheSizes.of(config, **rows)
        full = CacheSizes.of(replace(config, attention=("full",)), **rows)
        pages = 1 + 16 * 254
        assert full.recent(pages) == 0 and sparse.recent(pages) < pages // 20
        assert sparse.bytes(pages) < 1.15 * full.bytes(pages)
        # Of few pages each has a recent one: nothing is bought with room that is not there.
        assert sparse.fitting(pages, 9 * sum(sparse.each)) == PageCounts(whole=9, recent=9)
        assert sparse.fitting(pages, sparse.bytes(pages) - 1).whole == pages - 1
        assert sparse.fitting(pages, None) == PageCounts(whole=pages, recent=sparse.recent(pages))
