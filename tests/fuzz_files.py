"""Damaged files: data sets and checkpoints of which some bytes, values or whole files are others.

Whatever the damage, the answer is one sentence of ours, or exactly what the whole folder gives.
"""

from __future__ import annotations

import json
import pathlib
import random
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from conftest import write_corpus
from fuzz_values import damage
from local_cluster import tiny_run, train

from sparseray.actors.training.token_data import TokenDataset
from sparseray.errors import UserError
from sparseray.jobs.http.serving_model import read_served
from sparseray.jobs.tokens.prepare import prepare
from sparseray.platform.config import ClusterConfig, RunConfig, ServeConfig, to_dict
from sparseray.platform.opening import build_layout, open_serving
from sparseray.platform.run import checkpoint
from sparseray.platform.run.folder import RunFolder

ADDED = (b"\x00", b"\xff\xfe", b"{}", b"[" * 5000, b"9" * 5000)


def damage_folder(folder: pathlib.Path, rng: random.Random) -> Callable[[], None]:
    """Change one or two files of a folder.

    Returns:
        what makes it whole again.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = folder / "manifest.json"
    chosen = [rng.choice([manifest, *files]) for _ in range(rng.choice([1, 1, 2]))]
    before = {path: path.read_bytes() for path in chosen}
    for path in chosen:
        if path.is_file():
            _damage_file(path, files, rng)

    def restore() -> None:
        for path, content in before.items():
            if path.is_dir():
                path.rmdir()
            path.write_bytes(content)

    return restore


def _damage_file(path: pathlib.Path, files: list[pathlib.Path], rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    kind = rng.random()
    if path.suffix == ".json" and kind < 0.5:
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return
        if isinstance(value, dict | list):
            damage(value, rng)
        path.write_text(json.dumps(value, ensure_ascii=True))
    elif kind < 0.7 and content:
        for _ in range(rng.randint(1, 4)):
            # The heads of binary files are short, and decide the most.
            end = len(content) if rng.random() < 0.5 else min(len(content), 400)
            content[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(content)
    elif kind < 0.8:
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind < 0.87:
        path.write_bytes(bytes(content) + rng.choice(ADDED))
    elif kind < 0.92:
        path.write_bytes(rng.choice(ADDED) + bytes(content))
    elif kind < 0.96:
        path.write_bytes(
            rng.choice(files).read_bytes() if (files := [f for f in files if f.is_file()]) else b""
        )
    else:
        path.unlink()
        if rng.random() < 0.3:
            path.mkdir()


class DataSet:
    """A prepared data set, whole and then damaged.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: pathlib.Path) -> None:
        write_corpus(root / "text", documents=24, words=80)
        self.folder = root / "data"
        prepare([str(root / "text")], self.folder, vocab_size=300, validation_fraction=0.1)
        self.whole = self.read(verify=True)

    def read(self, *, verify: bool) -> list[Any]:
        """All that training takes from a data set."""
        found: list[Any] = []
        for split in ("train", "validation"):
            data = TokenDataset(self.folder, split, verify=verify)
            marks = np.concatenate([data.sequence(i, 32)[1] for i in range(data.num_windows(32))])
            found += [data.tokens.tolist(), marks.tolist(), data.eos_id, data.num_bytes, data.num_documents]
        build_layout(tiny_run(self.folder).model, data)
        return found

    def outcome(self, rng: random.Random) -> tuple[str, str]:
        """What becomes of a damaged folder, and what is wrong with that; "" if nothing is."""
        verify = rng.random() < 0.8
        found = self.read(verify=verify)
        # Damage that nobody looks for need not be found, but must not be a traceback either.
        return "as before", "other data" if verify and found != self.whole else ""


class Checkpoint:
    """A checkpoint of a tiny run, whole and then damaged.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: pathlib.Path) -> None:
        data = DataSet(root).folder
        self.config = tiny_run(data, steps=2)
        self.run = RunFolder(root / "run")
        train(self.run.path, self.config)
        self.folder = checkpoint.list_finished(self.run.checkpoints)[-1]
        self.served, tensors, self.step = self.read()
        # What was read may be a view of the file, which is to be damaged.
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def read(self) -> tuple[RunConfig, dict[str, torch.Tensor], int]:
        """All that a server, and a run that goes on, take from a checkpoint."""
        config = open_serving(self.folder, ServeConfig(), ClusterConfig())
        read_served(self.folder, config, ("x",))
        names = list(checkpoint.read_manifest(self.folder)["tensors"])
        tensors = checkpoint.read_tensors(self.folder, names)
        return config, tensors, checkpoint.read_manifest(self.folder)["step"]

    def outcome(self, rng: random.Random) -> tuple[str, str]:
        """What becomes of a damaged folder, and what is wrong with that; "" if nothing is."""
        self.run.newest_checkpoint()
        served, tensors, step = self.read()
        is_same = (
            to_dict(served) == to_dict(self.served)
            and step == self.step
            and tensors.keys() == self.tensors.keys()
            and all(
                tensor.dtype == self.tensors[name].dtype and torch.equal(tensor, self.tensors[name])
                for name, tensor in tensors.items()
            )
        )
        return "as before", "" if is_same else "another model"


KINDS: dict[str, type[DataSet] | type[Checkpoint]] = {"data": DataSet, "checkpoints": Checkpoint}


def files(kind: str, root: pathlib.Path, count: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Damage a folder in many ways, one after the other.

    Args:
        kind: one of `KINDS`.
        root: an empty folder to work in.
        count: of cases; first: the first one's number.

    Returns:
        How often each end came, and the faults with their numbers.
    """
    subject = KINDS[kind](root)
    ends: Counter[str] = Counter()
    faults: list[str] = []
    for number in range(first, first + count):
        rng = random.Random(number)
        restore = damage_folder(subject.folder, rng)
        try:
            end, fault = subject.outcome(rng)
        except UserError as error:
            is_sentence = 10 < len(str(error)) < 1000 and "\n" not in str(error)
            end, fault = "refused", "" if is_sentence else f"no sentence: {str(error)[:300]!r}"
        except Exception as error:
            end, fault = "crashed", f"{type(error).__name__}: {str(error)[:300]}"
        restore()
        ends[end] += 1
        faults += [f"case {number}: {fault}"] if fault else []
    shutil.rmtree(root, ignore_errors=True)
    return ends, faults
