"""`evaluate`: figures with intervals, from the engine that serves; a model made to know the answers has them right."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from local_cluster import tiny_run, train
from processes import interrupt, start, wait_until

from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.training.token_data import TokenDataset
from sparseray.jobs import evaluate
from sparseray.jobs.evaluation.intervals import ratio, share
from sparseray.jobs.evaluation.needle import DEPTHS, draw_needle
from sparseray.jobs.evaluation.subject import Subject, open_subject
from sparseray.jobs.evaluation.tasks import Gap, gaps, infilling, losses, needles
from sparseray.jobs.tokens.prepare import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("infilled")
    write_corpus(folder / "text", documents=60, words=60)
    prepare([str(folder / "text")], folder / "data", vocab_size=300, validation_fraction=0.3, fim_rate=0.5)
    return folder / "data"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = train(tmp_path_factory.mktemp("run") / "run", tiny_run(data, steps=4))
    newest = run.folder.newest_checkpoint()
    assert newest is not None
    return newest


def quiet(task: str, done: int, total: int) -> None:
    assert 0 < done <= total


def test_wilsons_interval_holds_the_share_about_as_often_as_it_says() -> None:
    assert share(0, 20).low == 0.0 and 0.1 < share(0, 20).high < 0.2
    half = share(50, 100)
    assert half.value == 0.5 and math.isclose(half.low, 0.4038, abs_tol=1e-4)
    draw, held = random.Random(1), 0
    for _ in range(600):
        found = share(sum(draw.random() < 0.1 for _ in range(40)), 40)
        held += found.low <= 0.1 <= found.high
    assert 0.92 < held / 600 < 0.99


def test_the_bootstrap_draws_documents_and_is_the_same_again() -> None:
    sums, sizes = [2.0, 40.0, 6.0, 9.0] * 8, [1.0, 10.0, 3.0, 3.0] * 8
    found = ratio(sums, sizes, seed=3)
    assert found.value == math.fsum(sums) / math.fsum(sizes) and found == ratio(sums, sizes, seed=3)
    assert 2.0 < found.low < found.value < found.high < 4.0


def test_losses_are_those_of_the_whole_pass_of_the_network(trained: Path, data: Path) -> None:
    subject, split = open_subject(trained, 0), TokenDataset(data, "validation")
    figures = losses(subject, split, 5, 0, quiet)
    again = losses(subject, split, 5, 0, quiet)
    assert figures == again
    engine, total, count = subject.engine, 0.0, 0
    order = list(range(split.num_documents))
    random.Random(0).shuffle(order)
    with torch.no_grad():
        for index in order[:5]:
            tokens = torch.tensor([[0, *split.document(index), 0][: subject.context]])
            hidden = engine.model(tokens[:, :-1], experts=engine.experts, memory=engine.memory).hidden_BTH
            logp = torch.log_softmax(engine.model.logits(hidden).float(), -1)
            total -= float(logp.gather(-1, tokens[:, 1:, None]).sum())
            count += tokens.shape[1] - 1
    assert figures["loss, nats per token"].value == pytest.approx(total / count, rel=1e-5)
    assert figures["bits per byte"].value < figures["loss, nats per token"].value / math.log(2.0)


class Knowing:
    """An engine that answers what it was told, by prompt; and else nothing."""

    def __init__(self, answers: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self.answers, self.asked = answers, list[GenerationRequest]()

    @property
    def has_work(self) -> bool:
        return bool(self.asked)

    def add(self, request: GenerationRequest) -> None:
        assert len(request.prompt_tokens) + request.max_tokens > 0
        self.asked.append(request)

    def step(self) -> list[TokenEvent]:
        request = self.asked.pop()
        tokens = (*self.answers.get(request.prompt_tokens, ()), 0)
        last = len(tokens) - 1
        return [
            TokenEvent(
                request_id=request.request_id,
                index=i,
                token_id=token,
                finish_reason="stop" if i == last else None,
            )
            for i, token in enumerate(tokens)
        ]


def knowing(trained: Path, answers: dict[tuple[int, ...], tuple[int, ...]], context: int = 64) -> Subject:
    real = open_subject(trained, context)
    return Subject(engine=Knowing(answers), vocabulary=real.vocabulary, context=context)  # type: ignore[arg-type]


def test_held_out_lines_and_spans_are_counted_as_filled_when_they_are(trained: Path, data: Path) -> None:
    split, real = TokenDataset(data, "validation"), knowing(trained, {}, 64)
    chosen = gaps(real, split, 8, 1)
    assert [gap.is_line for gap in chosen] == [True, False] * 8
    encode, sentinels = real.vocabulary.encode, real.vocabulary.infilling
    assert sentinels is not None
    for gap in chosen:
        text = real.vocabulary.token_text(gap.before) + gap.held_out + real.vocabulary.token_text(gap.after)
        assert encode(text) in {tuple(split.document(i)) for i in range(split.num_documents)}

    asked: list[GenerationRequest] = []
    with pytest.raises(KeyError, match="nobody"):
        # It never answers; what is asked is enough.
        infilling(Subject(engine=_Silent(asked), vocabulary=real.vocabulary, context=64), split, 8, 1, quiet)  # type: ignore[arg-type]
    half = [request for request in asked if request.request_id.startswith("infilling/")]
    assert len(asked) == 32 and all(len(r.prompt_tokens) + r.max_tokens <= 64 for r in asked)
    for gap, request in zip(chosen, half):
        assert (encode("\n")[0] in request.stop_token_ids) == gap.is_line and 0 in request.stop_token_ids
    told = {r.prompt_tokens: encode(gap.held_out) for r, gap in zip(half, chosen)}
    figures = infilling(knowing(trained, told), split, 8, 1, quiet)
    assert figures["infilling, line"].value == figures["infilling, span"].value == 1.0
    assert figures["before alone, line"].value == figures["before alone, span"].value == 0.0


class _Silent:
    """Takes what is asked, and ends."""

    def __init__(self, asked: list[GenerationRequest]) -> None:
        self.asked, self.has_work = asked, True

    def add(self, request: GenerationRequest) -> None:
        self.asked.append(request)

    def step(self) -> list[TokenEvent]:
        return [TokenEvent(request_id="nobody's", index=0, finish_reason="stop")]


def test_a_line_ends_at_its_end_and_a_span_with_its_first_characters() -> None:
    line = Gap(before=(), held_out="  return x ", after=(), is_line=True)
    assert line.is_filled_by("  return x\nmore") and not line.is_filled_by("  return xy")
    assert not line.is_filled_by("return x")
    span = Gap(before=(), held_out="turn x", after=(), is_line=False)
    assert span.is_filled_by("turn x + 1") and not span.is_filled_by("turn")


def test_needles_lie_at_all_depths_and_the_prompt_fills_its_length(trained: Path, data: Path) -> None:
    real = open_subject(trained, 0)
    asked: list[GenerationRequest] = []

    class Reading(Knowing):
        def add(self, request: GenerationRequest) -> None:
            asked.append(request)
            text = real.vocabulary.token_text(request.prompt_tokens)
            number = text.split("The secret number is")[1][:7]
            self.answers[request.prompt_tokens] = real.vocabulary.encode(number)
            super().add(request)

    subject = Subject(engine=Reading({}), vocabulary=real.vocabulary, context=600)  # type: ignore[arg-type]
    figures = needles(subject, TokenDataset(data, "validation"), 10, 0, quiet)
    assert {name: one.value for name, one in figures.items()} == {
        f"needle in {n} tokens{depth}": 1.0
        for n in (150, 300, 600)
        for depth in ("", *(f", depth {one:g}" for one in DEPTHS))
    }
    assert figures["needle in 600 tokens, depth 0.25"].samples == 2
    for request in asked:
        assert len(request.prompt_tokens) + request.max_tokens in (150, 300, 600)
    where = {
        round(real.vocabulary.token_text(r.prompt_tokens).index("The secret") / 600, 1) for r in asked[-10:]
    }
    assert len(where) >= 4


def test_a_needle_is_answered_with_the_tokens_that_stand_in_the_text(trained: Path) -> None:
    encode = open_subject(trained, 0).vocabulary.encode
    draw = random.Random(4)
    for _ in range(50):
        needle = draw_needle(draw)
        asked = (*encode(needle.question), *encode(needle.answer))
        assert encode(needle.sentence)[: len(asked)] == asked == encode(needle.question + needle.answer)


def command(trained: Path, data: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(trained), "--data", str(data), "--samples", "4", *more]


def test_the_command_prints_a_table_and_writes_json_and_the_same_again(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for name in ("one.json", "two.json"):
        assert evaluate.main(command(trained, data, "--out", str(tmp_path / name))) == 0
        written.append(json.loads((tmp_path / name).read_text()))
    said = capsys.readouterr()
    assert "infilling, line" in said.out and "bits per byte" in said.out and "loss: 4 of 4" in said.err
    assert written[0] == written[1] and written[0]["step"] == 4
    for figure in written[0]["figures"].values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--samples", "0"], "try 200"),
        (["--context", "65"], "leave it out, or lower it"),
        (["--out", "."], "name a file in it"),
        (["--checkpoint", "/nowhere"], "is not a checkpoint"),
        (["--data", "/nowhere"], "does not exist"),
        pytest.param(
            ["--device", "cuda"],
            "set --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    trained: Path, data: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(command(trained, data, *more)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said


def test_other_data_is_refused_and_the_cure_prepares_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "text", seed=9)
    prepare([str(tmp_path / "text")], tmp_path / "other", vocab_size=280, validation_fraction=0.2)
    assert evaluate.main(command(trained, tmp_path / "other")) == 2
    cure = capsys.readouterr().err.split("--tokenizer ")[1].strip()
    prepare([str(tmp_path / "text")], tmp_path / "mended", tokenizer=cure, validation_fraction=0.2)
    assert evaluate.main(command(trained, tmp_path / "mended", "--tasks", "loss")) == 0


@pytest.mark.long
def test_ctrl_c_ends_it_and_writes_nothing(trained: Path, data: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "figures.json"
    process = start(
        ["evaluate", *command(trained, data, "--out", str(out)), "--samples", "5000", "--tasks", "infilling"],
        log,
    )
    wait_until(lambda: "infilling:" in log.read_text(), "the first sample")
    interrupt(process)
    assert process.wait(60) == 130
    assert "interrupted" in log.read_text() and "Traceback" not in log.read_text()
    assert not out.exists() and not list(tmp_path.glob("*.unfinished"))


def test_held_out_texts_are_scored_where_they_stand(trained: Path, data: Path) -> None:
    subject, split = open_subject(trained, 0), TokenDataset(data, "validation")
    figures = infilling(subject, split, 3, 2, quiet)
    sentinels, encode, engine = subject.vocabulary.infilling, subject.vocabulary.encode, subject.engine
    assert sentinels is not None
    nats, count = 0.0, 0
    for gap in gaps(subject, split, 3, 2):
        if gap.is_line:
            room = subject.context - gap.most_tokens - 3
            after = gap.after[: max(room // 2, room - len(gap.before))]
            before = gap.before[max(0, len(gap.before) - (room - len(after))) :]
            prompt, wanted = sentinels.prompt(before, after), encode(gap.held_out)
            tokens = torch.tensor([[*prompt, *wanted]])
            with torch.no_grad():
                hidden = engine.model(tokens, experts=engine.experts, memory=engine.memory).hidden_BTH
                logp = torch.log_softmax(engine.model.logits(hidden).float(), -1)[0, len(prompt) - 1 : -1]
            nats -= float(logp.gather(-1, tokens[0, len(prompt) :, None]).sum())
            count += len(wanted)
    assert figures["infilling, line, nats"].value == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_measures_what_a_cpu_does(data: Path, tmp_path: Path) -> None:
    from test_gpu_training import run_on

    newest = train(tmp_path / "run", run_on("cpu", data, dtype="float32")).folder.newest_checkpoint()
    assert newest is not None
    split, found = TokenDataset(data, "validation"), []
    for device in ("cpu", "cuda"):
        subject = open_subject(newest, 0, device)
        assert subject.device == device
        found.append(
            losses(subject, split, 12, 0, quiet)
            | infilling(subject, split, 12, 0, quiet)
            | needles(subject, split, 4, 0, quiet)
        )
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        if one.interval == "bootstrap":
            assert found[1][name].value == pytest.approx(one.value, rel=1e-2), name
