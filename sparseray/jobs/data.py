"""The `data` command: makes a folder of token shards from text (jobs/tokens/prepare.py).

It shows progress on a terminal, plain lines when piped, and says at the end where the result is.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sparseray.errors import UserError
from sparseray.jobs.progress import progress_of_bytes
from sparseray.platform.settings import expand_path

if TYPE_CHECKING:
    from sparseray.actors.training.manifest import Manifest

EXAMPLE = """example:
  python -m sparseray data prepare --source stdlib --out data/stdlib
  python -m sparseray data prepare --source docs/ --source notes.txt --tokenizer deepseek --out data/mine
"""


def main(argv: list[str]) -> int:
    """Run the `data` command; a user's mistake is one line on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    from sparseray.jobs.tokens import prepare as tokens

    begin = time.perf_counter()
    try:
        out = Path(expand_path(arguments.out, "--out"))
        with progress_of_bytes() as progress:
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
