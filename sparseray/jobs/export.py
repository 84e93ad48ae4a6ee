"""The `export` command: a checkpoint becomes a folder that transformers loads, where its format can say the model.

The other way round of import_.py: tensors are read and verified some at a time, cut into theirs, and written as
sharded safetensors with an index; tokenizer, template and generation settings go along.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseray.errors import CheckpointError, ConfigError, UserError
from sparseray.jobs.import_ import check_new, unfinished_folder
from sparseray.jobs.progress import progress_of_bytes
from sparseray.platform import config as configuration
from sparseray.platform.run.texts import HUB_CONFIG, TEXT_FILES
from sparseray.platform.settings import expand_path

if TYPE_CHECKING:
    from torch import Tensor

    from sparseray.jobs.tokens.progress import Progress
    from sparseray.model.config import ModelConfig
    from sparseray.model.hub import Entry

DESCRIPTION = """Turn a checkpoint into a Hugging Face model of the DeepSeek family, for transformers and other servers."""
EXAMPLE = """example:
  python -m sparseray export --checkpoint imported/v2_lite --out models/again --dtype bfloat16
  python -m sparseray export --checkpoint runs/first/checkpoints/step_100 --out models/first --trust_own_format
"""
SHARD_BYTES = 512 << 20
"""Most bytes of a file; one tensor that is larger has a file of its own."""


def main(arguments: list[str]) -> int:
    """Run the command: 0, or 2 for what cannot be exported."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m sparseray export", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=raw
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="CKPT", help="such as RUN/checkpoints/step_100"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=("stored", "float32", "bfloat16"),
        default="stored",
        help="of the weights; stored: as the checkpoint has them (default)",
    )
    parser.add_argument(
        "--trust_own_format",
        action="store_true",
        help="a model that their format cannot say goes out as type sparseray, which no other program loads: tensors by our "
        "names beside a FORMAT.md that says what each is",
    )
    options = parser.parse_args(arguments)
    try:
        source, out = (
            Path(expand_path(path, name))
            for path, name in ((options.checkpoint, "--checkpoint"), (options.out, "--out"))
        )
        return run(source, out, options.dtype, trust_own_format=options.trust_own_format)
    except UserError as error:
        return configuration.die(error)


def run(source: Path, out: Path, dtype: str, *, trust_own_format: bool = False) -> int:
    """Export a model, and say what was made.

    Args:
        source: folder of the checkpoint.
        out: folder to make.
        dtype: of the weights.
        trust_own_format: as in `export_model`.
    """
    from sparseray.jobs.own_format import PAGE

    begin = time.perf_counter()
    with progress_of_bytes() as progress:
        num_bytes = export_model(source, out, dtype, progress, trust_own_format=trust_own_format)
    seconds = time.perf_counter() - begin
    print(f"{num_bytes / 1e6:.1f} MB in {seconds:.1f} s ({num_bytes / 1e6 / seconds:.1f} MB/s)")
    own = f" (type sparseray; {out / PAGE} says how it is read)" if (out / PAGE).exists() else ""
    print(f"model: {out}{own}")
    return 0


def export_model(
    source: Path, out: Path, dtype: str, progress: Progress, *, trust_own_format: bool = False
) -> int:
    """Write a model's folder from a checkpoint; returns the bytes of its weights.

    Args:
        source: the checkpoint's folder.
        out: of the model; must not exist.
        dtype: "stored", "float32" or "bfloat16".
        progress: told of the bytes that were written.
        trust_own_format: write what the format has no words for as a type of our own.

    Raises:
        UserError: the format has no words for the model, the checkpoint is damaged, or the folder cannot be written.
    """
    from sparseray.jobs.own_format import own_entries
    from sparseray.model.hub import entries
    from sparseray.platform.run import checkpoint

    check_new(out)
    manifest = checkpoint.read_manifest(source)
    checkpoint.check_files(source, manifest)
    model = configuration.from_dict(configuration.RunConfig, manifest["config"]).model
    is_own, stored = _is_own(model, trust_own_format), manifest["tensors"]
    wanted = own_entries(stored) if is_own else (entry for entry in entries(model) if entry.theirs)
    sized = [(entry, _size(entry, stored, source, dtype)) for entry in wanted]
    total = sum(size for _, size in sized)
    shards = list(_shards(sized))
    with unfinished_folder(out, total) as unfinished:
        kind = dtype if dtype != "stored" else stored["embedding"]["dtype"]
        if is_own:
            _write_own(source, unfinished, model, kind, [entry for entry, _ in sized])
        else:
            _write_theirs(source, unfinished, model, kind)
        where: dict[str, str] = {}
        done = 0
        for index, shard in enumerate(shards):
            name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = _cut(shard, checkpoint.read_tensors(source, [e.name for e in shard]), dtype)
            _save(tensors, unfinished / name)
            where |= dict.fromkeys(tensors, name)
            done += sum(tensor.nbytes for tensor in tensors.values())
            progress("export", done, total)
        index_text = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write_json(unfinished / "model.safetensors.index.json", index_text)
        checkpoint.sync(unfinished)
        os.rename(unfinished, out)
        checkpoint.sync(out.parent)
    return total


