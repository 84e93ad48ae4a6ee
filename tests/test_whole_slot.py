"""A run in which one slot plays all roles in slabs, as on a GPU, here in bf16 on a CPU."""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from local_cluster import LocalFleet, Trained, tiny_run, train

from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig
from sparseray.platform.fleet.job import SlotJob
from sparseray.platform.fleet.weights_port import read_offered
from sparseray.platform.run import checkpoint
from sparseray.platform.trainer import Trainer

WHOLE = {"colocated": True}


def whole_run(data: Path, *, steps: int = 6, dtype: str = "bfloat16", **train_keys: object) -> RunConfig:
    config = tiny_run(data, steps=steps, **WHOLE)
    return replace(config, train=replace(config.train, dtype=dtype, **train_keys))


def close(one: Trained, other: Trained, tolerance: float) -> None:
    for a, b in zip(one.curve, other.curve, strict=True):
        assert a[0] == pytest.approx(b[0], rel=tolerance)
        assert a[2] == pytest.approx(b[2], rel=20 * tolerance)


def test_bfloat16_follows_fp32_and_comes_again_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "fp32", tiny_run(corpus, steps=6, **WHOLE))
    runs = [train(tmp_path / name, whole_run(corpus)) for name in ("one", "two")]
    close(runs[0], plain, 5e-3)
    assert runs[0].curve == runs[1].curve and runs[0].digest == runs[1].digest
    assert runs[0].curve != plain.curve


def seeds_apart(config: RunConfig, folder: Path) -> tuple[float, float]:
    """Of validation losses the largest difference between bf16 and fp32, and the deviation between fp32 runs of three seeds."""
    found: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for dtype, losses in found.items():
        for seed in range(3):
            trained = replace(config.train, dtype=dtype, seed=seed)
            losses.append(train(folder / f"{dtype}{seed}", replace(config, train=trained)).evaluations[-1])
    return max(abs(x - y) for x, y in zip(*found.values())), statistics.stdev(found["float32"])


@pytest.mark.long
def test_bfloat16_ends_beside_fp32_within_what_seeds_differ_by(corpus: Path, tmp_path: Path) -> None:
    differs, noise = seeds_apart(tiny_run(corpus, steps=40, **WHOLE), tmp_path)
    assert 0.0 < differs < noise


@pytest.mark.long
def test_recomputed_layers_change_no_bit(corpus: Path, tmp_path: Path) -> None:
    # The tenth step is one whose statistics are noted.
    kept, again = (train(tmp_path / str(r), whole_run(corpus, steps=10, recompute=r)) for r in (False, True))
    assert kept.curve == again.curve and kept.digest == again.digest


def test_the_fast_order_of_parts_differs_by_rounding(corpus: Path, tmp_path: Path) -> None:
    config = whole_run(corpus, steps=3)
    tree, running = (train(tmp_path / d, replace(config, determinism=d)) for d in ("bitwise", "fast"))
    close(tree, running, 1e-4)
    assert tree.digest != running.digest


def test_the_only_slot_is_killed_and_the_run_comes_to_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    config = whole_run(corpus, steps=7, checkpoint_every=2)

    def kill(step: int, trainer: Trainer, fleet: LocalFleet) -> None:
        if step == 5 and fleet.used == 1:
            fleet.kill(0)

    undisturbed = train(tmp_path / "undisturbed", config)
    killed = train(tmp_path / "killed", config, at_step=kill)
    assert "restored" in killed.events and "restored" not in undisturbed.events
    assert killed.curve == undisturbed.curve and killed.digest == undisturbed.digest


@pytest.mark.one_in(2)
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_checkpoint_goes_over_to_the_other_way_of_working_and_back(
    corpus: Path, tmp_path: Path, moments: str
) -> None:
    plain = tiny_run(corpus, steps=9, **WHOLE)
    whole = whole_run(corpus, steps=9)
    whole = replace(whole, optim=replace(whole.optim, moments=moments))
    train(tmp_path / "run", plain, stop_after=3)
    train(tmp_path / "run", whole, stop_after=6)
    mixed = train(tmp_path / "run", plain)
    close(mixed, train(tmp_path / "plain", plain), 1e-2)


def test_checkpoints_are_written_beside_the_steps_and_change_no_bit(corpus: Path, tmp_path: Path) -> None:
    """The checkpoint of step 2 is finished after later steps have run, and holds the state of step 2."""
    config = whole_run(corpus, steps=8, checkpoint_every=2, keep_checkpoints=8)
    plain = train(tmp_path / "plain", whole_run(corpus, steps=8))
    saved = train(tmp_path / "saved", config)
    assert saved.curve == plain.curve and saved.digest == plain.digest
    written = checkpoint.list_finished(saved.folder.checkpoints)
    two = train(tmp_path / "two", whole_run(corpus, steps=8), stop_after=2)
    assert checkpoint.read_manifest(written[0])["step"] == 2
    assert checkpoint.read_manifest(written[0])["digest"] == two.digest


def test_a_disk_that_is_full_in_the_background_costs_a_checkpoint_and_no_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = whole_run(corpus, steps=6, checkpoint_every=2), SlotJob.write

    def full(self: SlotJob, directory: str, name: str, tensors: dict) -> dict:
        if "step_2" in directory:
            raise OSError(28, "No space left on device")
        return write(self, directory, name, tensors)

    monkeypatch.setattr(SlotJob, "write", full)
    done = train(tmp_path / "run", config)
    assert len(done.records) == 6 and "unsaved" in done.events
    assert [path.name for path in checkpoint.list_finished(done.folder.checkpoints)][-1] == "step_6"


@pytest.mark.long
def test_an_evaluation_between_steps_reads_the_rows_of_the_last_commit(corpus: Path, tmp_path: Path) -> None:
    config = whole_run(corpus, steps=6, eval_every=2)
    through = train(tmp_path / "through", config)
    # Where it goes on, the tables are as a checkpoint has them, and nothing is staged.
    ways = {step: train(tmp_path / "stopped", config, stop_after=step) for step in (1, 2, 3, 4, 6)}
    assert [ways[step].evaluations[-1] for step in (2, 4, 6)] == through.evaluations
    stopped = ways[6]
    quiet = train(tmp_path / "quiet", whole_run(corpus, steps=6))
    assert quiet.curve == through.curve == stopped.curve
    assert quiet.digest == through.digest == stopped.digest


def test_weights_that_are_copied_for_a_server_are_those_of_one_commit(corpus: Path, tmp_path: Path) -> None:
    config = whole_run(corpus, steps=8, checkpoint_every=1, keep_checkpoints=100)
    offered: dict[int, dict[str, torch.Tensor]] = {}

    def look(step: int, run: Run, fleet: LocalFleet) -> None:
        assert isinstance(run.driver, Trainer)
        found = run.driver.offers.ask("server", 1)
        if found is not None and found.step not in offered:
            names = [f"dse.1.bucket.{bucket}" for bucket in range(config.model.dse.num_buckets)]
            offered[found.step] = read_offered(found.source, names)
            run.driver.offers.release("server")
        time.sleep(0.1)

    trained = train(tmp_path / "run", config, at_step=look)
    # One that falls due while another is being written is left out.
    saved = {
        checkpoint.read_manifest(path)["step"]: path
        for path in checkpoint.list_finished(trained.folder.checkpoints)
    }
    assert len(saved.keys() & offered.keys()) >= 2
    for step in saved.keys() & offered.keys():
        wanted = checkpoint.read_tensors(saved[step], list(offered[step]))
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in offered[step].items()), step
