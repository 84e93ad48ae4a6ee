"""Training over hosts that share no memory: each slot on a machine of its own, which are namespaces of this one."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hosts import is_possible, two_hosts
from local_cluster import tiny_run, train
from processes import start, wait_until

from sparseray.platform.config import save_yaml
from sparseray.platform.run import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300)]
ROLES = ("attention_workers", "expert_shards", "memory_shards", "replication")
STEPS = 60


def lines(path: Path) -> list[dict[str, Any]]:
    """Records so far; the last one may be on its way."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_slot_killed_on_another_host_comes_again_and_no_bit_differs(corpus: Path, tmp_path: Path) -> None:
    if not is_possible():
        pytest.skip("needs leave to make namespaces")
    config = tiny_run(corpus, steps=STEPS, colocated=True, **dict.fromkeys(ROLES, 2))
    config = replace(config, train=replace(config.train, dtype="bfloat16"))
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    with two_hosts(tmp_path) as hosts:
        cluster = replace(config.cluster, transport="tcp", bind_host="node", address=hosts.address)
        save_yaml(replace(config, cluster=cluster), tmp_path / "run.yaml")
        options = ["pretrain", "--config", str(tmp_path / "run.yaml"), f"--run_dir={run_dir}"]
        process = start(options, log, inside=hosts.inside(0))

        def step() -> int:
            assert process.poll() is None, log.read_text()[-3000:]
            return len(lines(run_dir / "metrics.jsonl"))

        wait_until(lambda: step() >= 10, "step 10")
        assert len(hosts.slots(0)) == len(hosts.slots(1)) == 1
        os.kill(hosts.slots(1)[0], signal.SIGKILL)
        assert process.wait(200.0) == 0, log.read_text()[-3000:]
    events = [event["kind"] for event in lines(run_dir / "events.jsonl")]
    assert "recovered" in events and "resized" in events and "restored" not in events
    one = replace(config.cluster, **dict.fromkeys(ROLES, 1))
    alone = train(tmp_path / "alone", replace(config, cluster=one))
    found = [(r["loss"], r["aux_loss"], r["grad_norm"]) for r in lines(run_dir / "metrics.jsonl")]
    assert found == alone.curve
    newest = checkpoint.list_finished(run_dir / "checkpoints")[-1]
    assert checkpoint.read_manifest(newest)["digest"] == alone.digest
