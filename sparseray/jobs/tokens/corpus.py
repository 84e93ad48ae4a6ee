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
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseray.errors import DataError
from sparseray.log import get_logger

log = get_logger(__name__)

STDLIB = "stdlib"
READ_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 18
MIN_DOCUMENT_BYTES = 1 << 10
# Below this many files, the text is cut into about so many pieces: a split by document needs a choice.
MIN_FILES = 20
MIN_PIECES = 64
NAMED = 10
"""So many of what is left out are named, the others only counted."""
LICENCE_STEMS = ("license", "licence", "copying")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source: where it is, its name inside the corpus, and its size in bytes."""

    path: Path
    name: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the user named, resolved: files in name order, with the version and licence to record.

    `left_out` counts by reason what is not among the files: unreadable ones, folders too, and dangling links.
    """

    spec: str
    version: str
    licence: str
    files: tuple[SourceFile, ...]
    left_out: Mapping[str, int]
    name: str = ""
    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the user wrote: PATH, NAME=PATH or NAME=PATH:WEIGHT; the name is empty and the weight 0 where not given."""

    path: str
    name: str = ""
    weight: float = 0.0

    @staticmethod
    def parse(text: str) -> "Spec":
        """Read one --source.

        Raises:
            DataError: the name or the weight cannot be used.
        """
        found = (
            None if os.path.exists(text) else re.fullmatch(r"([^=/]*)=(.*?)(?::([^:/]*))?", text, re.DOTALL)
        )
        if found is None:
            return Spec(path=text)
        name, path, weight = found[1], found[2], found[3]
        if not re.fullmatch(r"[A-Za-z]\w{0,31}", name, re.ASCII) or name == "from":
            raise DataError(
                f"--source {readable(text)!r}: {name!r} is no name; write letters, as in code=DIR:0.6"
            )
        try:
            number = 0.0 if weight is None else float(weight)
        except ValueError:
            number = -1.0
        if not (weight is None or 0 < number < 1e9):
            raise DataError(
                f"--source {readable(text)!r}: {weight!r} is no weight; write one above 0, as in {name}=DIR:0.6"
            )
        return Spec(path=path, name=name, weight=number)


def _check_specs(specs: Sequence[Spec]) -> None:
    """Refuse sources of which some have a name or a weight and others not, or two of one name."""
    names, weights = [spec.name for spec in specs], [spec.weight for spec in specs]
    if any(names) and not all(names):
        raise DataError("some sources have a name and others not; name each, as in --source code=DIR:0.6")
    if any(weights) and not all(weights):
        raise DataError(
            "some sources have a weight and others not; weigh each or none, as in --source code=DIR:0.6"
        )
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise DataError(f"two sources are named {twice[0]!r}; give each a name of its own")


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
        specs: `stdlib`, or paths of files and folders; each with a name and a weight or without (`Spec`).
        exclude: folders never read (the output folder may lie inside a source).

    Raises:
        DataError: no source, a missing path, or a source without files.
    """
    if not specs:
        raise DataError("no source given; use --source stdlib or --source PATH")
    seen: set[Path] = set()
    labels: Counter[str] = Counter()
    sources = []
    parsed = [Spec.parse(text) for text in specs]
    _check_specs(parsed)
    for one in parsed:
        spec = one.path
        if not spec.strip():
            raise DataError(f"--source {spec!r} is empty; give {STDLIB!r}, a file or a folder")
        root = Path(sysconfig.get_paths()["stdlib"]) if spec == STDLIB else Path(spec)
        if not root.exists():
            raise DataError(f"source {spec!r} does not exist; give {STDLIB!r}, a file or a folder")
        label = STDLIB if spec == STDLIB else readable(root.resolve().name)
        labels[label] += 1
        if labels[label] > 1:
            label = f"{label}-{labels[label]}"
        left_out: Counter[str] = Counter()
        files = tuple(_list_files(root, label, exclude, seen, left_out, only_python=spec == STDLIB))
        if not files:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(left_out.items()))
            raise DataError(
                f"source {spec!r} ({root}) holds no file that can be read and is not in an earlier source "
                f"(left out: {reasons or 'none'}); drop it"
            )
        version = f"Python {platform.python_version()}" if spec == STDLIB else "sha256 of contents"
        licence = "PSF-2.0" if spec == STDLIB else _stated_licence(root)
        sources.append(
            Source(
                spec=readable(spec),
                version=version,
                licence=licence,
                files=files,
                left_out=left_out,
                name=one.name,
                weight=one.weight,
            )
        )
    return tuple(sources)


