"""A run that goes on from another one's checkpoint: with its moments at its step, or with its weights alone."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from local_cluster import MODEL, LocalFleet, Trained, tiny_run, train
from matplotlib.figure import Figure

from sparseray.errors import ConfigError
from sparseray.jobs.tokens.infilling import FAMILIES
from sparseray.jobs.tokens.prepare import prepare
from sparseray.jobs.watch.report import _draw_loss, earlier_records, write_report
from sparseray.model.config import DSEConfig
from sparseray.platform.composition import Run
from sparseray.platform.config import OptimConfig, RunConfig
from sparseray.platform.opening import open_training
from sparseray.platform.planning.schedule import learning_rate
from sparseray.platform.run import checkpoint


def rates(begin: int = 0, steps: int = 100, **keys: object) -> list[float]:
    optim = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1, **keys)  # type: ignore[arg-type]
    return [learning_rate(step, optim, begin + steps, begin) for step in range(begin + 1, begin + steps + 1)]


def test_schedules_rise_alike_and_end_as_they_say() -> None:
    cosine, constant, wsd = rates(), rates(schedule="constant"), rates(schedule="wsd", decay_steps=20)
    assert cosine[:10] == constant[:10] == wsd[:10] == [(i + 1) / 10 for i in range(10)]
    assert constant[10:] == [1.0] * 90
    assert wsd[10:80] == [1.0] * 70 and math.isclose(wsd[-1], 0.1) and math.isclose(wsd[89], 0.55)
    assert math.isclose(cosine[-1], 0.1) and all(a > b for a, b in itertools.pairwise(cosine[10:]))
    assert rates(schedule="wsd") == rates(schedule="wsd", decay_steps=10)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_a_run_that_goes_on_has_a_schedule_of_its_own(schedule: str) -> None:
    assert rates(begin=420, schedule=schedule) == rates(schedule=schedule)


def base(data: Path, steps: int = 8) -> RunConfig:
    config = tiny_run(data, steps=steps)
    return replace(
        config,
        train=replace(config.train, checkpoint_every=4),
        optim=replace(config.optim, schedule="constant", warmup_steps=0),
    )


@pytest.fixture(scope="module")
def first(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("first") / "run", base(corpus))


def middle(first: Trained) -> str:
    return str(first.folder.checkpoints / "step_4")


@pytest.mark.long
def test_with_moments_and_the_same_data_it_is_the_same_run(
    first: Trained, corpus: Path, tmp_path: Path
) -> None:
    """From an intermediate step; killed before its first checkpoint, it goes back to where it began."""
    config = replace(base(corpus), init_from=middle(first), init_state="optimizer")
    again = train(tmp_path / "again", config)
    assert [record["step"] for record in again.records] == [5, 6, 7, 8]
    assert again.curve == first.curve[4:] and again.digest == first.digest

    def kill(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == 6 and fleet.used == 3:
            fleet.kill(1)

    killed = train(tmp_path / "killed", config, at_step=kill)
    assert "restored" in killed.events
    assert killed.curve == again.curve and killed.digest == again.digest
    train(tmp_path / "stopped", config, stop_after=6)
    stopped = train(tmp_path / "stopped", config)
    assert stopped.curve == again.curve and stopped.digest == again.digest


def test_with_weights_alone_steps_and_moments_begin_anew(
    first: Trained, corpus: Path, tmp_path: Path
) -> None:
    found = train(tmp_path / "run", replace(base(corpus, steps=3), init_from=middle(first)))
    assert [record["step"] for record in found.records] == [1, 2, 3]
    assert found.curve[0][0] < first.curve[0][0] and found.curve[1:] != first.curve[5:7]


def test_other_data_longer_sequences_and_another_schedule(
    first: Trained, corpus: Path, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "text", seed=77)
    prepare([str(tmp_path / "text")], tmp_path / "data", tokenizer=str(corpus), validation_fraction=0.2)
    config = replace(base(tmp_path / "data", steps=10), init_from=middle(first), init_state="optimizer")
    config = replace(
        config,
        model=replace(config.model, max_seq_len=128),
        train=replace(config.train, seq_len=64),
        optim=replace(config.optim, schedule="wsd", warmup_steps=2, decay_steps=2),
    )
    found = train(tmp_path / "run", config)
    assert [record["step"] for record in found.records] == list(range(5, 11))
    peak = config.optim.lr
    assert [record["lr"] for record in found.records] == [
        peak / 2,
        peak,
        peak,
        peak,
        pytest.approx(0.55 * peak),
        pytest.approx(0.1 * peak),
    ]
    assert found.records[0]["tokens"] == 2 * first.records[0]["tokens"]


def test_added_tokens_have_rows_of_their_own_and_all_others_are_as_they_were(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    plain, filling = tmp_path / "plain", tmp_path / "filling"
    prepare([str(tmp_path / "text")], plain, vocab_size=300, validation_fraction=0.2)
    prepare([str(tmp_path / "text")], filling, tokenizer=str(plain), validation_fraction=0.2, fim_rate=0.5)
    config = base(plain, steps=4)
    # Addresses of memory rows follow from the tokenizer, so a model with memory cannot take other tokens.
    config = replace(config, model=replace(MODEL, dse=DSEConfig(layers=())))
    before = train(tmp_path / "before", config).folder.newest_checkpoint()
    grown = replace(
        config,
        data=replace(config.data, path=str(filling)),
        model=replace(config.model, vocab_size=303),
        init_from=str(before),
    )
    after = train(tmp_path / "after", replace(grown, optim=replace(grown.optim, lr=0.0)), stop_after=1)
    newest = after.folder.newest_checkpoint()
    assert before is not None and newest is not None
    old, new = (checkpoint.read_tensors(path, ["embedding"])["embedding"] for path in (before, newest))
    assert old.shape[0] == 300 and new.shape[0] == 303 and torch.equal(new[:300], old)
    assert len(FAMILIES[0]) == 3 and bool((new[300:].abs().sum(1) > 0).all())
    # With the optimizer's state: moments of old rows go on, those of added tokens begin at zero.
    # Betas next to 1 leave the moments where they began.
    still = replace(grown.optim, lr=0.0, beta1=1 - 1e-9, beta2=1 - 1e-9)
    going = replace(grown, init_state="optimizer", optim=still, train=replace(grown.train, steps=8))
    further = train(tmp_path / "further", going, stop_after=5)
    assert [record["step"] for record in further.records] == [5]
    last = further.folder.newest_checkpoint()
    assert last is not None
    names = ["embedding", "embedding@exp_avg", "embedding@exp_avg_sq"]
    was, now = (checkpoint.read_tensors(path, names) for path in (before, last))
    for name in names:
        assert was[name].abs().max() > 1e-5
        torch.testing.assert_close(now[name][:300], was[name], rtol=1e-5, atol=1e-9)
    assert max(now[name][300:].abs().max() for name in names[1:]) < 1e-7
    fewer = replace(config, model=replace(config.model, vocab_size=290), init_from=str(before))
    with pytest.raises(ConfigError, match=r"model.vocab_size=290 is smaller"):
        open_training(replace(fewer, run_dir=str(tmp_path / "no")))


def test_what_cannot_go_on_is_refused_with_a_cure(first: Trained, corpus: Path, tmp_path: Path) -> None:
    config = replace(
        base(corpus, steps=4), init_from=middle(first), init_state="optimizer", run_dir=str(tmp_path / "run")
    )
    with pytest.raises(ConfigError, match=r"set train.steps to 8"):
        open_training(config)
    open_training(replace(config, train=replace(config.train, steps=8)))
    with pytest.raises(ConfigError, match="give it as init_from"):
        RunConfig(init_state="optimizer")


@pytest.mark.long
def test_the_report_shows_both_curves_on_one_axis(first: Trained, corpus: Path, tmp_path: Path) -> None:
    for state, shift in (("weights", 4), ("optimizer", 0)):
        config = replace(base(corpus), init_from=middle(first), init_state=state)
        run = train(tmp_path / state, config, stop_after=6)
        records, found = earlier_records(run.folder)
        assert found == shift and [record["step"] for record in records] == list(range(1, 9))
        axes = Figure().subplots()
        _draw_loss(axes, run.records, [], records, found)
        before, _, own, _ = axes.lines
        assert list(before.get_xdata()) == list(range(1, 9)) and next(iter(own.get_xdata())) == 5
        assert (write_report(run.folder) / "loss.png").exists()
    assert earlier_records(first.folder) == ([], 0)
