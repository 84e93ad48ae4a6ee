"""Documents to token ids, in shards: the second pass of `data prepare`.

One batch is encoded in a thread while the one before is written. Training documents may be rearranged for
fill-in-the-middle on the way (infilling.py); validation documents never are, so that losses stay comparable.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sparseray.actors.training.manifest import SPLITS, InfillingInfo, ShardInfo, SourceInfo
from sparseray.errors import DataError
from sparseray.jobs.tokens.corpus import Document, Source, iter_documents
from sparseray.jobs.tokens.files import ShardWriter, token_dtype
from sparseray.jobs.tokens.infilling import Sentinels, cut
from sparseray.jobs.tokens.languages import language_of
from sparseray.jobs.tokens.progress import Progress
from sparseray.jobs.tokens.selection import Selection
from sparseray.jobs.tokens.tokenizer import TextTokenizer

BATCH_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rule that sends a document to training or validation; a pure function of its hash."""

    fraction: float
    min_key: int

    def of(self, document: Document) -> str:
        """Return `train` or `validation`; the smallest key always validates, so the split is never empty."""
        chosen = document.split_key < int(self.fraction * 2**64) or document.split_key == self.min_key
        return "validation" if self.fraction > 0 and chosen else "train"


@dataclass(frozen=True, kw_only=True)
class Infilling:
    """Which share of the training documents is rearranged, and with which sentinels."""

    rate: float
    sentinels: Sentinels


@dataclass(kw_only=True)
class Encoder:
    """Turns batches of documents into ids, each ended by the end of text.

    Args:
        tokenizer: of the data set.
        split: tells training documents.
        infilling: of training documents; None for none.
        rearranged: training documents that were, so far.
    """

    tokenizer: TextTokenizer
    split: Split
    infilling: Infilling | None = None
    rearranged: int = 0

    def __call__(self, batch: Sequence[Document]) -> list[list[int]]:
        """Return the ids of each document."""
        cuts = [self._cut(document) for document in batch]
        texts = [text for document, parts in zip(batch, cuts) for text in parts or (document.text,)]
        encoded = iter(self.tokenizer.encode_batch(texts))
        found = []
        for document, parts in zip(batch, cuts):
            ids = next(encoded)
            if parts is not None:
                ids = self._rearranged(document, ids, next(encoded), next(encoded))
            found.append([*ids, self.tokenizer.eos_id])
        return found

    def _rearranged(
        self, document: Document, before: list[int], middle: list[int], after: list[int]
    ) -> list[int]:
        """Put the middle behind the rest; a text that spells a sentinel would be cut where nobody cut it."""
        assert self.infilling is not None
        sentinels = self.infilling.sentinels
        if sentinels.are_in([*before, *middle, *after]):
            return self.tokenizer.encode_batch([document.text])[0]
        self.rearranged += 1
        return [*sentinels.prompt(before, after), *middle]

    def _cut(self, document: Document) -> tuple[str, str, str] | None:
        if self.infilling is None or self.split.of(document) != "train":
            return None
        return cut(document.text, document.digest, self.infilling.rate)

    def info(self) -> InfillingInfo | None:
        """What the manifest says of the rearranged documents."""
        if self.infilling is None:
            return None
        s = self.infilling.sentinels
        return InfillingInfo(
            rate=self.infilling.rate,
            documents=self.rearranged,
            prefix_id=s.prefix,
            suffix_id=s.suffix,
            middle_id=s.middle,
        )


def write_shards(
    corpus: Sequence[Source],
    limit: int,
    encoder: Encoder,
    folder: Path,
    shard_tokens: int,
    progress: Progress,
    selection: Selection,
) -> tuple[list[SourceInfo], list[ShardInfo]]:
    """Tokenise all documents; one batch is encoded while the one before is written.

    Args:
        corpus: sources, in order.
        limit: longest document in bytes.
        encoder: of documents.
        folder: that shards are written to.
        shard_tokens: tokens after which a new file is begun.
        progress: told of bytes.
        selection: what is kept of the sources.

    Raises:
        DataError: nothing is left to train on.
    """
    total = sum(file.num_bytes for source in corpus for file in source.files)
    dtype = token_dtype(encoder.tokenizer.vocab_size)
    names = dict.fromkeys(source.name for source in corpus)
    # Source by source: each one's tokens lie together.
    writers = {
        (split, name): ShardWriter(folder, split, dtype, shard_tokens, name)
        for split in SPLITS
        for name in names
    }
    infos: list[SourceInfo] = []
    done = 0
    pending: tuple[str, list[Document], Future[list[list[int]]]] | None = None
    try:
        with ThreadPoolExecutor(1) as pool:
            for name, batch in _batches(corpus, limit, infos, selection):
                future = pool.submit(encoder, batch)
                if pending is not None:
                    done += _store(*pending, encoder.split, writers)
                    progress("tokenising", done, total)
                pending = (name, batch, future)
            if pending is not None:
                done += _store(*pending, encoder.split, writers)
                progress("tokenising", total, total)
        shards = [shard for writer in writers.values() for shard in writer.close()]
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    if not any(shard.split == "train" for shard in shards):
        raise DataError(
            "the sources changed while they were read, and no training text is left; run it again"
        )
    return infos, shards


def _batches(
    corpus: Sequence[Source], limit: int, infos: list[SourceInfo], selection: Selection
) -> Iterator[tuple[str, list[Document]]]:
    """Group a source's documents to about `BATCH_BYTES`; append its record once it has been read."""
    batch: list[Document] = []
    held = 0
    for source, following in zip(corpus, (*corpus[1:], None)):
        skipped, languages = Counter(source.left_out), Counter[str]()
        digest = hashlib.sha256()
        documents = num_bytes = 0
        for document in iter_documents(source, limit, skipped, selection.again):
            documents += 1
            num_bytes += document.num_bytes
            languages[language_of(document.name)] += 1
            digest.update(document.name.encode("utf-8", "surrogateescape") + b"\0" + document.digest)
            batch.append(document)
            held += document.num_bytes
            if held >= BATCH_BYTES:
                yield source.name, batch
                batch, held = [], 0
        infos.append(
            SourceInfo(
                source=source.spec,
                version=source.version,
                licence=source.licence,
                files=len(source.files),
                documents=documents,
                bytes=num_bytes,
                skipped=dict(sorted(skipped.items())),
                sha256=digest.hexdigest(),
                languages=dict(sorted(languages.items())),
                name=source.name,
                weight=source.weight,
            )
        )
        # Sources without names are one stream, batch by batch; others are written apart.
        if batch and (following is None or following.name != source.name):
            yield source.name, batch
            batch, held = [], 0


def _store(
    name: str,
    batch: list[Document],
    future: Future[list[list[int]]],
    split: Split,
    writers: dict[tuple[str, str], ShardWriter],
) -> int:
    """Write one encoded batch of a source to its splits and return its bytes."""
    sides: dict[str, list[tuple[Document, list[int]]]] = {side: [] for side in SPLITS}
    for document, ids in zip(batch, future.result(), strict=True):
        sides[split.of(document)].append((document, ids))
    for side, rows in sides.items():
        if rows:
            writers[side, name].write(rows)
    return sum(document.num_bytes for document in batch)
