"""State that moves between slots in chunks: through the source's memory, by message, and over every fault on the way."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_transport import Faults, Sent
from local_cluster import MODEL, LocalFleet, Trained, tiny_run, train
from torch import Tensor

from sparseray.actors.exchange import chunks, pulls
from sparseray.actors.exchange.chunks import ALIGNMENT, Chunk, Giving, Pull, PullOn, as_bytes, cut
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.actors.wire.envelope import Body
from sparseray.errors import SlotLostError
from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.planning import stages
from sparseray.platform.planning.inventory import Roles

SMALL, ROWS = 4 * ALIGNMENT, 20_000
"""Bytes of a chunk, of which the tiny model's embedding takes 38; rows of a table that takes memory."""
COMMON = {"seed": 3, "num_parts": 1, "betas": (0.9, 0.95), "eps": 1e-8}
EXPERTS: list[Piece] = [("expert", layer, e) for layer in range(len(MODEL.moe_layers)) for e in range(8)]
BUCKETS: list[Piece] = [("bucket", 0, b) for b in range(MODEL.dse.num_buckets)]
EVERY = [DENSE, *EXPERTS, *BUCKETS]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", SMALL)


# -- chunks ------------------------------------------------------------------------------------------


def test_chunks_have_every_byte_once_and_none_is_too_large() -> None:
    source = random.Random(1)
    sizes = [source.choice((1, 7, 255, 256, SMALL - 1, SMALL, 5 * SMALL + 3)) for _ in range(200)]
    found = cut([(("expert", 0, i), f"t{i}", size) for i, size in enumerate(sizes)], SMALL)
    seen: dict[str, list[tuple[int, int]]] = {}
    for chunk in found:
        end = 0
        for span in chunk:
            assert span.offset % ALIGNMENT == 0 and span.offset >= end and span.size > 0
            end = span.offset + span.size
            seen.setdefault(span.name, []).append((span.start, span.size))
        assert end <= SMALL
    for index, size in enumerate(sizes):
        parts = seen[f"t{index}"]
        assert parts[0][0] == 0 and sum(part for _, part in parts) == size
        assert all(a + b == c for (a, b), (c, _) in itertools.pairwise(parts))


def new_holdings(rows: int = 194) -> Holdings:
    experts = ExpertShard(MODEL, weight_decay=0.1, **COMMON)
    memory = MemoryShard(MODEL, [rows], **COMMON)
    return Holdings(
        lambda: DenseState(
            replace(MODEL, dse=replace(MODEL.dse, layers=())), None, weight_decay=0.1, **COMMON
        ),
        experts,
        memory,
    )


def filled(pieces: list[Piece], seed: int, rows: int = 194) -> Holdings:
    """Holdings whose every byte is random, moments too."""
    found, generator = new_holdings(rows), torch.Generator().manual_seed(seed)
    with found.arriving(pieces, 7) as tensors:
        for tensor in tensors.values():
            room = as_bytes(tensor)
            room.copy_(torch.randint(0, 256, (len(room),), dtype=torch.uint8, generator=generator))
    return found


class Asked:
    """A `Caller` whose sources fill what is asked for at once, and whose replies come in any order.

    Args:
        sources: holdings by slot.
        source: of the order.
    """

    def __init__(self, sources: dict[int, Holdings], source: random.Random) -> None:
        self.giving = {slot: Giving(held, with_optimizer=True) for slot, held in sources.items()}
        self.answers, self.source = self, source
        self.paths: Counter[str] = Counter()
        self.requests: list[Body] = []
        self._sequence, self._replies = itertools.count(1), dict[int, Chunk]()

    def observe(self, name: str, value: float, **labels: str) -> None:
        # Times are none of this.
        if "path" in labels:
            self.paths[labels["path"]] += int(value)

    def post(self, slot: int, body: Body) -> int:
        sequence, giving = next(self._sequence), self.giving[slot]
        self.requests.append(body)
        if isinstance(body, Pull):
            self._replies[sequence] = giving.begin(body)
        else:
            assert isinstance(body, PullOn)
            self._replies[sequence] = giving.go_on(body)
        return sequence

    def first(self, asked: dict[int, int], reply: type[Chunk]) -> tuple[int, Chunk]:
        assert set(asked) == set(self._replies), "what was asked for is waited for"
        sequence = self.source.choice(list(asked))
        return sequence, self._replies.pop(sequence)