def _size(entry: Entry, stored: dict[str, Any], source: Path, dtype: str) -> int:
    """Bytes of an entry in the export."""
    import torch

    if entry.name not in stored:
        raise CheckpointError(f"{source} has no tensor {entry.name!r}; use a whole checkpoint")
    kind = _dtype_of(entry, stored[entry.name]["dtype"], dtype)
    return prod(entry.shape) * int(getattr(torch, kind).itemsize) * (1 + len(entry.copies))


def _dtype_of(entry: Entry, stored: str, wanted: str) -> str:
    """The selection bias stays in fp32, as released; all other tensors have one type."""
    return stored if wanted == "stored" or entry.name.endswith("router_bias") else wanted


def _shards(sized: Sequence[tuple[Entry, int]]) -> Iterator[list[Entry]]:
    """Cut the tensors into files."""
    shard: list[Entry] = []
    filled = 0
    for entry, size in sized:
        if shard and filled + size > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(entry)
        filled += size
    yield shard


def _cut(shard: Sequence[Entry], tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Our tensors as theirs, by their names."""
    import torch

    found: dict[str, Tensor] = {}
    for entry in shard:
        tensor = tensors[entry.name]
        kind = _dtype_of(entry, str(tensor.dtype).removeprefix("torch."), dtype)
        tensor = tensor.to(getattr(torch, kind))
        found |= zip(entry.theirs, tensor.chunk(len(entry.theirs)))
        found |= {name: tensor.clone() for name in entry.copies}
    return found


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from sparseray.platform.run.checkpoint import sync

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}; free space or name another --out"
        ) from None
    sync(path)


def _is_own(model: ModelConfig, trust_own_format: bool) -> bool:
    """Whether a model goes out as a type of our own: theirs has no words for it.

    Args:
        model: its configuration.
        trust_own_format: whether that is wanted.

    Raises:
        ConfigError: it is not; naming what cannot be said.
    """
    from sparseray.model.hub_config import hub_type

    try:
        hub_type(model)
    except ConfigError as error:
        if not trust_own_format:
            raise ConfigError(
                f"{error}; with --trust_own_format it goes out as type sparseray, which no other program loads"
            ) from None
        return True
    return False


def _write_theirs(source: Path, folder: Path, model: ModelConfig, dtype: str) -> None:
    """Configuration, tokenizer, template and generation settings.

    Args:
        source: the checkpoint's folder.
        folder: of the export.
        model: its configuration.
        dtype: of the weights.
    """
    from sparseray.model.hub_config import write_config

    base = (
        json.loads((source / HUB_CONFIG).read_text(encoding="utf-8"))
        if (source / HUB_CONFIG).exists()
        else {}
    )
    _write_json(folder / "config.json", write_config(model, base) | {"dtype": dtype})
    _copy(source, folder, TEXT_FILES)


def _write_own(source: Path, folder: Path, model: ModelConfig, dtype: str, entries: Sequence[Entry]) -> None:
    """The same with the page that describes the tensors, and what addresses the rows of a memory.

    Args:
        source: the checkpoint's folder.
        folder: of the export.
        model: its configuration.
        dtype: of the weights.
        entries: its tensors.
    """
    from sparseray.jobs.own_format import LAYOUT_FILES, PAGE, own_config, page

    _write_json(folder / "config.json", own_config(model) | {"dtype": dtype})
    (folder / PAGE).write_text(page(model, entries), encoding="utf-8")
    _copy(source, folder, (*TEXT_FILES, *LAYOUT_FILES))


def _copy(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy those files that are there.

    Args:
        source, folder: from and to.
        names: of the files.
    """
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
