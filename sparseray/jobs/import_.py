"""The `import` command: a Hugging Face model of the DeepSeek family becomes a checkpoint.

Everything that headers and configuration show is checked before a weight is read; then weights go through memory a
few at a time, each verified, and the folder gets its name at the end.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseray.errors import CheckpointError, ConfigError, UserError
from sparseray.jobs.progress import progress_of_bytes
from sparseray.platform import config as configuration
from sparseray.platform.run.texts import HUB_CONFIG, TEXT_FILES, TOKENIZER
from sparseray.platform.settings import expand_path

if TYPE_CHECKING:
    from torch import Tensor

    from sparseray.jobs.hub_folder import HubFolder
    from sparseray.jobs.tokens.progress import Progress
    from sparseray.model.config import ModelConfig
    from sparseray.model.hub import Entry
    from sparseray.platform.config import RunConfig

DESCRIPTION = (
    """Turn a Hugging Face model of the DeepSeek family (deepseek_v2, deepseek_v3) into a checkpoint."""
)
EXAMPLE = """example:
  python -m sparseray import --from models/DeepSeek-V2-Lite --out imported/v2_lite
  python -m sparseray serve --checkpoint imported/v2_lite
"""
RUN_CONFIG = "config.yaml"
"""For `pretrain --config`, to go on with the model."""
FILE_BYTES = 256 << 20
"""Tensors of a checkpoint's file go through memory together."""
SPARE_BYTES = 64 << 20


def main(arguments: list[str]) -> int:
    """Run the command: 0, or 2 for what cannot be imported."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m sparseray import", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=raw
    )
    parser.add_argument("--from", required=True, dest="source", metavar="DIR", help="folder of the model")
    parser.add_argument("--out", required=True, metavar="CKPT", help="checkpoint to make, a new folder")
    options = parser.parse_args(arguments)
    try:
        paths = ((options.source, "--from"), (options.out, "--out"))
        return run(*(Path(expand_path(path, name)) for path, name in paths))
    except UserError as error:
        return configuration.die(error)


def run(source: Path, out: Path) -> int:
    """Import a model, and say what was made.

    Args:
        source: folder of the model.
        out: checkpoint to make.
    """
    begin = time.perf_counter()
    with progress_of_bytes() as progress:
        manifest = import_model(source, out, progress)
    num_bytes, seconds = sum(manifest["files"].values()), time.perf_counter() - begin
    print(f"{num_bytes / 1e6:.1f} MB in {seconds:.1f} s ({num_bytes / 1e6 / seconds:.1f} MB/s)")
    if later := manifest.get("left_out"):
        print(f"left out: {later} tensors of layers that config.json does not announce")
    if lacking := manifest.get("lacking"):
        print(f"config.json announces {lacking} modules that predict further tokens, and no file has one")
    print(f"checkpoint: {out}\nserve it: python -m sparseray serve --checkpoint {out}")
    print(
        f"train it: python -m sparseray pretrain --config {out / RUN_CONFIG} --init_from {out} --data.path DATA"
    )
    return 0


def import_model(source: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Write a checkpoint of step 0 from a model's folder.

    Args:
        source: the model's.
        out: of the checkpoint; must not exist.
        progress: told of the bytes that were written.

    Returns:
        the checkpoint's manifest.

    Raises:
        UserError: the model cannot be imported, or the checkpoint not be written; nothing is left of it.
    """
    from sparseray.jobs.http.chat import ChatTemplate
    from sparseray.jobs.hub_folder import HubFolder
    from sparseray.model.hub import entries, is_ignored, is_of_a_later_layer
    from sparseray.model.hub_config import read_config
    from sparseray.platform.run import checkpoint

    check_new(out)
    folder = HubFolder(source)
    model = read_config(folder.config, str(source / "config.json"))
    _check_fp8(folder)
    announced = model.mtp.depth
    if not any(is_of_a_later_layer(name, model.num_layers) for name in folder.stored):
        model = replace(model, mtp=replace(model.mtp, depth=0))
    later = [name for name in folder.stored if is_of_a_later_layer(name, model.num_blocks)]
    tied = {"lm_head.weight"} if model.tie_embeddings else set()
    copies = {name for entry in entries(model) for name in entry.copies}
    known = {*later, *tied, *copies}
    folder.check(entries(model), lambda name: name in known or is_ignored(name))
    _check_tokenizer(source / TOKENIZER, model)
    ChatTemplate.load(source)
    total = sum(prod(e.shape) * folder.dtype(e).itemsize for e in entries(model))
    with unfinished_folder(out, total) as unfinished:
        texts = [name for name in TEXT_FILES if (source / name).is_file()]
        for name in texts:
            shutil.copyfile(source / name, unfinished / name)
        shutil.copyfile(source / "config.json", unfinished / HUB_CONFIG)
        tensors: dict[str, Any] = {}
        done = 0
        for index, group in enumerate(_groups(folder, entries(model))):
            tensors |= _write(unfinished, f"weights_{index:05d}", group)
            done += sum(t.nbytes for t in group.values())
            progress("import", done, total)
        config = configuration.RunConfig(model=model)
        length = min(config.train.seq_len, model.max_seq_len)
        config = replace(config, train=replace(config.train, seq_len=length))
        configuration.save_yaml(config, unfinished / RUN_CONFIG)
        manifest = _manifest(unfinished, config, tensors, (*texts, HUB_CONFIG, RUN_CONFIG))
        checkpoint.finish(unfinished, manifest)
    return manifest | {"left_out": len(later), "lacking": announced - model.mtp.depth}


