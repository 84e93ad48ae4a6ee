"""A memory shard: buckets of the DSE tables, gathered by row and trained where they lie.

A layer's table is one address space of R rows, cut into contiguous buckets. A shard maps the whole
range but touches only its own buckets, so an address needs no translation wherever a bucket lives.
DSE / Engram, arXiv 2601.07372; the update is row-wise Adam.
"""

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch

from sparseray.actors.tree import TreeSum
from sparseray.kernels.dse.cpu import gather_rows, merge_rows, rowwise_adam_
from sparseray.model.config import ModelConfig
from sparseray.model.init import bucket_name, initial_tensor

Key = tuple[int, int]
Rows = tuple[np.ndarray, np.ndarray]
FIELDS = ("", "@m", "@v", "@t")


def bucket_bounds(num_rows: int, num_buckets: int) -> np.ndarray:
    """First row of every bucket and, last, the number of rows; int64 [num_buckets + 1]."""
    return np.arange(num_buckets + 1, dtype=np.int64) * num_rows // num_buckets


class MemoryShard:
    """The buckets that one slot holds.

    Args:
        config: the model.
        table_rows: rows of each memory layer's table.
        owned: (dse layer index, bucket) of every replica held here.
        primary: those of `owned` that answer for rows and reduce their gradients.
        seed, num_shards: as in `DenseState`.
        betas, eps: Adam's.
    """

    def __init__(
        self,
        config: ModelConfig,
        table_rows: Sequence[int],
        owned: Sequence[Key],
        primary: Sequence[Key],
        *,
        seed: int,
        num_shards: int,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self.layers = config.dse.layers
        self.owned, self.primary = sorted(owned), sorted(primary)
        self.num_shards, self.betas, self.eps = num_shards, betas, eps
        self.bounds = [bucket_bounds(rows, config.dse.num_buckets) for rows in table_rows]
        dim = config.dse.head_dim
        # numpy.empty and zeros of this size are mapped, not written: untouched buckets cost no memory.
        self.weight = [np.empty((rows, dim), np.float32) for rows in table_rows]
        self.m = [np.zeros((rows, dim), np.float32) for rows in table_rows]
        self.v = [np.zeros(rows, np.float32) for rows in table_rows]
        self.t = [np.zeros(rows, np.int64) for rows in table_rows]
        for layer, bucket in self.owned:
            start, stop = self.bounds[layer][bucket : bucket + 2]
            name = self.name((layer, bucket))
            self.weight[layer][start:stop] = initial_tensor(
                name, (int(stop - start), dim), seed=seed, std=config.init_std
            ).numpy()
        self.discard()

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows held here, with their optimizer state."""
        rows = sum(int(self.bounds[layer][b + 1] - self.bounds[layer][b]) for layer, b in self.owned)
        width = self.weight[0].shape[1] if self.weight else 0
        return rows * (2 * width * 4 + 4 + 8)

    def name(self, key: Key) -> str:
        """Logical name of a bucket."""
        return bucket_name(self.layers[key[0]], key[1])

    def discard(self) -> None:
        """Forget the gradients of the step; the rows stay."""
        self.trees: list[TreeSum[Rows]] = [TreeSum(self.num_shards, merge_rows) for _ in self.layers]
        self.reduced: dict[Key, Rows] = {}

    def gather(self, layer: int, rows_N: np.ndarray) -> np.ndarray:
        """Return rows of a layer's table; fp32 [N, D]."""
        return gather_rows(self.weight[layer], rows_N)

    def add_gradients(self, shard: int, per_layer: Sequence[Rows]) -> bool:
        """Add a logical shard's row gradients; True once all shards are in.

        Args:
            shard: logical shard.
            per_layer: (rows int64 rising, sums fp32 [U, D]) of each memory layer, this slot's rows only.
        """
        for tree, rows in zip(self.trees, per_layer):
            tree.add(0, shard, rows)
        if any(tree.root is None for tree in self.trees):
            return False
        for layer, bucket in self.primary:
            root = self.trees[layer].root
            assert root is not None
            self.reduced[(layer, bucket)] = self._cut(root, layer, bucket)
        return True

    def _cut(self, rows: Rows, layer: int, bucket: int) -> Rows:
        start, stop = np.searchsorted(rows[0], self.bounds[layer][bucket : bucket + 2])
        return rows[0][start:stop], rows[1][start:stop]

    @property
    def is_reduced(self) -> bool:
        """Whether every replica held here has its reduced gradient."""
        return len(self.reduced) == len(self.owned)

    def norms(self) -> dict[str, float]:
        """Squared norm of the reduced gradient of every bucket answered for here."""
        return {
            f"bucket.{k[0]}.{k[1]}": float(np.square(self.reduced[k][1], dtype=np.float64).sum())
            for k in self.primary
        }

    def digests(self, keys: Sequence[Key]) -> dict[str, int]:
        """CRC-32 of the reduced rows of `keys`, to compare replicas."""
        return {
            f"bucket.{k[0]}.{k[1]}": crc32(
                np.ascontiguousarray(self.reduced[k][1]).data,
                crc32(np.ascontiguousarray(self.reduced[k][0]).data),
            )
            for k in keys
        }

    def apply(self, *, lr: float, scale: float) -> int:
        """Update the touched rows once and return how many they were; forgets the gradients."""
        updated = 0
        for layer in range(len(self.layers)):
            parts = [self.reduced[key] for key in self.owned if key[0] == layer]
            if not parts:
                continue
            rows = np.concatenate([part[0] for part in parts])
            sums = np.concatenate([part[1] for part in parts]) * np.float32(scale)
            rowwise_adam_(
                self.weight[layer],
                self.m[layer],
                self.v[layer],
                self.t[layer],
                rows,
                sums,
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=self.eps,
            )
            updated += len(rows)
        self.discard()
        return updated

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of the buckets answered for here, by logical name."""
        found = {}
        for layer, bucket in self.primary:
            start, stop = self.bounds[layer][bucket : bucket + 2]
            fields: tuple[list[np.ndarray], ...] = (self.weight, self.m, self.v, self.t)
            for suffix, field in zip(FIELDS, fields):
                found[self.name((layer, bucket)) + suffix] = torch.from_numpy(field[layer][start:stop])
        return found

    def load(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Take over what `tensors` gave; rows carry their own step counts, so `step` is not needed."""
        for layer, bucket in self.owned:
            start, stop = self.bounds[layer][bucket : bucket + 2]
            fields: tuple[list[np.ndarray], ...] = (self.weight, self.m, self.v, self.t)
            for suffix, field in zip(FIELDS, fields):
                field[layer][start:stop] = tensors[self.name((layer, bucket)) + suffix].numpy()
