"""The manifest of a folder of token shards: what is in it, from what, and the SHA-256 of every file.

It is written last, so a folder without it is not a data set. `read_manifest` refuses any other format
version, and names of files that would lead out of the folder.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sparseray.errors import DataError

FORMAT = "sparseray-tokens"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")
LARGEST = 1 << 48
"""No count of a data set goes beyond it."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Size of one split: documents, tokens (one end of text a document included), bytes of UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One Parquet file: its name, split, size and SHA-256; source: name of the one its documents are of, if it has one."""

    name: str
    split: str
    rows: int
    tokens: int
    bytes: int
    sha256: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One source as it was read; `sha256` covers the names and contents of its documents in order.

    `languages` counts documents; `name` and `weight` are what the user gave, if anything.
    """

    source: str
    version: str
    licence: str
    files: int
    documents: int
    bytes: int
    skipped: dict[str, int]
    sha256: str
    languages: dict[str, int] = field(default_factory=dict)
    name: str = ""
    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer beside the shards; `kind` is bpe, deepseek or file."""

    kind: str
    eos_token: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class InfillingInfo:
    """How many training documents were rearranged for fill-in-the-middle, at which rate, with which sentinels."""

    rate: float
    documents: int
    prefix_id: int
    suffix_id: int
    middle_id: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known about a folder of token shards; equal inputs and versions give equal manifests."""

    vocab_size: int
    eos_id: int
    token_dtype: str
    validation_fraction: float
    tokenizer: TokenizerInfo
    splits: dict[str, Counts]
    sources: tuple[SourceInfo, ...]
    files: tuple[ShardInfo, ...]
    versions: dict[str, str]
    infilling: InfillingInfo | None = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest through a temporary file, a sync and a rename.

    Args:
        folder: of the data set.
        manifest: its content.
    """
    temporary = folder / f"{MANIFEST_NAME}.tmp"
    temporary.write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.rename(folder / MANIFEST_NAME)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder of token shards.

    Raises:
        DataError: no folder, no manifest (an unfinished preparation), another format version, or a
            manifest that lacks fields.
    """
    path = folder / MANIFEST_NAME
    cure = "run `python -m sparseray data prepare --source stdlib --out DIR`"
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist; {cure}")
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST_NAME}: not a finished data set; {cure}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); prepare the data again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of token shards; {cure}")
    if raw.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {repr(raw.get('format_version'))[:80]}, this release reads {FORMAT_VERSION}; "
            "prepare the data again"
        )
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({' '.join(str(error).split())[:200]}); prepare the data again"
        ) from error
    for file in manifest.files:
        if not re.fullmatch(r"\w[\w.-]{0,99}", file.name) or file.split not in SPLITS:
            raise DataError(
                f"{path} names a shard {file.name[:80]!r} of split {file.split[:80]!r}; prepare the data again"
            )
    return manifest


def _parse(raw: dict[str, Any]) -> Manifest:
    """Build the dataclasses from parsed JSON; unknown and missing fields raise."""
    found = dict(raw)
    found["tokenizer"] = TokenizerInfo(**raw["tokenizer"])
    found["splits"] = {name: Counts(**raw["splits"][name]) for name in SPLITS}
    found["sources"] = tuple(SourceInfo(**item) for item in raw["sources"])
    found["files"] = tuple(ShardInfo(**item) for item in raw["files"])
    if raw.get("infilling") is not None:
        found["infilling"] = InfillingInfo(**raw["infilling"])
    if found["token_dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"token_dtype {found['token_dtype']!r}")
    manifest = Manifest(**found)
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """See that values have their types, and that the shards add up to their splits.

    Raises:
        ValueError: naming what does not.
    """
    parts: tuple[Any, ...] = (manifest, manifest.tokenizer, *manifest.splits.values(), *manifest.files)
    if manifest.infilling is not None:
        parts += (manifest.infilling,)
    for part in parts:
        for item in fields(part):
            value = getattr(part, item.name)
            is_count = item.type is int and type(value) is int and 0 <= value <= LARGEST
            if not is_count and (item.type is int or (item.type is str and not isinstance(value, str))):
                raise ValueError(f"{item.name} is {str(value)[:80]!r}")
            if item.name == "sha256" and not re.fullmatch("[0-9a-f]{64}", value):
                raise ValueError(f"sha256 is {value[:80]!r}")
    if not manifest.eos_id < manifest.vocab_size:
        raise ValueError(f"eos_id {manifest.eos_id} is beyond vocab_size {manifest.vocab_size}")
    for name, split in manifest.splits.items():
        shards = [file for file in manifest.files if file.split == name]
        sums = (sum(f.tokens for f in shards), sum(f.bytes for f in shards))
        if sums != (split.tokens, split.bytes):
            raise ValueError(
                f"the shards of {name} have {sums[0]} tokens of {sums[1]} bytes, the split others"
            )
