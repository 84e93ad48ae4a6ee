"""State in a whole run: bfloat16 rows train, move and come back to the bit; what serves reads weights only."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_cluster import LocalFleet, Run, Trained, tiny_run, train
from torch import Tensor

from sparseray.actors.installation import InstallPlan, JobSpec, Restore
from sparseray.actors.slot import Slot
from sparseray.actors.wire.envelope import Message
from sparseray.actors.wire.messages import Installed
from sparseray.errors import CheckpointError
from sparseray.model.config import RopeConfig
from sparseray.model.dse_layout import DSELayout
from sparseray.platform.checks import check_cluster
from sparseray.platform.config import ClusterConfig, RunConfig, ServeConfig, to_dict
from sparseray.platform.fleet.job import SlotJob
from sparseray.platform.fleet.weights_port import WeightsPort
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.opening import open_serving, serving_inventory
from sparseray.platform.run import checkpoint
from sparseray.platform.run.folder import RunFolder

STEPS = 10


def bfloat16_run(corpus: Path, **cluster: Any) -> RunConfig:
    config = tiny_run(corpus, steps=STEPS, **cluster)
    return replace(config, model=replace(config.model, dse=replace(config.model.dse, row_dtype="bfloat16")))


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("plain"), bfloat16_run(corpus))


def newest(found: Trained) -> Path:
    path = found.folder.newest_checkpoint()
    assert path is not None
    return path


def test_a_checkpoint_holds_bfloat16_rows(plain: Trained) -> None:
    entries = checkpoint.read_manifest(newest(plain))["tensors"]
    rows = {name: entry for name, entry in entries.items() if name.startswith("dse.") and "@" not in name}
    assert rows and {entry["dtype"] for entry in rows.values()} == {"bfloat16"}
    tensors = checkpoint.read_tensors(newest(plain), list(rows))
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())


def test_rows_in_bfloat16_train_almost_as_in_float32(plain: Trained, corpus: Path, tmp_path: Path) -> None:
    exact = train(tmp_path / "run", tiny_run(corpus, steps=STEPS))
    assert plain.curve != exact.curve
    for (half, *_), (full, *_) in zip(plain.curve, exact.curve, strict=True):
        assert abs(half - full) < 2e-3 * full


def test_bfloat16_rows_have_the_same_bits_with_more_slots_a_kill_and_a_resume(
    plain: Trained, corpus: Path, tmp_path: Path
) -> None:
    config = bfloat16_run(corpus, memory_shards=2, replication=2, standby=1)

    def kill(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == 3:
            plan = run.generations.plan
            assert plan is not None
            fleet.kill(plan.memory_primaries[0])

    train(tmp_path / "run", config, at_step=kill, stop_after=6)
    found = train(tmp_path / "run", config)
    assert (found.curve, found.digest) == (plain.curve, plain.digest)
    assert "lost" in found.events


class Recorder:
    """In place of a slot's mailbox: notes what it says."""

    def __init__(self) -> None:
        self.slot, self.generation, self.said = 0, 0, []
        self.transport = SimpleNamespace(connect=lambda peers: None)

    def adopt(self, generation: int) -> None:
        self.generation = generation

    def post(self, to: int, body: Any, **envelope: Any) -> int:
        self.said.append(body)
        return len(self.said)


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_a_serving_slot_reads_and_holds_weights_only(
    row_dtype: str, plain: Trained, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = plain if row_dtype == "bfloat16" else train(tmp_path / "run", tiny_run(corpus, steps=2))
    directory = newest(trained)
    config = open_serving(directory, ServeConfig(), ClusterConfig(colocated=True))
    layout = DSELayout.load(directory)
    read: dict[str, Tensor] = {}
    plain_read = checkpoint.read_tensors

    def reading(folder: str, names: list[str]) -> dict[str, Tensor]:
        found = plain_read(folder, names)
        read.update(found)
        return found

    monkeypatch.setattr(checkpoint, "read_tensors", reading)
    bytes_held = []
    for serving in (True, False):
        spec = JobSpec(
            config=json.dumps(to_dict(config)),
            layout=str(directory),
            layout_sha256=layout.sha256,
            serving=serving,
            tokenizer=str(directory / "tokenizer.json"),
        )
        job = SlotJob(spec, Metrics({}), WeightsPort())
        slot = Slot(Recorder(), lambda _, job=job: job)  # type: ignore[arg-type]
        body = InstallPlan(
            plan=check_cluster(config.cluster, serving_inventory(config)),
            job=spec,
            scheduler="",
            step=2,
            restore=Restore(checkpoint=str(directory)),
        )
        read.clear()
        slot._control(Message(source=-1, generation=1, sequence=1, body=body))
        assert isinstance(slot.mailbox.said[-1], Installed)  # type: ignore[attr-defined]
        holdings = slot.roles.holdings
        assert holdings is not None and holdings.memory is not None
        memory, experts = holdings.memory, holdings.experts
        assert serving == (not any("@" in name for name in read))
        bytes_held.append((experts.num_bytes, memory.tables[0].num_bytes, len(read)))
    (served, rows, _), (full, rows_and_moments, _) = bytes_held
    assert served * 3 == full and rows < rows_and_moments


def test_a_run_goes_on_from_a_checkpoint_of_a_version_that_knew_fewer_keys(tmp_path: Path) -> None:
    config = RunConfig()
    old = to_dict(config)
    for section in ("rope", "mla"):
        del old["model"][section]
    folder = RunFolder(tmp_path)
    manifest = {"format": checkpoint.FORMAT, "step": 3, "config": old, "files": {}, "identity": {}}
    made = checkpoint.finish(checkpoint.begin(folder.checkpoints, 3), manifest)
    assert folder.check_checkpoint(config, None) == made
    other = replace(config, model=replace(config.model, rope=RopeConfig(scaling="yarn", factor=2.0)))
    with pytest.raises(CheckpointError, match=r"model\.rope\.factor, model\.rope\.scaling differ"):
        folder.check_checkpoint(other, None)
