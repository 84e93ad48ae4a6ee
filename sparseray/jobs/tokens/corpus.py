"""Sources of text: which files belong to a corpus, and their documents as one bounded stream.

First station of `data prepare`: a source (the interpreter's standard library, a file, a folder) becomes a
sorted list of files, and the files become documents. A file longer than the document limit is cut at line
ends into several documents, so that memory stays bounded and a corpus of one long file can still be split
into training and validation. Nothing here knows about tokens.
"""

import codecs
import hashlib
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseray.errors import DataError

STDLIB = "stdlib"
READ_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 18
MIN_DOCUMENT_BYTES = 1 << 10
# Below this many files, the text is cut into about so many pieces: a split by document needs a choice.
MIN_FILES = 20
MIN_PIECES = 64
LICENCE_STEMS = ("license", "licence", "copying")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source: where it is, its name inside the corpus, and its size in bytes."""

    path: Path
    name: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the user named, resolved: files in name order, with the version and licence to record."""

    spec: str
    version: str
    licence: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One piece of text that is tokenised alone.

    `digest` is the SHA-256 of the UTF-8 bytes: the split and the sample follow from it, so equal texts
    always land on the same side.
    """

    name: str
    text: str
    num_bytes: int
    digest: bytes

    @property
    def split_key(self) -> int:
        """Uniform 64-bit integer that decides between training and validation."""
        return int.from_bytes(self.digest[:8], "big")

    @property
    def sample_key(self) -> int:
        """Uniform 64-bit integer, independent of `split_key`, that decides on the tokenizer's sample."""
        return int.from_bytes(self.digest[8:16], "big")


def find_sources(specs: Sequence[str], exclude: Sequence[Path] = ()) -> tuple[Source, ...]:
    """Resolve what the user gave into sources; a file reached twice belongs to the first one.

    Args:
        specs: `stdlib`, or paths of files and folders.
        exclude: folders never read (the output folder may lie inside a source).

    Raises:
        DataError: no source, a missing path, or a source without files.
    """
    if not specs:
        raise DataError("no source given; use --source stdlib or --source PATH")
    seen: set[Path] = set()
    labels: Counter[str] = Counter()
    sources = []
    for spec in specs:
        root = Path(sysconfig.get_paths()["stdlib"]) if spec == STDLIB else Path(spec)
        if not root.exists():
            raise DataError(f"source {spec!r} does not exist; give {STDLIB!r}, a file or a folder")
        label = STDLIB if spec == STDLIB else root.resolve().name
        labels[label] += 1
        if labels[label] > 1:
            label = f"{label}-{labels[label]}"
        files = tuple(_list_files(root, label, exclude, seen, only_python=spec == STDLIB))
        if not files:
            raise DataError(
                f"source {spec!r} ({root}) holds no file that is not in an earlier source; drop it"
            )
        version = f"Python {platform.python_version()}" if spec == STDLIB else "sha256 of contents"
        licence = "PSF-2.0" if spec == STDLIB else _stated_licence(root)
        sources.append(Source(spec=spec, version=version, licence=licence, files=files))
    return tuple(sources)


def document_limit(sources: Sequence[Source]) -> int:
    """Return the longest document in bytes: 256 KiB, less for a corpus of few files.

    A corpus of one long file would be one document, with nothing left to validate on.
    """
    files = [file for source in sources for file in source.files]
    if len(files) >= MIN_FILES:
        return MAX_DOCUMENT_BYTES
    share = sum(file.num_bytes for file in files) // MIN_PIECES
    return min(MAX_DOCUMENT_BYTES, max(MIN_DOCUMENT_BYTES, share))


def iter_documents(source: Source, limit: int, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a source in file order.

    Args:
        source: what `find_sources` returned.
        limit: longest document in bytes; longer files are cut at line ends, else between characters.
        skipped: counts files left out, by reason (`undecodable`, `unreadable`, `empty`); updated in place.
    """
    for file in source.files:
        try:
            if not _is_text(file.path):
                skipped["undecodable"] += 1
                continue
            count = 0
            for count, piece in enumerate(_pieces(file.path, limit), 1):
                name = file.name if count == 1 else f"{file.name}#{count}"
                digest = hashlib.sha256(piece).digest()
                yield Document(name=name, text=piece.decode(), num_bytes=len(piece), digest=digest)
            if count == 0:
                skipped["empty"] += 1
        except OSError:
            skipped["unreadable"] += 1


def _list_files(
    root: Path, label: str, exclude: Sequence[Path], seen: set[Path], only_python: bool
) -> Iterator[SourceFile]:
    """Yield regular files below `root` in name order, without hidden ones and installed packages."""
    barred = {path.resolve() for path in exclude}
    found: list[tuple[str, Path]] = []
    if root.is_dir():
        for folder, folders, names in os.walk(root):
            here = Path(folder)
            folders[:] = [
                name
                for name in folders
                if not name.startswith(".")
                and name not in ("__pycache__", "site-packages", "dist-packages")
                and (here / name).resolve() not in barred
            ]
            for name in names:
                if not name.startswith(".") and (not only_python or name.endswith(".py")):
                    found.append((f"{label}/{(here / name).relative_to(root).as_posix()}", here / name))
    else:
        found.append((label, root))
    for name, path in sorted(found):
        try:
            status = path.stat()
        except OSError:
            continue  # a dangling link is no file of the source
        real = path.resolve()
        if stat.S_ISREG(status.st_mode) and real not in seen:
            seen.add(real)
            yield SourceFile(path=path, name=name, num_bytes=status.st_size)


def _stated_licence(root: Path) -> str:
    """Name the licence files at the top of a folder; the user's own text states none."""
    if not root.is_dir():
        return "not stated"
    names = sorted(path.name for path in root.iterdir() if path.stem.lower() in LICENCE_STEMS)
    return f"see {', '.join(names)}" if names else "not stated"


def _is_text(path: Path) -> bool:
    """Tell whether the whole file is UTF-8 without NUL, reading it in bounded chunks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as handle:
        try:
            while chunk := handle.read(READ_BYTES):
                if b"\0" in chunk:
                    return False
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _pieces(path: Path, limit: int) -> Iterator[bytes]:
    """Yield a UTF-8 file as pieces of at most `limit` bytes that add up to the file."""
    rest = b""
    with path.open("rb") as handle:
        while chunk := handle.read(READ_BYTES):
            rest += chunk
            start = 0
            while len(rest) - start > limit:
                end = _cut(rest, start, start + limit)
                yield rest[start:end]
                start = end
            rest = rest[start:]
    if rest:
        yield rest


def _cut(data: bytes, start: int, end: int) -> int:
    """Return where to cut `data[start:end]`: after its last line end, else before a character begins."""
    line = data.rfind(b"\n", start, end)
    if line >= 0:
        return line + 1
    while data[end] & 0xC0 == 0x80:
        end -= 1
    return end