def check_new(out: Path) -> None:
    """Refuse a result that is there already, or whose place cannot be a folder.

    Raises:
        ConfigError: naming it.
    """
    try:
        is_there = out.exists()
    except OSError as error:
        raise ConfigError(
            f"--out {str(out)[:80]} cannot be a folder ({error.strerror}); give another name"
        ) from None
    if is_there:
        raise ConfigError(f"--out {out} exists already; give a new folder, or remove it")


@contextmanager
def unfinished_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """An empty folder beside the result; it is gone if it was not renamed.

    Args:
        out: the result.
        num_bytes: of all that will be written.

    Raises:
        CheckpointError: it cannot be made, or there is no room.
    """
    from sparseray.platform.run.checkpoint import UNFINISHED

    unfinished = out.with_name(out.name + UNFINISHED)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        free = shutil.disk_usage(unfinished).free
        if free < num_bytes + SPARE_BYTES:
            raise CheckpointError(
                f"--out {out} needs {(num_bytes + SPARE_BYTES) / 1e6:,.0f} MB and there are {free / 1e6:,.0f} MB; free space or"
                " name another disk"
            )
        yield unfinished
    except OSError as error:
        raise CheckpointError(
            f"--out {out} cannot be written ({error.strerror or error}); name a folder that you may write"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_fp8(folder: HubFolder) -> None:
    """Refuse quantized weights whose factors do not stand for 128 x 128 of them."""
    quantized = folder.config.get("quantization_config")
    if quantized is None:
        return
    method, block = quantized.get("quant_method"), quantized.get("weight_block_size")
    if method != "fp8" or block != [128, 128]:
        raise ConfigError(
            f"{folder.path}/config.json: quantization_config of method {method!r} and weight_block_size={block} cannot"
            " be read, only fp8 with [128, 128] can; use the model in bfloat16"
        )


def _check_tokenizer(path: Path, model: ModelConfig) -> None:
    """See that the model has a row for every id of its tokenizer, which knows the end of a text."""
    from sparseray.actors.training.tokenizer_file import load_tokenizer

    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; save it there with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    ids = set(load_tokenizer(path).get_vocab().values())
    largest, end = max(ids, default=-1), model.dse.document_end_id
    if largest >= model.vocab_size:
        raise CheckpointError(
            f"{path} has ids up to {largest} and config.json says vocab_size={model.vocab_size}: it is the tokenizer of"
            " another model; use its own"
        )
    if end >= 0 and end not in ids:
        raise CheckpointError(
            f"{path} has no id {end}, which config.json calls eos_token_id; use the model's own tokenizer, or mend the key"
        )


def _groups(folder: HubFolder, wanted: Iterator[Entry]) -> Iterator[dict[str, Tensor]]:
    """Read all tensors in turn, by logical name, as many together as a file of the checkpoint holds."""
    group: dict[str, Tensor] = {}
    size = 0
    for entry in wanted:
        tensor = folder.read(entry)
        folder.check_copies(entry, tensor)
        if group and size + tensor.nbytes > FILE_BYTES:
            yield group
            group, size = {}, 0
        group[entry.name] = tensor
        size += tensor.nbytes
    yield group


def _write(folder: Path, file: str, group: dict[str, Tensor]) -> dict[str, Any]:
    """Write one file of the checkpoint; what its manifest says of the tensors in it."""
    from sparseray.platform.run import checkpoint

    try:
        written = checkpoint.write_part(folder, file, group)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; free space or name another --out") from None
    return {name: vars(saved) | {"shape": list(saved.shape)} for name, saved in written.items()}


def _manifest(
    folder: Path, config: RunConfig, tensors: dict[str, Any], identity: tuple[str, ...]
) -> dict[str, Any]:
    """What `checkpoint.finish` writes.

    Args:
        folder: of the checkpoint.
        config: of a run of the model.
        tensors: where each is, as `checkpoint.write_part` said.
        identity: small files beside them.
    """
    from sparseray.platform.run import checkpoint

    files = sorted({entry["file"] for entry in tensors.values()} | {*identity})
    return {
        "format": checkpoint.FORMAT,
        "step": 0,
        "digest": checkpoint.digest(tensors),
        "config": configuration.to_dict(config),
        "dse_layout_sha256": "",
        "files": {name: (folder / name).stat().st_size for name in files},
        "identity": {name: checkpoint.file_sha256(folder / name) for name in identity},
        "tensors": dict(sorted(tensors.items())),
    }
