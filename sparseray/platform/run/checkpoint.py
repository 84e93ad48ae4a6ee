"""Checkpoints: a folder of safetensors named by logical parameter, and a manifest written last.

Every holder writes its part; the scheduler writes the manifest and renames the folder. A folder
without the final name does not count. It loads on any number of slots, since names are logical.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparseray.actors.wire.messages import SavedTensor
from sparseray.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
FILE_BYTES = 1 << 30
THREADS = 4
"""Files that a slot writes, or reads, at a time: hashing one takes as long as a disk."""


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_groups(
    tensors: dict[str, torch.Tensor], most_bytes: int = FILE_BYTES
) -> Iterator[dict[str, torch.Tensor]]:
    """Cut tensors into groups, in their order.

    Args:
        tensors: by name.
        most_bytes: of a group, but for one tensor that is larger.
    """
    group: dict[str, torch.Tensor] = {}
    left = most_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if group and size > left:
            yield group
            group, left = {}, most_bytes
        group[name] = tensor
        left -= size
    yield group


def write_part(directory: str | Path, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
    """Write tensors to `<part>.safetensors`, or to several files where they are large; on disk when this returns.

    Args:
        directory: of the unfinished checkpoint.
        part: name of the file, without its ending.
        tensors: by logical name.

    Returns:
        where each tensor is, by its name.
    """
    groups = list(in_groups(tensors))
    names = [part] if len(groups) == 1 else [f"{part}_{index:04d}" for index in range(len(groups))]
    paths = [Path(directory) / f"{name}.safetensors" for name in names]
    with ThreadPoolExecutor(min(THREADS, len(groups)), "checkpoint") as pool:
        return {name: entry for found in pool.map(_write, paths, groups) for name, entry in found.items()}


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, SavedTensor]:
    """Write one file."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(plain, path)
        sync(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from None
    return {
        name: SavedTensor(
            file=path.name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            sha256=tensor_sha256(tensor),
        )
        for name, tensor in plain.items()
    }


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(tensors: dict[str, Any]) -> str:
    """SHA-256 over names and hashes of all tensors; the same however they are spread over files."""
    lines = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the SHA-256 of all that it says, by which damage shows wherever it is."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def begin(root: Path, step: int) -> Path:
    """Make an empty folder for the parts of a checkpoint.

    Args:
        root: folder of the run's checkpoints.
        step: that is committed.
    """
    path = root / f"step_{step}{UNFINISHED}"
    if path.exists():
        # A slot that knows nothing yet of a change of plan may write there still.
        shutil.rmtree(set_aside(path), ignore_errors=True)
    path.mkdir(parents=True)
    return path


def set_aside(unfinished: Path) -> Path:
    """Give a folder that will not be finished another name: who writes there finds it no more. `prune` removes it.

    Args:
        unfinished: folder from `begin`.
    """
    aside = unfinished.with_name(unfinished.name.removesuffix(UNFINISHED) + f"_{time.time_ns()}{UNFINISHED}")
    with contextlib.suppress(OSError):
        os.rename(unfinished, aside)
    return aside


def finish(unfinished: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest and give the folder its final name; from now on it counts.

    Args:
        unfinished: folder from `begin`.
        manifest: what the checkpoint holds.
    """
    path = unfinished / MANIFEST
    path.write_text(json.dumps(sealed(manifest), indent=1))
    sync(path)
    sync(unfinished)
    final = unfinished.with_name(unfinished.name.removesuffix(UNFINISHED))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(unfinished, final)
    sync(final.parent)
    return final


def give_up(root: Path, step: int) -> None:
    """Remove what was written of a checkpoint that cannot be finished.

    Args:
        root: folder of the run's checkpoints.
        step: that it was of.
    """
    shutil.rmtree(root / f"step_{step}{UNFINISHED}", ignore_errors=True)


def prune(root: Path, keep: int, needed: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and what was never finished.

    Args:
        root: folder of the run's checkpoints.
        keep: how many; 1 or more.
        needed: one that stays in any case.
    """
    for path in root.glob(f"step_*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in list_finished(root)[:-keep]:
        if path != needed:
            shutil.rmtree(path, ignore_errors=True)


def list_finished(root: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [
        p for p in root.glob("step_*") if p.name.removeprefix("step_").isdigit() and (p / MANIFEST).exists()
    ]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a finished checkpoint is of, by its name."""
    return int(path.name.removeprefix("step_"))


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    path = Path(directory) / MANIFEST
    cure = f"remove {directory} to use the one before"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a checkpoint: it has no {MANIFEST}; give a folder such as RUN/checkpoints/step_50"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())}); {cure}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {repr(found)[:80]}, this version reads {FORMAT}; use the version that wrote it"
        )
    if manifest.get("sha256") != sealed(manifest)["sha256"]:
        raise CheckpointError(f"{path} differs from its own SHA-256: the checkpoint is damaged; {cure}")
    return manifest


def check_files(directory: str | Path, manifest: dict[str, Any]) -> None:
    """Check that all files are there: tensors, without reading them, by their length, and what is small by its SHA-256.

    Args:
        directory: of the checkpoint.
        manifest: from `read_manifest`.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    for name, size in manifest["files"].items():
        path = Path(directory) / name
        state = _wrong_with(path, size, manifest["identity"].get(name))
        if state:
            raise CheckpointError(
                f"{path} {state}: the checkpoint is damaged; remove {directory} to use the one before"
            )


def _wrong_with(path: Path, size: int, sha256: str | None) -> str:
    """What is wrong with a file of a checkpoint; empty if nothing is."""
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual} bytes instead of {size}"
        return "differs from its SHA-256" if sha256 and file_sha256(path) != sha256 else ""
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def read_tensors(directory: str | Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read and verify tensors by logical name.

    Args:
        directory: of the checkpoint.
        names: logical names.

    Raises:
        CheckpointError: a tensor is missing, or its bytes differ from what was written.
    """
    entries = read_manifest(directory)["tensors"]
    by_file: dict[str, list[str]] = {}
    for name in names:
        if name not in entries:
            raise CheckpointError(f"{directory} has no tensor {name!r}: it is a checkpoint of another model")
        by_file.setdefault(entries[name]["file"], []).append(name)

    def read(file: str) -> dict[str, torch.Tensor]:
        return _read(Path(directory) / file, {name: entries[name] for name in by_file[file]})

    with ThreadPoolExecutor(THREADS, "checkpoint") as pool:
        return {name: tensor for found in pool.map(read, by_file) for name, tensor in found.items()}


def _read(path: Path, entries: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read and verify tensors of one file, by what the manifest says of them."""
    try:
        with safe_open(path, framework="pt") as archive:
            found = {name: archive.get_tensor(name) for name in entries}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({' '.join(str(error).split())}); use an older checkpoint"
        ) from None
    for name, tensor in found.items():
        entry = entries[name]
        is_like = [*tensor.shape] == entry["shape"] and str(tensor.dtype) == f"torch.{entry['dtype']}"
        if not is_like or tensor_sha256(tensor) != entry["sha256"]:
            raise CheckpointError(
                f"{path}: {name} differs from its SHA-256, type or shape; use an older checkpoint"
            )
    return found
