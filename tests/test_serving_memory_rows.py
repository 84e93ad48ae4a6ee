"""Table rows of decode steps come while the layers before them run: in this order, and with the bits of one graph."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from serving_parts import MAX_MODEL_LEN, Parts, make_parts, on_device, request_of, run, tokens_of
from test_serving_paged import REQUESTS, prompt_of
from torch import Tensor

from sparseray.actors.serving import decode_step
from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.chunks import Chunk, looked_back, memory_rows, newest_rows
from sparseray.actors.serving.paged_engine import Flight, PagedEngine
from sparseray.actors.serving.paged_model import PagedModel
from sparseray.kernels.ops import REFERENCE
from sparseray.model.config import DSEConfig
from sparseray.model.dse import Memory, Rows

DSE = DSEConfig(layers=(1,), rows_per_head=512, num_buckets=4, document_end_id=0)


def parts_of(*layers: int) -> Parts:
    """Three layers, some with a memory, and operations under which a prompt's chunk and a token differ, as on a GPU."""
    return make_parts(REFERENCE, num_layers=3, attention=("full",), dse=replace(DSE, layers=layers))


class Recording:
    """A run that goes on from cut to cut, in a thread of its own: what graphs are on a GPU, which replay it.

    Args:
        run: as of `recorded`.
        log: is told of every part that was launched.
    """

    def __init__(self, run: Callable[[Callable[[], None]], Tensor], log: list[str]) -> None:
        self._run, self._log, cuts = run, log, list[int]()
        self.found = run(lambda: cuts.append(1))
        self.parts = [Part(self, index) for index in range(len(cuts) + 1)]

    def replay(self, index: int) -> None:
        self._log.append(f"part {index + 1} of {len(self.parts)}")
        if index == 0:
            # What a failure between two parts left behind is never gone on with.
            self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
            threading.Thread(target=self._all, args=(self._go, self._stopped), daemon=True).start()
        self._go.release()
        assert self._stopped.acquire(timeout=60)

    def _all(self, go: threading.Semaphore, stopped: threading.Semaphore) -> None:
        def cut() -> None:
            stopped.release()
            go.acquire()

        go.acquire()
        self.found.copy_(self._run(cut))
        stopped.release()


class Part:
    """One of the graphs."""

    def __init__(self, recording: Recording, index: int) -> None:
        self._recording, self._index = recording, index

    def replay(self) -> None:
        self._recording.replay(self._index)


class NotedMemory:
    """A memory that notes when it is asked, and fails where it is told to.

    Args:
        memory: that answers.
        log: of what happened.
        failing: numbers of the calls that fail, from 1 on.
    """

    def __init__(self, memory: Memory, log: list[str], failing: tuple[int, ...] = ()) -> None:
        self.memory, self.log, self.failing, self.calls = memory, log, failing, 0

    def prefetch(self, rows: dict[int, Tensor]) -> Rows:
        self.calls += 1
        self.log.append("rows")
        if self.calls in self.failing:
            raise ConnectionError("a memory shard is lost")
        return self.memory.prefetch(rows)


class RecordedModel(PagedModel):
    """Every step is recorded when it is first needed; `log` says what ran."""

    log: list[str]

    def _new_decode(self, size: int) -> decode_step.DecodeStep:
        step = super()._new_decode(size)
        step.capture(self.experts, None)  # type: ignore[attr-defined]
        return step


