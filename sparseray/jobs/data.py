"""The `data` command: makes a folder of token shards from text (jobs/tokens/prepare.py).

It shows progress on a terminal, plain lines when piped, and says at the end where the result is.
"""

import argparse
import os
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
  python -m sparseray data prepare --source src/ --fim_rate 0.5 --document_bytes 2048 --out data/infilling
  python -m sparseray data prepare --source code=src/:0.6 --source text=docs/:0.4 --code_filters --out data/mixed
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
                [_expanded(source) for source in arguments.source],
                out,
                tokenizer=expand_path(arguments.tokenizer, "--tokenizer"),
                vocab_size=arguments.vocab_size,
                validation_fraction=arguments.validation_fraction,
                fim_rate=arguments.fim_rate,
                document_bytes=arguments.document_bytes,
                code_filters=arguments.code_filters,
                near_duplicates=arguments.near_duplicates,
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


def _expanded(source: str) -> str:
    """Replace `~` and `$NAME` in the path of a source, with or without a name before it."""
    name, equals, path = source.partition("=")
    if equals and name.isidentifier() and not os.path.exists(source):
        return f"{name}={expand_path(path, '--source')}"
    return expand_path(source, "--source")


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
        metavar="[NAME=]stdlib|PATH[:WEIGHT]",
        help="the interpreter's standard library, a file, or a folder; may be given several times. Named sources are "
        "kept apart, and mixed in training by their weights (without: by their sizes)",
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
    _add_choices(command)
    command.add_argument("--overwrite", action="store_true", help="replace a finished data set in DIR")
    return parser


def _add_choices(command: argparse.ArgumentParser) -> None:
    """Add the options about which documents are kept, and in which form."""
    command.add_argument(
        "--fim_rate",
        type=float,
        nargs="?",
        const=0.5,
        default=0.0,
        metavar="F",
        help="share of training documents rearranged for fill-in-the-middle, 0.5 without a number; sentinels are the "
        "tokenizer's own, or are added to it (default: 0)",
    )
    command.add_argument(
        "--document_bytes",
        type=int,
        default=0,
        metavar="N",
        help="longest document; longer files are cut at line ends (default: 256 KiB, less for few files). For "
        "fill-in-the-middle a document should fit the context",
    )
    command.add_argument(
        "--code_filters",
        action="store_true",
        help="leave out code by DeepSeek-Coder-V2's rules: line lengths, share of letters, XML, HTML, JSON and YAML",
    )
    command.add_argument(
        "--near_duplicates",
        type=float,
        default=0.0,
        metavar="S",
        help="of documents that are alike from this similarity on (try 0.85) keep the first; needs datasketch",
    )


def _report(manifest: "Manifest", out: Path, seconds: float) -> None:
    """Print what was made, and where it is."""
    num_bytes = sum(counts.bytes for counts in manifest.splits.values())
    for name, counts in manifest.splits.items():
        print(f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes")
    if manifest.infilling is not None:
        print(f"fill-in-the-middle: {manifest.infilling.documents:,} training documents rearranged")
    for source in manifest.sources:
        if source.skipped:
            left_out = ", ".join(f"{number} {reason}" for reason, number in source.skipped.items())
            print(f"{source.source}: left out: {left_out}")
        most = sorted(source.languages.items(), key=lambda item: -item[1])[:8]
        print(f"{source.source}: {', '.join(f'{number} {language}' for language, number in most)}")
    print(f"{num_bytes / 1e6:.1f} MB in {seconds:.1f} s ({num_bytes / 1e6 / seconds:.1f} MB/s)")
    print(f"token shards, tokenizer ({manifest.vocab_size} ids) and manifest: {out}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
