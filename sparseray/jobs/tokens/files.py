"""Writing token shards: documents with their ids into Parquet files of a bounded size.

Second pass of `data prepare`. A row is a document and its tokens end with the end of text, so the column's
flat values are the training sequence as it is.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sparseray.actors.training.manifest import Counts, ShardInfo, sha256_of_file, sync
from sparseray.jobs.tokens.corpus import Document


def token_dtype(vocab_size: int) -> str:
    """Return the smallest unsigned type that holds every id: uint16 up to 65,536 ids, else uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Parquet files of one split: a row is a document, its tokens end with the end of text."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, source: str = "") -> None:
        self._folder, self._source = folder, source
        self._split = split
        self._dtype = np.dtype(dtype)
        self._shard_tokens = shard_tokens
        tokens = pa.list_(pa.field("item", pa.from_numpy_dtype(self._dtype), nullable=False))
        self._schema = pa.schema([pa.field("tokens", tokens), pa.field("document", pa.string())])
        self._writer: Any = None
        self._counts = Counts()
        self._shards: list[ShardInfo] = []

    def write(self, rows: Sequence[tuple[Document, list[int]]]) -> None:
        """Append documents with their token ids; begin a new file when the current one is full."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path(), self._schema, compression="zstd")
        offsets: npt.NDArray[np.int32] = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(ids) for _, ids in rows], out=offsets[1:])
        flat: npt.NDArray[Any] = np.concatenate([np.array(ids, self._dtype) for _, ids in rows])
        names = [document.name.encode("utf-8", "replace").decode() for document, _ in rows]
        tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=self._schema.field(0).type)
        self._writer.write_table(pa.table([tokens, pa.array(names, pa.string())], schema=self._schema))
        self._counts = Counts(
            documents=self._counts.documents + len(rows),
            tokens=self._counts.tokens + len(flat),
            bytes=self._counts.bytes + sum(document.num_bytes for document, _ in rows),
        )
        if self._counts.tokens >= self._shard_tokens:
            self._finish()

    def close(self) -> list[ShardInfo]:
        """Finish the open file and return all files written."""
        if self._writer is not None:
            self._finish()
        return self._shards

    def abort(self) -> None:
        """Let go of the open file without caring for its end."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def _path(self) -> Path:
        of = f"{self._split}-{self._source}" if self._source else self._split
        return self._folder / f"{of}-{len(self._shards):05d}.parquet"

    def _finish(self) -> None:
        self._writer.close()
        self._writer = None
        path, counts = self._path(), self._counts
        sync(path)
        self._shards.append(
            ShardInfo(
                name=path.name,
                split=self._split,
                rows=counts.documents,
                tokens=counts.tokens,
                bytes=counts.bytes,
                sha256=sha256_of_file(path),
                source=self._source,
            )
        )
        self._counts = Counts()