class AheadEngine(PagedEngine):
    """Starts a step before it takes the one before, as on a GPU."""

    log: list[str]

    def _sample(self, *arguments: Any) -> Flight:
        flight, log = super()._sample(*arguments), self.log

        class Done:
            def synchronize(self) -> None:
                log.append("tokens")

        return replace(flight, done=Done())  # type: ignore[arg-type]

    def _launch(self, batch: list[Any]) -> Flight:
        self.log.append("step")
        return super()._launch(batch)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Decode steps of `ahead` are recordings, which write down when they run."""
    log: list[str] = []

    def record(run: Callable[[Callable[[], None]], Tensor], pool: object) -> tuple[list[Part], Tensor]:
        recording = Recording(run, log)
        return recording.parts, recording.found

    monkeypatch.setattr(decode_step, "recorded", record)
    return log


def engine_of(parts: Parts, kind: type[PagedEngine] = PagedEngine, memory: Memory | None = None) -> Any:
    memory = memory or (parts.memory if parts.model.config.dse.layers else None)
    options = {"max_batch": 8, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 64, "page": 64}
    return kind(parts.model, parts.experts, memory, grammars=parts.grammars, **options)


def ahead(parts: Parts, log: list[str], failing: tuple[int, ...] = ()) -> Any:
    """An engine as a GPU's, on recordings."""

    class Kind(AheadEngine):
        runs_on = RecordedModel

    RecordedModel.experts = parts.experts  # type: ignore[attr-defined]
    Kind.log = log
    has_memory = bool(parts.model.config.dse.layers)
    return engine_of(parts, Kind, NotedMemory(parts.memory, log, failing) if has_memory else None)


def steps_of(log: list[str]) -> list[list[str]]:
    """What happened in each step."""
    steps: list[list[str]] = []
    for entry in log:
        if entry == "step":
            steps.append([])
        elif steps:
            steps[-1].append(entry)
    return steps


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2), (0, 1), ()], ids=str)
def test_a_step_that_is_cut_and_overtakes_the_one_before_gives_the_events_of_a_whole_one(
    layers: tuple[int, ...], recorded: list[str]
) -> None:
    """Requests of every kind, which end by length and by stop tokens, some while the step after theirs is under way."""
    parts = parts_of(*layers)
    assert run(ahead(parts, recorded), REQUESTS) == run(engine_of(parts), REQUESTS)
    is_cut = bool(layers) and layers[0] > 0
    assert {entry for entry in recorded if entry.startswith("part")} == (
        {"part 1 of 2", "part 2 of 2"} if is_cut else {"part 1 of 1"}
    )


def test_the_layers_before_a_memory_are_launched_before_the_tokens_are_known_and_rows_gathered(
    recorded: list[str],
) -> None:
    engine = ahead(parts_of(1), recorded)
    run(engine, [request_of("a", prompt_of(9), max_tokens=6), request_of("b", prompt_of(5, 1), max_tokens=6)])
    # The prompts, whose tokens are known; then one step for each further token; at last the tokens of the last one.
    first, *decoding, last = steps_of(recorded)
    assert first == ["rows"]
    assert decoding == [["part 1 of 2", "tokens", "rows", "part 2 of 2"]] * 4
    assert last == [*decoding[0], "tokens"]


def test_a_memory_in_the_first_layer_has_one_graph_which_waits_for_tokens_and_rows(
    recorded: list[str],
) -> None:
    run(ahead(parts_of(0, 2), recorded), [request_of("a", prompt_of(9), max_tokens=3)])
    assert steps_of(recorded) == [
        ["rows"],
        ["tokens", "rows", "part 1 of 1"],
        ["tokens", "rows", "part 1 of 1", "tokens"],
    ]


def test_a_model_without_memory_has_one_graph_which_waits_for_nothing(recorded: list[str]) -> None:
    run(ahead(parts_of(), recorded), [request_of("a", prompt_of(9), max_tokens=3)])
    assert steps_of(recorded) == [[], ["part 1 of 1", "tokens"], ["part 1 of 1", "tokens", "tokens"]]


def test_without_graphs_too_rows_are_gathered_after_the_layers_before_them(recorded: list[str]) -> None:
    parts = parts_of(1)
    for layer, block in enumerate(parts.model.layers):
        block.register_forward_hook(lambda *_, layer=layer: recorded.append(f"layer {layer}"))
    run(
        engine_of(parts, memory=NotedMemory(parts.memory, recorded)),
        [request_of("a", prompt_of(9), max_tokens=3)],
    )
    assert recorded[-12:] == ["layer 0", "rows", "layer 1", "layer 2"] * 3


