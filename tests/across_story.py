"""A run of several slots in processes of their own, one of which is killed and comes again, and the same of one slot."""

import json
import os
import re
import signal
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from local_cluster import train
from processes import for_slots, kill_all, of_mark, resting, run, start, wait_until, with_last_words

from sparseray.platform.config import RunConfig, save_yaml
from sparseray.platform.run import checkpoint

LIMIT_S, REST_S = 240.0, 0.5
CHUNK_BYTES = 16384
"""Of state that moves: a slot's takes dozens of them."""


class Story:
    """The command on its way.

    Args:
        config: of the run.
        folder: for everything.
        temporary: folder of sockets and Ray.
        faults: of its slots from the second on, moment, call and kind each, as tests/planted/faulty_slots.py takes them.
    """

    def __init__(self, config: RunConfig, folder: Path, temporary: Path, faults: Sequence[str] = ()) -> None:
        self.run_dir, self.mark, self.faults = folder / "run", uuid.uuid4().hex, faults
        save_yaml(config, folder / "run.yaml")
        options = ["pretrain", "--config", str(folder / "run.yaml"), f"--run_dir={self.run_dir}"]
        text = " ".join(f"{slot}:{fault}" for slot, fault in enumerate(faults, start=1))
        environment = {"TMPDIR": str(temporary), "SPARSERAY_TEST": self.mark, "SPARSERAY_TEST_FAULTS": text}
        # Slots load beside the run, and the story waits for them; one slot then does all of its steps again.
        environment |= resting(REST_S) | {"SPARSERAY_TEST_CHUNK_BYTES": str(CHUNK_BYTES)}
        cluster = config.cluster
        if cluster.device == "cuda" and cluster.exchange != "collective":
            roles = cluster.attention_workers, cluster.expert_shards, cluster.memory_shards
            # A story of one slot has a second one on its way.
            environment |= for_slots(max(2, *roles) if cluster.colocated else sum(roles))
        self.log, self.temporary = folder / "log.txt", temporary
        self.process: subprocess.Popen[bytes] = start(options, self.log, **environment)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Lines of a file of records; the last one may be on its way."""
        path = self.run_dir / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def step(self) -> int:
        """The last committed one."""
        return len(self.lines("metrics.jsonl"))

    def events(self) -> list[str]:
        """Kinds of what has happened."""
        return [event["kind"] for event in self.lines("events.jsonl")]

    def wait_for(self, condition: Any, what: str) -> None:
        """Wait, as long as the command runs."""

        def is_there() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return bool(condition())

        wait_until(is_there, what, LIMIT_S)

    def wait_steps(self, count: int) -> None:
        """Wait for so many more steps."""
        wanted = self.step() + count
        self.wait_for(lambda: self.step() >= wanted, f"step {wanted}")

    def wait_events(self, kind: str, count: int, what: str) -> None:
        """Wait until so many events of a kind have happened."""
        self.wait_for(lambda: self.events().count(kind) >= count, what)

    def logged(self, text: str) -> int:
        """Processes of Ray in whose log there is some text."""
        return sum(text in path.read_text() for path in self.temporary.rglob("worker-*.err"))

    def slots(self) -> list[int]:
        """Processes of slots: the workers whose title Ray sets to their class."""
        return sorted(p.pid for p in of_mark(self.mark) if "SlotActor" in " ".join(p.cmdline()))

    def fail(self) -> None:
        """Let one slot after another fail as planted, each in the place of the one before."""
        for count, fault in enumerate(self.faults, start=1):
            self.wait_events("recovered", count, f"what follows {fault}")
            self.wait_events("resized", count, f"a slot after {fault}")
        self.wait_steps(3)

    def scale(self, count: int) -> None:
        """Have so many slots, each with all roles."""
        resized = self.events().count("resized")
        for role in ("attention", "experts", "memory"):
            arguments = ["scale", str(self.run_dir), role, str(count), "--no_wait"]
            assert run(arguments, self.log, TMPDIR=str(self.temporary), SPARSERAY_TEST=self.mark) == 0
        self.wait_events("resized", resized + 1, f"{count} slots")
        self.wait_for(lambda: len(self.targets()) == count, f"{count} slots alone")

    def targets(self) -> dict[str, str]:
        """Where the slots' metrics are, by name."""
        listed = json.loads((self.run_dir / "prometheus_targets.json").read_text())
        found = {entry["labels"]["process"]: entry["targets"][0] for entry in listed}
        return {name: address for name, address in found.items() if name.startswith("slot")}

    def come_and_go(self) -> None:
        """A second slot comes and goes, and no state moves by message."""
        self.wait_steps(3)
        self.scale(2)
        assert self.pulled()["mapped"] > 0 and self.pulled()["message"] == 0
        self.wait_steps(3)
        self.scale(1)
        assert self.pulled()["message"] == 0
        self.wait_steps(3)

    def pulled(self) -> dict[str, float]:
        """Bytes that the slots that are there have copied from others, by path."""
        found = {"mapped": 0.0, "message": 0.0}
        for address in self.targets().values():
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                text = answer.read().decode()
            for line in re.findall(r"^sparseray_elastic_pulled_bytes_total\{.*", text, re.MULTILINE):
                labels, value = line.rsplit(" ", 1)
                found["mapped" if 'path="mapped"' in labels else "message"] += float(value)
        return found

    def lose_a_slot(self) -> None:
        """Kill a slot, go on, get one again, and go on."""
        self.wait_for(lambda: self.step() >= 10, "step 10")
        recovered, resized = (self.events().count(kind) for kind in ("recovered", "resized"))
        os.kill(self.slots()[-1], signal.SIGKILL)
        self.wait_events("recovered", recovered + 1, "the next generation")
        self.wait_steps(3)
        self.wait_events("resized", resized + 1, "another slot")
        self.wait_steps(3)


@contextmanager
def told(config: RunConfig, folder: Path, temporary: Path, faults: Sequence[str] = ()) -> Iterator[Story]:
    """A story that goes on while the block runs, and then is stopped and compared with that of one slot.

    Args:
        config, folder, temporary, faults: as in `Story`.
    """
    story = Story(config, folder, temporary, faults)
    try:
        with with_last_words(story.log, temporary):
            yield story
        story.process.send_signal(signal.SIGINT)
        assert story.process.wait(LIMIT_S) == 130, story.log.read_text()[-3000:]
    finally:
        kill_all(story.process, story.mark)
    records, steps = story.lines("metrics.jsonl"), story.step()
    print(f"{steps} steps; events: {story.lines('events.jsonl')}")
    roles = dict.fromkeys(("attention_workers", "expert_shards", "memory_shards", "replication"), 1)
    one = replace(config.cluster, colocated=True, **roles)
    alone = train(folder / "alone", replace(config, cluster=one), stop_after=steps)
    assert [(r["loss"], r["aux_loss"], r["grad_norm"]) for r in records] == alone.curve
    newest = checkpoint.list_finished(story.run_dir / "checkpoints")[-1]
    assert checkpoint.read_manifest(newest)["digest"] == alone.digest
    assert "restored" not in story.events()
