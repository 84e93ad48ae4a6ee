"""The first 20 losses of configs/tiny.yaml, as they were: a change that moves them says why in its commit.

The corpus is made here, byte by byte without merges, so that no version of Python or of the tokenizer moves
it. Write the file anew with `PYTHONPATH=. python tests/test_golden.py`.
"""

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from conftest import write_corpus
from local_cluster import train

from sparseray.jobs.prepare import prepare
from sparseray.platform.config import load_yaml

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "tiny_losses.json"
STEPS = 20


def here() -> dict[str, str]:
    """What may change the last bits of a loss."""
    return {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def losses(folder: Path) -> list[float]:
    """Train configs/tiny.yaml on the fixed corpus in one colocated slot."""
    write_corpus(folder / "text", documents=60, words=180, seed=42)
    prepare([str(folder / "text")], folder / "data", vocab_size=257, validation_fraction=0.1)
    config = load_yaml(ROOT / "configs" / "tiny.yaml")
    config = replace(
        config,
        data=replace(config.data, path=str(folder / "data")),
        train=replace(config.train, eval_batches=1),
        cluster=replace(config.cluster, colocated=True),
    )
    return [record["loss"] for record in train(folder / "run", config, stop_after=STEPS).records]


def test_first_losses_of_the_tiny_configuration_are_the_recorded_ones(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = losses(tmp_path)
    assert len(found) == len(golden["losses"]) == STEPS
    if here() == {key: golden[key] for key in here()}:
        assert [repr(loss) for loss in found] == golden["losses"]
    else:
        for loss, recorded in zip(found, golden["losses"], strict=True):
            assert math.isclose(loss, float(recorded), rel_tol=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        record = {**here(), "losses": [repr(loss) for loss in losses(Path(folder))]}
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n")