def pulled(asked: Any, wanted: dict[int, tuple[Piece, ...]], holdings: Holdings) -> None:
    every = [piece for pieces in wanted.values() for piece in pieces]
    with holdings.arriving(every, 7, runs_of=list(wanted.values())) as tensors:
        for tensor in tensors.values():
            as_bytes(tensor).fill_(255)  # NaN, where it is a number
        pulls.pull(asked, wanted, tensors, torch.device("cpu"))


def raw(holdings: Holdings, pieces: list[Piece]) -> dict[str, bytes]:
    return {name: as_bytes(t).numpy().tobytes() for name, t in holdings.tensors(pieces).items()}


PARTS = {1: (DENSE, *EXPERTS[::2]), 2: tuple(BUCKETS[:3]), 3: (*EXPERTS[1::2], *BUCKETS[3:])}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("path", ["mapped", "message"])
def test_what_is_pulled_has_the_bits_of_its_sources_in_whatever_order_chunks_come(
    path: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "message":
        monkeypatch.setattr(pulls, "process_namespace", lambda: "elsewhere")
    sources = {slot: filled(list(pieces), slot) for slot, pieces in PARTS.items()}
    asked, mine = Asked(sources, random.Random(seed)), new_holdings()
    pulled(asked, PARTS, mine)
    assert mine.held == set(EVERY)
    for slot, pieces in PARTS.items():
        assert raw(mine, list(pieces)) == raw(sources[slot], list(pieces))
    num_bytes = sum(map(len, raw(mine, EVERY).values()))
    assert asked.paths == {path: num_bytes}
    assert len(asked.requests) > num_bytes // SMALL


def test_several_slots_pull_from_one_source_at_once() -> None:
    source = filled(EVERY, 5)
    asked = Asked({0: source}, random.Random(0))
    ends = [iter_pull(asked, new_holdings()) for _ in range(3)]
    for _ in itertools.zip_longest(*ends):
        pass
    assert len({id(move) for move in asked.giving[0]._moves.values()}) == 3
    asked.giving[0].end()
    assert asked.giving[0].go_on(PullOn(move=1, index=0)).chunks == -1


def iter_pull(asked: Asked, mine: Holdings) -> Iterator[None]:
    """A pull, one reply after another, so that several take turns."""
    own = Asked({}, asked.source)
    own.giving = asked.giving
    wanted: dict[int, tuple[Piece, ...]] = {0: tuple(EVERY)}
    with mine.arriving(EVERY, 7, runs_of=[EVERY]) as tensors:
        pulling = pulls._Pulling(own, wanted, tensors, torch.device("cpu"))  # type: ignore[arg-type]
        pulling._ask(0, Pull(pieces=wanted[0], namespace=pulls.process_namespace()))
        while pulling._asked:
            sequence, chunk = own.first(pulling._asked, Chunk)
            pulling._take(pulling._asked.pop(sequence), chunk)
            yield
    assert own.paths["message"] == 0
    assert raw(mine, EVERY) == raw(asked.giving[0]._holdings, EVERY)


@pytest.mark.parametrize("failing", [0, 3])
def test_what_cannot_be_mapped_comes_by_message(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first chunk on, or once some have come."""
    source, seen = filled(EVERY, 5), itertools.count()
    original = pulls._Pulling._parts

    def opened(me: pulls._Pulling, slot: int, chunk: Chunk) -> Sequence[Tensor]:
        if chunk.handle is not None and next(seen) >= failing:
            raise OSError("no peer access")
        return original(me, slot, chunk)

    monkeypatch.setattr(pulls._Pulling, "_parts", opened)
    asked, mine = Asked({0: source}, random.Random(0)), new_holdings()
    pulled(asked, {0: tuple(EVERY)}, mine)
    assert raw(mine, EVERY) == raw(source, EVERY)
    assert (asked.paths["mapped"] > 0) == (failing > 0) and asked.paths["message"] > 0


def test_a_source_without_memory_to_give_through_answers_by_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(chunks, "Buffer", full)
    source = filled(EVERY, 5)
    asked, mine = Asked({0: source}, random.Random(0)), new_holdings()
    pulled(asked, {0: tuple(EVERY)}, mine)
    assert raw(mine, EVERY) == raw(source, EVERY) and asked.paths["mapped"] == 0


# -- pieces that are half here -----------------------------------------------------------------------


def test_pieces_that_come_half_are_not_held_and_what_was_held_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64 * SMALL)
    mine = filled([*EXPERTS[:3], BUCKETS[0]], 1, ROWS)
    source = filled([DENSE, *EXPERTS[3:], *BUCKETS[1:]], 2, ROWS)
    before, held = raw(mine, [*EXPERTS[:3], BUCKETS[0]]), set(mine.held)
    assert mine.memory is not None
    taken = mine.experts.num_bytes, mine.memory.tables[0].num_bytes
    asked, left = Asked({0: source}, random.Random(0)), itertools.count()

    def observe(name: str, value: float, **labels: str) -> None:
        assert mine.held == held, "nothing counts before everything is here"
        if next(left) == 20:
            raise SlotLostError("slot 0 is gone", [0])

    asked.observe = observe  # type: ignore[method-assign]
    lacking = [DENSE, *EXPERTS[3:], *BUCKETS[1:]]
    with pytest.raises(SlotLostError):
        pulled(asked, {0: tuple(lacking)}, mine)
    assert mine.held == held and raw(mine, [*EXPERTS[:3], BUCKETS[0]]) == before
    assert mine.experts.num_bytes == taken[0]
    assert mine.memory.tables[0].num_bytes < 1.2 * taken[1]
    # What is made of the rest then has nothing of what had come.
    fresh = new_holdings(ROWS)
    for holdings in (mine, fresh):
        holdings.initialize(lacking, 7)
    assert raw(mine, lacking) == raw(fresh, lacking)


# -- whole runs --------------------------------------------------------------------------------------

STEPS = 12
ROLES = ("attention_workers", "expert_shards", "memory_shards")
DTYPES = ["float32", "bfloat16"]
"""Slots that ask each other by message, and slots that exchange in step."""


def run_of(data: Path, dtype: str, slots: int, replication: int, **cluster: Any) -> RunConfig:
    shape = dict.fromkeys(ROLES, slots) | {"replication": replication, "colocated": True, "deadline_s": 3.0}
    config = tiny_run(data, steps=STEPS, **{**shape, **cluster})
    return replace(config, train=replace(config.train, dtype=dtype, checkpoint_every=4))


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """One slot that has everything, undisturbed."""
    folder = tmp_path_factory.mktemp("one")
    return {dtype: train(folder / dtype, run_of(corpus, dtype, 1, 1)) for dtype in DTYPES}


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that all slots pulled, by path."""
    found: Counter[str] = Counter()
    record = Metrics.record

    def note(me: Metrics, name: str, value: float, *args: int, **labels: str) -> None:
        if name == "elastic_pulled_bytes_total":
            found[labels["path"]] += int(value)
        record(me, name, value, *args, **labels)

    monkeypatch.setattr(Metrics, "record", note)
    return found


def resize_at(slots: dict[int, int]) -> Callable[[int, Run, LocalFleet], None]:
    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        if step in slots:
            count = slots[step]
            run.generations.ask(roles=Roles(attention=count, experts=count, memory=count))

    return at_step


def check(found: Trained, one: Trained) -> None:
    assert [r["step"] for r in found.records] == list(range(1, STEPS + 1))
    assert found.curve == one.curve and found.digest == one.digest
    assert "restored" not in found.events


WIDER = {1: 2, 3: 4, 5: 3, 7: 2}
LATE = Faults(repeat=0.2, delay=0.2, seed=1)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("faults", "dtype"),
    [
        pytest.param(None, "float32", id="calm-float32"),
        pytest.param(None, "bfloat16", id="calm-bfloat16", marks=pytest.mark.long),
        pytest.param(LATE, "float32", id="late-float32", marks=pytest.mark.long),
        pytest.param(LATE, "bfloat16", id="late-bfloat16"),
    ],
)
def test_resizes_move_state_through_memory_and_change_no_bit(
    faults: Faults | None,
    dtype: str,
    corpus: Path,
    one: dict[str, Trained],
    paths: Counter[str],
    tmp_path: Path,
) -> None:
    config = run_of(corpus, dtype, 1, 1)
    found = train(tmp_path / "run", config, at_step=resize_at({**WIDER, 9: 1}), faults=faults)
    check(found, one[dtype])
    assert found.events.count("resized") >= 4
    assert paths["mapped"] > 500_000 and not paths["message"]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resizes_over_several_hosts_move_state_by_message_and_change_no_bit(
    dtype: str,
    corpus: Path,
    one: dict[str, Trained],
    paths: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulls, "process_namespace", lambda: "elsewhere")
    found = train(tmp_path / "run", run_of(corpus, dtype, 1, 1), at_step=resize_at(WIDER))
    check(found, one[dtype])
    assert paths["message"] > 500_000 and not paths["mapped"]


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_after_a_loss_training_goes_on_with_what_is_left_and_a_spare_slot_comes_later(
    dtype: str, corpus: Path, one: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves before the next commit: what the spare slot lacks comes by a change of its own."""
    monkeypatch.setattr(stages, "LEAST_BYTES", 200_000)
    monkeypatch.setattr(stages, "REST", 0.0)
    config = run_of(corpus, dtype, 2, 2, standby=1)

    def kill(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == 4:
            fleet.kill(1)

    found = train(tmp_path / "run", config, at_step=kill)
    check(found, one[dtype])
    events = found.folder.event_lines()
    after = events[[event["kind"] for event in events].index("recovered") + 1 :]
    later = [event for event in after if event["kind"] in ("staged", "resized", "mended")]
    assert later and all(event["moved"] for event in later)
    assert not any("moved" in event for event in events if event not in after)
    assert (events[-1]["attention"], events[-1]["experts"]) == (2, 2)


class KillInMove:
    """Kills a slot at the n-th message of a kind in a change of plan, whoever it is that sends it."""

    def __init__(self, kind: str, count: int, *, of: str) -> None:
        self.kind, self.left, self.of, self.victim = kind, count, of, -1

    def __call__(self, sent: Sent, fleet: LocalFleet) -> None:
        if self.victim < 0 and sent.kind == self.kind:
            self.left -= 1
            if not self.left:
                self.victim = sent.source if self.of == "sender" else sent.to
                fleet.kill(self.victim)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("chunk", "sender"),
        ("pull_on", "receiver"),
        ("pull_on", "sender"),
        ("pull", "sender"),
    ],
)
def test_a_source_or_a_puller_that_is_killed_in_a_move_changes_no_bit(
    kind: str, of: str, dtype: str, corpus: Path, one: dict[str, Trained], tmp_path: Path
) -> None:
    """Two slots hold everything; a third and a fourth get it when one of them, or one of those, dies."""
    fault = KillInMove(kind, 1 if kind == "pull" else 20, of=of)
    config = run_of(corpus, dtype, 2, 2)
    found = train(tmp_path / "run", config, at_step=resize_at({2: 4}), faults=Faults(on_send=fault))
    check(found, one[dtype])
    assert fault.victim >= 0 and "lost" in found.events
