"""Text to token shards: two bounded passes over a corpus, and a folder that appears only when finished.

Pass one surveys the documents (which hashes occur, a sample for the tokenizer); pass two tokenises them in
batches into Parquet files. All is written to `DIR.partial`; the manifest comes last, everything is synced,
and one rename makes `DIR`. A killed preparation leaves only `DIR.partial`, which the next one clears away.
"""

import fcntl
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import tokenizers

from sparseray.actors.training.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Counts,
    InfillingInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    TokenizerInfo,
    sha256_of_file,
    sync,
    write_manifest,
)
from sparseray.errors import DataError
from sparseray.jobs.tokens.corpus import (
    MAX_DOCUMENT_BYTES,
    Document,
    Source,
    document_limit,
    find_sources,
    iter_documents,
    readable,
)
from sparseray.jobs.tokens.encode import Encoder, Infilling, Split, write_shards
from sparseray.jobs.tokens.files import token_dtype
from sparseray.jobs.tokens.infilling import FAMILIES, with_sentinels
from sparseray.jobs.tokens.progress import Progress, quiet
from sparseray.jobs.tokens.selection import Selection
from sparseray.jobs.tokens.tokenizer import TextTokenizer, check_vocab_size, load_tokenizer, train_bpe
from sparseray.log import get_logger
from sparseray.model.limits import Limits, complaint
from sparseray.platform.checks import check_folder

log = get_logger(__name__)

LOCK_NAME = ".sparseray-preparing"
SHARD_TOKENS = 1 << 23
LEAST_DOCUMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What pass one learned: the smallest split key, and sampled texts of the training side."""

    min_key: int
    sample: list[str]


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 2048,
    validation_fraction: float = 0.02,
    fim_rate: float = 0.0,
    document_bytes: int = 0,
    code_filters: bool = False,
    near_duplicates: float = 0.0,
    progress: Progress = quiet,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Turn text into a folder of token shards.

    Args:
        sources: `stdlib`, files or folders.
        out: folder to make; its parent is made too.
        tokenizer: `bpe` (trained on the sources), `deepseek`, or the path of a tokenizer.json.
        vocab_size: ids of a trained BPE.
        validation_fraction: share of documents to validate on, in [0, 1); 0 makes no validation shards.
        fim_rate: share of training documents rearranged for fill-in-the-middle, in [0, 1].
        document_bytes: longest document, beyond which a file is cut at line ends; 0 for 256 KiB, less for few files.
        code_filters: leave out documents of code by DeepSeek-Coder-V2's rules.
        near_duplicates: similarity from which of alike documents one is kept; 0 keeps all.
        progress: receives (phase, bytes done, bytes in all).
        overwrite: replace a finished data set in `out`.
        shard_tokens: tokens after which a new Parquet file is begun.

    Raises:
        DataError: missing or empty sources, an unknown tokenizer, or an `out` that is in use.
    """
    _check_numbers(validation_fraction, fim_rate, document_bytes)
    selection = Selection(code_filters=code_filters, near_duplicates=near_duplicates)
    out = Path(out)
    _check_target(out, overwrite)
    partial = out.with_name(out.name + ".partial")
    loaded = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
    if loaded is None:
        check_vocab_size(vocab_size)
    corpus = find_sources(sources, exclude=(out, partial, _aside(out)))
    limit = document_bytes or document_limit(corpus)
    sample_bytes = 0 if loaded else min(64 << 20, max(4 << 20, 2048 * vocab_size))
    survey = _survey(corpus, limit, validation_fraction, sample_bytes, progress, selection)
    if loaded is None:
        loaded = _trained(survey.sample, vocab_size, FAMILIES[0] if fim_rate else (), progress)
    infilling = Infilling(rate=fim_rate, sentinels=with_sentinels(loaded.tokenizer)) if fim_rate else None
    split = Split(fraction=validation_fraction, min_key=survey.min_key)
    encoder = Encoder(tokenizer=loaded, split=split, infilling=infilling)
    with _partial_folder(partial) as folder:
        loaded.tokenizer.save(str(folder / TOKENIZER_NAME), pretty=False)
        sync(folder / TOKENIZER_NAME)
        infos, shards = write_shards(corpus, limit, encoder, folder, shard_tokens, progress, selection)
        manifest = _manifest(loaded, folder, infos, shards, validation_fraction, encoder.info())
        write_manifest(folder, manifest)
        _commit(folder, out, overwrite)
    return manifest


def _trained(
    sample: Sequence[str], vocab_size: int, specials: Sequence[str], progress: Progress
) -> TextTokenizer:
    """Train a tokenizer, and tell of it."""
    sampled = sum(map(len, sample))
    progress("training the tokenizer", 0, sampled)
    found = train_bpe(sample, vocab_size, specials)
    progress("training the tokenizer", sampled, sampled)
    if found.vocab_size < vocab_size:
        log.warning("the sources give %d of the %d token ids wanted", found.vocab_size, vocab_size)
    return found


