"""A device that is full while a run or a server goes on, or before it begins: one sentence that says what to change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import tiny_run, train
from processes import wait_until

from sparseray.actors.slot import device_full
from sparseray.actors.training.worker import AttentionWorker
from sparseray.errors import ConfigError, UserError
from sparseray.platform import config as configuration
from sparseray.platform.config import RunConfig
from sparseray.platform.fleet import host as host_module
from sparseray.platform.fleet.host import Host
from sparseray.platform.run import checkpoint

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB\nin all.")


def test_a_run_whose_device_is_full_ends_with_what_to_change_and_keeps_its_checkpoints(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step, checkpoints = AttentionWorker.run_step, tmp_path / "run" / "checkpoints"

    def full(self: AttentionWorker, step: int, *arguments: Any) -> None:
        if step == 4:
            # It is written beside the steps.
            wait_until(lambda: checkpoint.list_finished(checkpoints), "the checkpoint of step 2")
            raise FULL
        run_step(self, step, *arguments)

    monkeypatch.setattr(AttentionWorker, "run_step", full)
    config = tiny_run(corpus, steps=6, colocated=True)
    config = replace(config, train=replace(config.train, dtype="bfloat16", checkpoint_every=2))
    with pytest.raises(
        UserError, match=r"slot 0: its device has no memory left; set train\.recompute=true"
    ) as said:
        train(tmp_path / "run", config)
    assert "Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB in all." in str(said.value)
    assert [path.name for path in checkpoint.list_finished(checkpoints)] == ["step_2"]
    monkeypatch.setattr(AttentionWorker, "run_step", run_step)
    done = train(tmp_path / "run", config)
    assert done.records[-1]["step"] == 6


@pytest.mark.parametrize("is_serving", [False, True])
def test_every_setting_that_is_named_exists(is_serving: bool) -> None:
    cure = device_full(FULL, is_serving=is_serving).split(";")[1].split("(")[0]
    named = [word.strip(",").partition("=") for word in cure.split() if "." in word]
    assert len(named) == 3
    plain = configuration.to_dict(RunConfig())
    for name, _, value in named:
        section, _, key = name.partition(".")
        known = plain[section][key]
        assert is_serving == (section == "serve") and (not value or value != str(known).lower())


def test_a_device_that_is_full_before_anything_begins_is_a_users_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(job: Any) -> None:
        raise FULL

    monkeypatch.setattr(host_module, "warm_holdings", full)
    host = Host(slot=0, job="full", threads=1, transport="tcp", bind_host="127.0.0.1", node="")
    host._jobs = lambda spec: type("Job", (), {"is_serving": True})()  # type: ignore[assignment, method-assign]
    with pytest.raises(ConfigError, match=r"lower serve\.cache_gib, serve\.max_batch"):
        host.prepare(None, "")  # type: ignore[arg-type]