def readable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are written as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def document_limit(sources: Sequence[Source]) -> int:
    """Return the longest document in bytes: 256 KiB, less for a corpus of few files.

    A corpus of one long file would be one document, with nothing left to validate on.
    """
    files = [file for source in sources for file in source.files]
    if len(files) >= MIN_FILES:
        return MAX_DOCUMENT_BYTES
    share = sum(file.num_bytes for file in files) // MIN_PIECES
    return min(MAX_DOCUMENT_BYTES, max(MIN_DOCUMENT_BYTES, share))


def keep_all(document: Document) -> str:
    """Leave no document out."""
    return ""


def iter_documents(
    source: Source,
    limit: int,
    skipped: Counter[str],
    complaint: Callable[[Document], str] = keep_all,
) -> Iterator[Document]:
    """Yield the documents of a source in file order.

    Args:
        source: what `find_sources` returned.
        limit: longest document in bytes; longer files are cut at line ends, else between characters.
        skipped: counts files left out, by reason (`undecodable`, `unreadable`, `empty`), and documents that something
            is said against; updated in place.
        complaint: says why a document is left out; empty to keep it.
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
                found = Document(name=name, text=piece.decode(), num_bytes=len(piece), digest=digest)
                if why := complaint(found):
                    skipped[why] += 1
                else:
                    yield found
            if count == 0:
                skipped["empty"] += 1
        except OSError:
            skipped["unreadable"] += 1


def _list_files(
    root: Path,
    label: str,
    exclude: Sequence[Path],
    seen: set[Path],
    left_out: Counter[str],
    *,
    only_python: bool,
) -> Iterator[SourceFile]:
    """Yield regular files below `root` in name order, without hidden ones and installed packages.

    Folders that are links are followed, each folder once, so that a loop ends.

    Args:
        root, label: where the source is, and its name inside the corpus.
        exclude: folders never read.
        seen: real paths of files that have been yielded; updated in place.
        left_out: counts by reason what cannot be read; updated in place.
        only_python: pass over all that is no Python.
    """

    def lacking(reason: str, path: Path | str) -> None:
        left_out[reason] += 1
        if left_out[reason] <= NAMED:
            log.warning("%s is left out: %s", readable(str(path)), reason)

    if root.is_dir():
        paths = _walk(root, exclude, lambda error: lacking("unreadable folders", error.filename))
        found = [(f"{label}/{path.relative_to(root).as_posix()}", path) for path in paths]
    else:
        found = [(label, root)]
    for name, path in sorted(found):
        if root.is_dir() and only_python and path.suffix != ".py":
            continue
        try:
            status = path.stat()
        except OSError:
            lacking("dangling links", path)
            continue
        real = path.resolve()
        if not stat.S_ISREG(status.st_mode) or real in seen:
            continue
        if not os.access(path, os.R_OK):
            lacking("unreadable", path)
            continue
        seen.add(real)
        yield SourceFile(path=path, name=readable(name), num_bytes=status.st_size)


def _walk(root: Path, exclude: Sequence[Path], unreadable: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the files of a folder and of those in it, each folder once."""
    entered = {path.resolve() for path in exclude}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        here = Path(folder)
        if here.resolve() in entered:
            folders.clear()
            continue
        entered.add(here.resolve())
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in ("__pycache__", "site-packages", "dist-packages")
        )
        yield from (here / name for name in names if not name.startswith("."))


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
    """Yield a UTF-8 file as pieces of at most `limit` bytes that add up to the file, but for a byte order mark."""
    rest = b""
    with path.open("rb") as handle:
        if handle.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            handle.seek(0)
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
