"""Training on one GPU, end to end: the same bits twice, beside the CPU's curve, over a SIGKILL, and over checkpoints."""

import json
import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import MODEL, LocalFleet, tiny_run, train
from processes import kill_all, start, temporary_folder, wait_until
from test_whole_slot import seeds_apart

from sparseray.actors.training import worker
from sparseray.actors.training.part_graph import PartGraph, graph_of
from sparseray.actors.training.worker import SAMPLE_EVERY
from sparseray.model.config import DSEConfig, MoEConfig, MTPConfig, NSAConfig
from sparseray.platform.config import RunConfig, save_yaml
from sparseray.platform.run import checkpoint
from sparseray.platform.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
]
GPU_MODEL = replace(
    MODEL,
    hidden=128,
    head_dim=32,
    ffn_dim=256,
    nsa=NSAConfig(block=16, stride=8, select_block=16, num_selected=3, num_initial=1, num_local=1, window=16),
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=64),
    dse=DSEConfig(layers=(1,), heads=2, rows_per_head=97, head_dim=16, num_buckets=6),
)


def run_on(
    device: str,
    data: Path,
    *,
    steps: int = 8,
    dtype: str = "bfloat16",
    cluster: dict[str, Any] | None = None,
    **keys: object,
) -> RunConfig:
    config = tiny_run(data, steps=steps, colocated=True, device=device, deadline_s=60.0, **(cluster or {}))
    trained = replace(config.train, dtype=dtype, seq_len=64, **keys)
    return replace(config, model=GPU_MODEL, train=trained)


def test_a_run_comes_again_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    config = run_on("cuda", corpus)
    one, two = (train(tmp_path / name, config) for name in ("one", "two"))
    assert one.curve == two.curve and one.digest == two.digest
    assert one.records[-1]["device_gib"] > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 1e-2)])
def test_the_curve_is_that_of_a_cpu(corpus: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    theirs = train(tmp_path / "cpu", run_on("cpu", corpus, dtype="float32"))
    ours = train(tmp_path / "gpu", run_on("cuda", corpus, dtype=dtype))
    for a, b in zip(ours.curve, theirs.curve, strict=True):
        assert a[0] == pytest.approx(b[0], rel=tolerance)
        assert a[2] == pytest.approx(b[2], rel=20 * tolerance)


def test_bfloat16_ends_beside_fp32_within_what_seeds_differ_by(corpus: Path, tmp_path: Path) -> None:
    differs, noise = seeds_apart(run_on("cuda", corpus, steps=40), tmp_path)
    assert 0.0 < differs < noise


@pytest.mark.parametrize(
    "keys",
    [{}, {"logical_shards": 1}, {"recompute": True}, {"logical_shards": 1, "dtype": "float32"}, {"mtp": 1}],
    ids=str,
)
def test_replayed_parts_change_no_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    """With memory rows, checkpoints beside the steps, evaluations between them, and a step that notes statistics."""
    monkeypatch.setitem(SAMPLE_EVERY, "cuda", 5)
    keys = dict(keys)
    mtp = MTPConfig(depth=keys.pop("mtp", 0))
    config = run_on("cuda", corpus, steps=11, checkpoint_every=2, eval_every=3, **keys)
    config = replace(config, model=replace(config.model, mtp=mtp))
    made: list[PartGraph] = []

    def graph(*arguments: Any) -> PartGraph | None:
        made.append(graph_of(*arguments))
        return made[-1]

    monkeypatch.setattr(worker, "graph_of", graph)
    replayed = train(tmp_path / "replayed", config)
    assert [g is not None and g.is_recorded for g in made] == [True]
    monkeypatch.setattr(worker, "graph_of", lambda *arguments: None)
    launched = train(tmp_path / "launched", config)
    assert replayed.curve == launched.curve and replayed.digest == launched.digest
    assert replayed.evaluations == launched.evaluations


def test_recomputed_layers_change_no_bit(corpus: Path, tmp_path: Path) -> None:
    kept, again = (train(tmp_path / str(r), run_on("cuda", corpus, recompute=r)) for r in (False, True))
    assert kept.curve == again.curve and kept.digest == again.digest


def test_a_killed_slot_is_replaced_and_the_run_comes_to_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    config = run_on("cuda", corpus, checkpoint_every=2)

    def kill(step: int, trainer: Trainer, fleet: LocalFleet) -> None:
        if step == 5 and fleet.used == 1:
            fleet.kill(0)

    undisturbed = train(tmp_path / "undisturbed", config)
    killed = train(tmp_path / "killed", config, at_step=kill)
    assert "restored" in killed.events
    assert killed.curve == undisturbed.curve and killed.digest == undisturbed.digest


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_checkpoint_of_a_cpu_goes_on_on_a_gpu_and_back(corpus: Path, tmp_path: Path, moments: str) -> None:
    cpu, gpu = run_on("cpu", corpus, steps=9, dtype="float32"), run_on("cuda", corpus, steps=9)
    gpu = replace(gpu, optim=replace(gpu.optim, moments=moments))
    train(tmp_path / "run", cpu, stop_after=3)
    train(tmp_path / "run", gpu, stop_after=6)
    mixed, plain = train(tmp_path / "run", cpu), train(tmp_path / "cpu", cpu)
    for a, b in zip(mixed.curve, plain.curve, strict=True):
        assert a[0] == pytest.approx(b[0], rel=2e-2)


@pytest.fixture
def temporary() -> Iterator[Path]:
    with temporary_folder() as folder:
        yield folder


@pytest.mark.ray
def test_sigkill_of_the_gpu_slot_through_ray(corpus: Path, tmp_path: Path, temporary: Path) -> None:
    config = run_on("cuda", corpus, steps=60, checkpoint_every=10)
    undisturbed = train(tmp_path / "undisturbed", config)
    save_yaml(config, tmp_path / "run.yaml")
    run_dir, mark = tmp_path / "run", uuid.uuid4().hex
    options = ["pretrain", "--config", str(tmp_path / "run.yaml"), f"--run_dir={run_dir}"]
    process = start(options, tmp_path / "log.txt", TMPDIR=str(temporary), SPARSERAY_TEST=mark)
    try:
        metrics = run_dir / "metrics.jsonl"
        wait_until(
            lambda: (
                process.poll() is not None
                or (metrics.exists() and len(metrics.read_text().splitlines()) > 25)
            ),
            "step 25",
            300.0,
        )
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
        os.kill(_slot_pid(mark), signal.SIGKILL)
        assert process.wait(300.0) == 0
    finally:
        kill_all(process, mark)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(r["loss"], r["aux_loss"], r["grad_norm"]) for r in records] == undisturbed.curve
    newest = checkpoint.list_finished(run_dir / "checkpoints")[-1]
    assert checkpoint.read_manifest(newest)["digest"] == undisturbed.digest
    assert "restored" in (run_dir / "events.jsonl").read_text()


def _slot_pid(mark: str) -> int:
    """Process of the only slot: the worker whose title Ray sets to its class."""
    from processes import of_mark

    return next(p.pid for p in of_mark(mark) if "SlotActor" in " ".join(p.cmdline()))