@pytest.mark.parametrize("failing", [(2, 5), (4,)], ids=str)
def test_rows_that_do_not_come_between_the_parts_of_a_step_lose_no_token(
    failing: tuple[int, ...], recorded: list[str]
) -> None:
    parts = parts_of(1)
    asked = [request_of(str(i), prompt_of(20 + i, i), temperature=0.0, max_tokens=8) for i in range(3)]
    wanted, engine = run(engine_of(parts), asked), ahead(parts, recorded, failing)
    for request in asked:
        engine.add(request)
    found: dict[str, list[int]] = {}
    while engine.has_work:
        try:
            for event in engine.step():
                found.setdefault(event.request_id, []).append(event.token_id)
        except ConnectionError:
            continue
    assert engine.stats.failed_steps == len(failing) and engine.cache_usage == 0.0
    assert found == {name: tokens_of(events) for name, events in wanted.items()}


def test_logits_that_are_no_numbers_end_a_request_and_not_the_step_that_overtook_it(
    recorded: list[str],
) -> None:
    parts = parts_of(1)
    engine = ahead(parts, recorded)
    other = request_of("b", prompt_of(5, 1), temperature=0.0, max_tokens=8)
    wanted, keep, broken = tokens_of(run(engine_of(parts), [other])["b"]), engine.paged.decode, []

    def decode(chunks: Any, *arguments: Any) -> Tensor:
        logits_BV: Tensor = keep(chunks, *arguments)
        if len(chunks) == 2 and not broken:
            broken.append(True)
            logits_BV = logits_BV.clone()
            logits_BV[0] = float("nan")
        return logits_BV

    engine.paged.decode = decode
    found = run(engine, [request_of("a", prompt_of(9), temperature=0.0, max_tokens=8), other])
    assert found["a"][-1].finish_reason == "error" and tokens_of(found["b"]) == wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("resets", [True, False])
def test_the_rows_of_a_newest_token_are_those_that_a_chunk_with_it_has(seed: int, resets: bool) -> None:
    """Near the start of a text and of documents, and for a token that is not known when its text is looked back in."""
    dse = replace(DSE, layers=(1, 2), orders=(2, 3, 4), reset_at_document=resets)
    layout = make_parts(REFERENCE, num_layers=3, attention=("full",), dse=dse).model.layout
    assert layout is not None
    source = random.Random(seed)
    # Token 0 ends a document.
    texts = [[source.choice([0, 5, 6, 7]) for _ in range(source.randrange(1, 9))] for _ in range(40)]
    known = [text[:-1] for text in texts]
    chunks = [
        Chunk(lease=Lease(pages=[0], length=len(text), max_len=9, slot=0), known=text, count=1)
        for text in known
    ]
    seen = looked_back(chunks, layout)
    for text, of_host in zip(texts, known, strict=True):
        of_host.append(text[-1])
    wanted, found = memory_rows(chunks, layout), newest_rows(chunks, seen, layout)
    for layer in dse.layers:
        assert torch.equal(found[layer], wanted[layer])
        for row, (chunk, text) in enumerate(zip(chunks, texts, strict=True)):
            whole = replace(chunk, lease=replace(chunk.lease, length=0), count=len(text))
            assert torch.equal(found[layer][row], memory_rows([whole], layout)[layer][-1])


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_rows_of_tables_that_a_device_trains_are_those_of_the_model(
    row_dtype: str, recorded: list[str]
) -> None:
    parts = make_parts(
        REFERENCE, num_layers=3, attention=("full",), dse=replace(DSE, layers=(1, 2), row_dtype=row_dtype)
    )
    tables = on_device(parts, torch.device("cpu"))
    asked = [request_of(str(i), prompt_of(9 + i, i), temperature=0.0) for i in range(3)]
    assert run(engine_of(parts, memory=tables), asked) == run(engine_of(parts), asked)
    assert len(tables.take_fetches()) == 12
