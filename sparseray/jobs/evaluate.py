"""The `evaluate` command: what a checkpoint can do, with confidence intervals, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseray.errors import ConfigError, IdentityError, UserError
from sparseray.jobs.progress import progress_of_counts
from sparseray.platform import config as configuration
from sparseray.platform.checks import check_folder
from sparseray.platform.settings import expand_path

if TYPE_CHECKING:
    from sparseray.actors.training.token_data import TokenDataset
    from sparseray.jobs.evaluation.subject import Subject

DESCRIPTION = """Measure a checkpoint on validation documents: left-to-right loss and bits per byte, infilling (exact match
of a held-out line, and of a span of tokens), and needles hidden in long texts. It runs in one process, on one GPU or
on the CPU. Intervals hold 95 %: Wilson's for shares, a bootstrap over documents for losses."""
EXAMPLE = """example:
  python -m sparseray evaluate --checkpoint runs/first/checkpoints/step_100 --data data/stdlib --out results.json
"""
TASK_NAMES = ("loss", "infilling", "needle")
MOST_SAMPLES = 100_000


def main(arguments: list[str]) -> int:
    """Run the command: 0, or 2 for what cannot be measured."""
    options = _parser().parse_args(arguments)
    try:
        return run(options)
    except UserError as error:
        return configuration.die(error)
    except OSError as error:
        return configuration.die(
            ConfigError(f"{error.filename} cannot be written ({error.strerror}); free space")
        )


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m sparseray evaluate", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=raw
    )
    say = parser.add_argument
    say("--checkpoint", required=True, metavar="CKPT", help="such as RUN/checkpoints/step_100")
    say("--data", required=True, metavar="DIR", help="made by `data prepare` with the checkpoint's tokenizer")
    say("--out", default="", metavar="FILE", help="write the figures as JSON, too")
    say("--samples", type=int, default=200, metavar="N", help="of each task (default: 200)")
    say(
        "--context",
        type=int,
        default=0,
        metavar="T",
        help="tokens of prompt and answer (default: the model's)",
    )
    say(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="that computes: the CPU in float32, a GPU in bfloat16 (default: a GPU where there is one)",
    )
    say("--seed", type=int, default=0, metavar="S", help="chooses documents, gaps and needles (default: 0)")
    say(
        "--tasks",
        nargs="+",
        choices=TASK_NAMES,
        default=list(TASK_NAMES),
        help=f"what to measure (default: {' '.join(TASK_NAMES)})",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, and write JSON where that is asked for.

    Raises:
        UserError: something does not fit; nothing was written.
    """
    if not 1 <= options.samples <= MOST_SAMPLES:
        raise ConfigError(f"--samples {options.samples} is outside 1..{MOST_SAMPLES}; try 200")
    directory = Path(expand_path(options.checkpoint, "--checkpoint"))
    out = Path(expand_path(options.out, "--out")) if options.out else None
    if out is not None:
        if out.is_dir():
            raise ConfigError(f"--out {out} is a folder; name a file in it")
        check_folder(out.absolute().parent, "--out")
    from sparseray.actors.training.token_data import TokenDataset
    from sparseray.jobs.evaluation.subject import open_subject
    from sparseray.jobs.evaluation.tasks import TASKS

    data = TokenDataset(Path(expand_path(options.data, "--data")), "validation")
    subject, begin = open_subject(directory, options.context, options.device), time.perf_counter()
    check_vocabulary(directory, data)
    figures: dict[str, Any] = {}
    with progress_of_counts() as tell:
        for task in dict.fromkeys(options.tasks):
            found = TASKS[task](subject, data, options.samples, options.seed, tell)
            figures |= {name: asdict(one) for name, one in found.items()}
    print(table(figures))
    if "infilling" in options.tasks and subject.vocabulary.infilling is None:
        print(
            "the tokenizer has no fill-in-the-middle tokens: gaps were asked for from what is before them alone"
        )
    print(f"{time.perf_counter() - begin:.1f} s, context {subject.context} tokens, {subject.device}")
    if out is not None:
        write(out, {**_origin(directory, data, options, subject), "figures": figures})
        print(f"figures: {out}")
    return 0


def check_vocabulary(directory: Path, data: TokenDataset) -> None:
    """See that the data's ids mean the same to the model.

    Args:
        directory: of the checkpoint.
        data: whose tokenizer is compared.

    Raises:
        IdentityError: they do not.
    """
    from sparseray.actors.training.tokenizer_file import load_tokenizer

    path = directory / "tokenizer.json"
    if load_tokenizer(path).get_vocab() != data.tokenizer().get_vocab():
        raise IdentityError(
            f"--data {data.folder} was made with another tokenizer than {directory} has; prepare it with "
            f"--tokenizer {path}"
        )


def table(figures: dict[str, Any]) -> str:
    """The figures for people: shares in percent.

    Args:
        figures: by name.
    """
    lines = [f"{'':26} {'value':>9}   {'95 % interval':^19}  samples"]
    for name, one in figures.items():
        is_share = one["interval"] == "wilson"
        shown = [
            f"{100 * x:.1f} %" if is_share else f"{x:.4f}" for x in (one["value"], one["low"], one["high"])
        ]
        lines.append(f"{name:26} {shown[0]:>9}   {shown[1]:>9} {shown[2]:>9}  {one['samples']:7d}")
    return "\n".join(lines)


def _origin(
    directory: Path, data: TokenDataset, options: argparse.Namespace, subject: Subject
) -> dict[str, Any]:
    """What was measured, so that the file speaks for itself."""
    from sparseray.platform.run import checkpoint

    manifest = checkpoint.read_manifest(directory)
    return {
        "checkpoint": str(directory),
        "step": manifest["step"],
        "digest": manifest["digest"],
        "data": str(data.folder),
        "data_shards": [file.sha256 for file in data.manifest.files if file.split == data.split],
        "samples": options.samples,
        "seed": options.seed,
        "context": subject.context,
        "device": subject.device,
    }


def write(out: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is there whole or not at all.

    Args:
        out: the file.
        content: plain values.
    """
    temporary = out.with_name(f"{out.name}.unfinished")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)
