"""The `data` command: makes a folder of token shards from text (jobs/tokens/prepare.py).

It shows progress on a terminal, plain lines when piped, and says at the end where the result is.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparseray.errors import UserError
from sparseray.platform.settings import expand_path

if TYPE_CHECKING:
    from sparseray.actors.training.manifest import Manifest
    from sparseray.jobs.tokens.prepare import Progress

EXAMPLE = """example:
  python -m sparseray data prepare --source stdlib --out data/stdlib
  python -m sparseray data prepare --source docs/ --source notes.txt --tokenizer deepseek --out data/mine
"""
PLAIN_INTERVAL_S = 2.0


def main(argv: list[str]) -> int:
    """Run the `data` command; a user's mistake is one line on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    from sparseray.jobs.tokens import prepare as tokens

    begin = time.perf_counter()
    try:
        out = Path(expand_path(arguments.out, "--out"))
        with _progress() as progress:
            manifest = tokens.prepare(
                [expand_path(source, "--source") for source in arguments.source],
                out,
                tokenizer=expand_path(arguments.tokenizer, "--tokenizer"),
                vocab_size=arguments.vocab_size,
                validation_fraction=arguments.validation_fraction,
                progress=progress,
                overwrite=arguments.overwrite,
            )
    except UserError as error:
        print(f"sparseray: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(
            f"sparseray: error: cannot prepare {out}: {error}; free space or name another --out",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    _report(manifest, out, time.perf_counter() - begin)
    return 0


def _parser() -> argparse.ArgumentParser:
    """Build the command line of `data`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m sparseray data",
        description="Text to token shards.",
        epilog=EXAMPLE,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare")
    command = commands.add_parser(
        "prepare",
        help="turn text or code into Parquet token shards with a manifest",
        description="Turn text or code into Parquet token shards with a tokenizer and a manifest.",
        epilog=EXAMPLE,
        formatter_class=raw,
    )
    command.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="stdlib|PATH",
        help="the interpreter's standard library, a file, or a folder; may be given several times",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    command.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="bpe|deepseek|PATH",
        help="train a byte-level BPE on the sources (default), DeepSeek's, or a tokenizer.json",
    )
    command.add_argument(
        "--vocab_size", type=int, default=2048, metavar="N", help="ids of a trained BPE (default: 2048)"
    )
    command.add_argument(
        "--validation_fraction",
        type=float,
        default=0.02,
        metavar="F",
        help="share of documents to validate on, chosen by hash (default: 0.02)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace a finished data set in DIR")
    return parser


@contextmanager
def _progress() -> Iterator["Progress"]:
    """Yield a progress callback: a bar on a terminal, else a line every two seconds, both on stderr."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks = {}

        def show(phase: str, done_bytes: int, total_bytes: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total_bytes)
            bar.update(tasks[phase], completed=done_bytes)

        yield show


def _plain_lines() -> "Progress":
    """Return a callback that prints a line when a phase begins, ends, and every two seconds between."""
    last_phase, last_time = "", 0.0

    def show(phase: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        if phase != last_phase or now - last_time >= PLAIN_INTERVAL_S or done_bytes == total_bytes:
            last_phase, last_time = phase, now
            print(
                f"{phase}: {done_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB", file=sys.stderr, flush=True
            )

    return show


def _report(manifest: "Manifest", out: Path, seconds: float) -> None:
    """Print what was made, and where it is."""
    num_bytes = sum(counts.bytes for counts in manifest.splits.values())
    for name, counts in manifest.splits.items():
        print(f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes")
    for source in manifest.sources:
        if source.skipped:
            left_out = ", ".join(f"{number} {reason}" for reason, number in source.skipped.items())
            print(f"{source.source}: files left out: {left_out}")
    print(f"{num_bytes / 1e6:.1f} MB in {seconds:.1f} s ({num_bytes / 1e6 / seconds:.1f} MB/s)")
    print(f"token shards, tokenizer ({manifest.vocab_size} ids) and manifest: {out}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