def _check_numbers(validation_fraction: float, fim_rate: float, document_bytes: int) -> None:
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction={validation_fraction} is outside [0, 1); try 0.02")
    if not 0 <= fim_rate <= 1:
        raise DataError(f"fim_rate={fim_rate} is outside [0, 1]; try 0.5")
    if document_bytes and not LEAST_DOCUMENT_BYTES <= document_bytes <= MAX_DOCUMENT_BYTES:
        raise DataError(
            f"document_bytes={document_bytes} is outside [{LEAST_DOCUMENT_BYTES}, {MAX_DOCUMENT_BYTES}]; try 2048"
        )


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that cannot be made or holds anything, but a data set that may be replaced."""
    if problem := complaint(str, Limits(), str(out)):
        raise DataError(f"--out {readable(str(out))} {problem}")
    if not os.path.exists(out):  # A folder that may not be looked into is not there.
        check_folder(out, "--out")
        return
    if not out.is_dir():
        raise DataError(f"--out {out} is a file; name a folder that does not exist yet")
    if (out / MANIFEST_NAME).is_file():
        if not overwrite:
            raise DataError(f"--out {out} already holds a finished data set; use it, or add --overwrite")
        if _aside(out).exists():
            raise DataError(f"{_aside(out)} is in the way of replacing {out}; move it away")
    elif any(out.iterdir()):
        raise DataError(f"--out {out} is not empty and no data set; name another folder")


def _aside(out: Path) -> Path:
    """Return where a data set waits while its successor takes the name."""
    return out.with_name(out.name + ".old")


def _survey(
    corpus: Sequence[Source],
    limit: int,
    fraction: float,
    sample_bytes: int,
    progress: Progress,
    selection: Selection,
) -> Survey:
    """Pass one: check that both splits get documents, and gather the tokenizer's sample."""
    total = sum(file.num_bytes for source in corpus for file in source.files)
    threshold = 2**64 if total <= sample_bytes else sample_bytes * 2**64 // total
    done = held = count = max_key = 0
    min_key = 2**64
    sample: list[Document] = []
    skipped: Counter[str] = Counter()
    for source in corpus:
        skipped.update(source.left_out)
        for document in iter_documents(source, limit, skipped, selection.first):
            count += 1
            min_key, max_key = min(min_key, document.split_key), max(max_key, document.split_key)
            # Twice the expected size is never reached by chance; it bounds memory all the same.
            if document.sample_key < threshold and held < 2 * sample_bytes:
                sample.append(document)
                held += document.num_bytes
            done += document.num_bytes
            progress("reading", done, total)
    names = ", ".join(source.spec for source in corpus)
    if count == 0:
        left_out = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        raise DataError(f"no text in {names} (files left out: {left_out or 'none'}); give UTF-8 text or code")
    split = Split(fraction=fraction, min_key=min_key)
    if fraction > 0 and (min_key == max_key or max_key < int(fraction * 2**64)):
        raise DataError(
            f"{names} has {count} distinct document(s) of at most {limit} bytes, too few to split "
            f"with validation_fraction={fraction}; add text, or set it to 0"
        )
    return Survey(min_key=min_key, sample=[item.text for item in sample if split.of(item) == "train"])


def _manifest(
    tokenizer: TextTokenizer,
    folder: Path,
    sources: Sequence[SourceInfo],
    shards: Sequence[ShardInfo],
    fraction: float,
    infilling: InfillingInfo | None,
) -> Manifest:
    """Sum the shards up; nothing in it depends on time or place."""
    splits = {
        name: Counts(
            documents=sum(shard.rows for shard in shards if shard.split == name),
            tokens=sum(shard.tokens for shard in shards if shard.split == name),
            bytes=sum(shard.bytes for shard in shards if shard.split == name),
        )
        for name in SPLITS
    }
    return Manifest(
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        token_dtype=token_dtype(tokenizer.vocab_size),
        validation_fraction=fraction,
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind,
            eos_token=tokenizer.eos_token,
            sha256=sha256_of_file(folder / TOKENIZER_NAME),
        ),
        splits=splits,
        sources=tuple(sources),
        files=tuple(shards),
        infilling=infilling,
        versions={
            "python": ".".join(map(str, sys.version_info[:3])),
            "pyarrow": pa.__version__,
            "tokenizers": tokenizers.__version__,
        },
    )


@contextmanager
def _partial_folder(partial: Path) -> Iterator[Path]:
    """Hold a fresh, locked work folder; it is removed when anything fails before it is renamed.

    Raises:
        DataError: another process is preparing there, or the folder is not ours.
    """
    lock_path = partial / LOCK_NAME
    if partial.exists() and not lock_path.is_file() and (not partial.is_dir() or any(partial.iterdir())):
        raise DataError(f"{partial} is in the way and was not made by a preparation; move it away")
    partial.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another preparation is writing {partial}; wait for it to end") from error
        for path in partial.iterdir():
            if path != lock_path:
                path.unlink()
        try:
            yield partial
        except BaseException:
            if lock_path.exists():  # else it already bears its final name
                shutil.rmtree(partial)
            raise


def _commit(partial: Path, out: Path, overwrite: bool) -> None:
    """Give the finished folder its name in one rename; an old data set steps aside first."""
    _check_target(out, overwrite)
    old = _aside(out)
    has_old = (out / MANIFEST_NAME).is_file()
    if has_old:
        out.rename(old)
    (partial / LOCK_NAME).unlink()
    sync(partial)
    partial.rename(out)
    sync(out.parent)
    if has_old:
        shutil.rmtree(old)
