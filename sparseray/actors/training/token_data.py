"""Token shards to batches: a verified flat array of ids, and a data order without any state.

A split's documents, each ended by the end of text, form one sequence of ids, cut into windows of `seq_len`.
`batch` is a pure function of (seed, step, part): an epoch is a keyed permutation of all windows, so
any caller on any worker, after any restart, reads the same tokens, and nothing about the order is saved.

Shape suffixes: B sequences, T positions.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from sparseray.actors.training.manifest import (
    TOKENIZER_NAME,
    Manifest,
    ShardInfo,
    read_manifest,
    sha256_of_file,
)
from sparseray.actors.training.mixture import Mixture
from sparseray.actors.training.tokenizer_file import load_tokenizer
from sparseray.errors import DataError

if TYPE_CHECKING:
    import torch

FEISTEL_ROUNDS = 6


class TokenDataset:
    """One split of a folder of token shards, read into memory as one flat array.

    Args:
        folder: what `data prepare` made.
        split: `train` or `validation`.
        verify: compare every file with its SHA-256 first.

    Raises:
        DataError: no finished data set, a missing, tampered or mismatching shard, or an empty split.
    """

    def __init__(self, folder: Path | str, split: str = "train", *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest: Manifest = read_manifest(self.folder)
        shards = [file for file in self.manifest.files if file.split == split]
        if not shards:
            raise DataError(f"{self.folder} has no {split!r} shards; prepare with --validation_fraction 0.02")
        if verify:
            _verify(self.folder / TOKENIZER_NAME, self.manifest.tokenizer.sha256)
        self.tokens, self._starts = _load(self.folder, shards, self.manifest, verify)
        self.sources = _ranges(self.folder, shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of this split, one end of text a document included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents of this split."""
        return len(self._starts)

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 text that the tokens stand for."""
        return self.manifest.splits[self.split].bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token: bits per byte = nats per token / ln 2 / this."""
        return self.num_bytes / self.num_tokens

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        """Id of the end of text after each document."""
        return self.manifest.eos_id

    def document(self, index: int) -> list[int]:
        """Return the tokens of one document, without its end of text."""
        stop = self._starts[index + 1] if index + 1 < len(self._starts) else len(self.tokens)
        found: list[int] = self.tokens[self._starts[index] : stop - 1].tolist()
        return found

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made these tokens."""
        return load_tokenizer(self.folder / TOKENIZER_NAME)

    def _range(self, source: str) -> tuple[int, int]:
        """First token of a source and the one after its last; of all of them without a name."""
        return self.sources[source] if source else (0, self.num_tokens)

    def num_windows(self, seq_len: int, source: str = "") -> int:
        """Return how many windows of `seq_len` inputs and targets fit.

        Args:
            seq_len: tokens that a window predicts.
            source: whose tokens; empty for all.

        Raises:
            DataError: not even one.
        """
        if seq_len < 1:
            raise DataError(f"seq_len={seq_len} must be at least 1")
        start, stop = self._range(source)
        windows = (stop - start - 1) // seq_len
        if windows < 1:
            of = f"source {source!r} of {self.folder}" if source else f"{self.folder}"
            raise DataError(
                f"{of} {self.split} has {stop - start} tokens, too few for seq_len={seq_len}; "
                f"use at most {stop - start - 1}, or prepare more text"
            )
        return windows

    def sequence(
        self, index: int, seq_len: int, source: str = ""
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return window `index`: tokens [seq_len+1] int64, and document_starts [seq_len] bool.

        `document_starts` marks the first token of each document and nothing else: a window that begins
        inside a document has no mark at position 0.

        Args:
            index: of the window, from 0.
            seq_len: tokens that a window predicts.
            source: whose tokens; empty for all.

        Raises:
            IndexError: `index` is outside [0, num_windows).
        """
        if not 0 <= index < self.num_windows(seq_len, source):
            raise IndexError(
                f"window {index} is outside [0, {self.num_windows(seq_len, source)}) at seq_len={seq_len}"
            )
        begin = self._range(source)[0] + index * seq_len
        tokens = self.tokens[begin : begin + seq_len + 1].astype(np.int64)
        marks = np.zeros(seq_len, np.bool_)
        low, high = np.searchsorted(self._starts, [begin, begin + seq_len])
        marks[self._starts[low:high] - begin] = True
        return tokens, marks


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sequences of one part in one step: int64, int64 and bool tensors [B, T]."""

    tokens_BT: "torch.Tensor"
    targets_BT: "torch.Tensor"
    document_starts_BT: "torch.Tensor"
    weights_BT: "torch.Tensor | None" = None


@dataclass(frozen=True, kw_only=True)
class TokenBatches:
    """Batches of one split by (step, part), every token with weight 1.

    Args:
        dataset: the split.
        seed: of the data order.
        num_parts, sequences_per_part, seq_len: how a step's global batch is cut.
        is_fixed: the same data at every step; part i is (step i // L, part i % L) then.
        mixture: of the named sources; None takes all tokens as one.
    """

    dataset: TokenDataset
    seed: int
    num_parts: int
    sequences_per_part: int
    seq_len: int
    is_fixed: bool = False
    mixture: Mixture | None = None

    def __call__(self, step: int, part: int) -> Batch:
        """Return the batch of a part, a pure function of the arguments."""
        if self.is_fixed:
            step, part = divmod(part, self.num_parts)
        return batch(
            self.dataset,
            seed=self.seed,
            step=step,
            part=part,
            num_parts=self.num_parts,
            sequences_per_part=self.sequences_per_part,
            seq_len=self.seq_len,
            mixture=self.mixture,
        )

    def weight(self, step: int) -> float:
        """Sum of the weights of all parts of a step: its tokens."""
        return float(self.num_parts * self.sequences_per_part * self.seq_len)


def window_at(position: int, num_windows: int, seed: int) -> int:
    """Return which window stands at a position of the endless data order.

    Every run of `num_windows` positions that begins at a multiple of it (an epoch) holds each window once.
    A Feistel network over the next even power of two is walked until it lands inside (cycle walking);
    it needs no table, and BLAKE2b makes it the same on every machine and library version.

    Args:
        position: at least 0.
        num_windows: windows an epoch.
        seed: chooses the order.

    Source:
        Black and Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002), sections 3 and 4.
    """
    epoch, value = divmod(position, num_windows)
    half = max(1, ((num_windows - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = f"{seed}:{epoch}".encode()
    while True:
        left, right = value >> half, value & mask
        for turn in range(FEISTEL_ROUNDS):
            digest = hashlib.blake2b(b"%b:%d:%d" % (key, turn, right), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        value = left << half | right
        if value < num_windows:
            return value


def batch(
    dataset: TokenDataset,
    *,
    seed: int,
    step: int,
    part: int,
    num_parts: int,
    sequences_per_part: int,
    seq_len: int,
    mixture: Mixture | None = None,
) -> Batch:
    """Return the batch of one part in one step, a pure function of the arguments.

    The global batch of a step is `num_parts * sequences_per_part` consecutive positions of the data
    order; part p takes the p-th run of them. Cutting the same global batch otherwise moves no sequence.

    Args:
        dataset: to read from.
        seed: of the data order.
        step: from 1.
        part: from 0, below `num_parts`.
        num_parts: that the global batch is cut into.
        sequences_per_part: sequences of a part.
        seq_len: tokens of a sequence.
        mixture: of the named sources; None takes all tokens as one.

    Returns:
        Tensors [sequences_per_part, seq_len] on the CPU; targets are the tokens one position on.

    Raises:
        DataError: an argument out of range, or a data set shorter than one window.
    """
    import torch  # here, so that preparing data does not wait for it

    if not (0 <= part < num_parts and step >= 0 and sequences_per_part >= 1):
        raise DataError(
            f"step={step}, part={part}, num_parts={num_parts}, sequences_per_part={sequences_per_part} "
            "is out of range; need step >= 0, 0 <= part < num_parts, sequences_per_part >= 1"
        )
    first = (step * num_parts + part) * sequences_per_part
    pairs = []
    for position in range(first, first + sequences_per_part):
        source, index = "", position
        if mixture is not None:
            source, index = mixture.place(position, num_parts * sequences_per_part)
        window = window_at(index, dataset.num_windows(seq_len, source), seed)
        pairs.append(dataset.sequence(window, seq_len, source))
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in pairs]))
    return Batch(
        tokens_BT=tokens[:, :-1].contiguous(),
        targets_BT=tokens[:, 1:].contiguous(),
        document_starts_BT=torch.from_numpy(np.stack([starts for _, starts in pairs])),
    )


def _verify(path: Path, sha256: str) -> None:
    """Compare a file with its recorded hash."""
    if not path.is_file():
        raise DataError(f"{path} is missing; restore it or prepare the data again")
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    if found != sha256:
        raise DataError(
            f"{path} was changed: SHA-256 {found[:12]}... is not {sha256[:12]}... of the manifest; "
            "restore it or prepare the data again"
        )


def _ranges(folder: Path, shards: list[ShardInfo]) -> dict[str, tuple[int, int]]:
    """First token of each named source and the one after its last; its shards follow one another."""
    found: dict[str, tuple[int, int]] = {}
    end = 0
    for before, shard in zip((None, *shards), shards):
        if shard.source:
            if shard.source in found and (before is None or before.source != shard.source):
                raise DataError(
                    f"{folder} has shards of {shard.source!r} in two places; prepare the data again"
                )
            found[shard.source] = found.get(shard.source, (end, end))[0], end + shard.tokens
        end += shard.tokens
    return found


def _load(
    folder: Path, shards: list[ShardInfo], manifest: Manifest, verify: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Read shards into one array of ids and the sorted positions where documents begin."""
    try:
        tokens = np.empty(sum(shard.tokens for shard in shards), manifest.token_dtype)
        starts = np.empty(sum(shard.rows for shard in shards), np.int64)
    except MemoryError:
        wanted = sum(shard.tokens for shard in shards)
        raise DataError(
            f"{folder} says it has {wanted} tokens, more than memory holds; prepare less text"
        ) from None
    token, row = 0, 0
    for shard in shards:
        path = folder / shard.name
        if verify:
            _verify(path, shard.sha256)
        flat, begins = _read_shard(path)
        if len(flat) != shard.tokens or len(begins) != shard.rows or flat.dtype != tokens.dtype:
            raise DataError(
                f"{path} is not what the manifest says (rows, tokens or type); prepare the data again"
            )
        if verify and len(flat) and int(flat.max()) >= manifest.vocab_size:
            raise DataError(f"{path} has ids beyond vocab_size={manifest.vocab_size}; prepare the data again")
        if verify and (flat[np.append(begins[1:], len(flat)) - 1] != manifest.eos_id).any():
            raise DataError(
                f"{path} has documents that do not end with eos_id={manifest.eos_id}; prepare the data again"
            )
        tokens[token : token + len(flat)] = flat
        starts[row : row + len(begins)] = begins + token
        token, row = token + len(flat), row + len(begins)
    return tokens, starts


def _read_shard(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return the ids of one Parquet file end to end, and where each row begins among them."""
    try:
        column = pq.read_table(path, columns=["tokens"], memory_map=True).column("tokens").combine_chunks()
        offsets, flat = column.offsets.to_numpy().astype(np.int64), column.flatten().to_numpy()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; restore it or prepare the data again") from error
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as token shard ({reason}); prepare the data again") from error
    return flat, offsets[:-1] - offsets[0]
