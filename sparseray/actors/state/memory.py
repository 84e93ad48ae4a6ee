"""A memory shard: buckets of the DSE tables, gathered by row and trained where they lie.

A layer's table is one address space of R rows, cut into contiguous buckets. A shard maps the whole
range but touches only its own buckets, so an address needs no translation wherever a bucket lives.
DSE / Engram, arXiv 2601.07372; the update is row-wise Adam.
"""

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch

from sparseray.actors.state.pieces import Key, bucket_bounds
from sparseray.actors.state.tree import TreeSum
from sparseray.kernels.dse.cpu import gather_rows, merge_rows, rowwise_adam_
from sparseray.model.config import ModelConfig
from sparseray.model.init import bucket_name, initial_tensor

Rows = tuple[np.ndarray, np.ndarray]
FIELDS = ("", "@m", "@v", "@t")


class MemoryShard:
    """The buckets that one slot holds: `initialize`, `load`, `assign` and `trim` as in `ExpertShard`.

    Args:
        config: the model.
        table_rows: rows of each memory layer's table.
        seed, num_parts: as in `DenseState`.
        betas, eps: Adam's.
    """

    def __init__(
        self,
        config: ModelConfig,
        table_rows: Sequence[int],
        *,
        seed: int,
        num_parts: int,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self.layers = config.dse.layers
        self.owned: list[Key] = []
        self.primary: list[Key] = []
        self.held: set[Key] = set()
        self.seed, self.init_std = seed, config.init_std
        self.num_parts, self.betas, self.eps = num_parts, betas, eps
        self.bounds = [bucket_bounds(rows, config.dse.num_buckets) for rows in table_rows]
        dim = config.dse.head_dim
        # numpy.empty and zeros of this size are mapped, not written: untouched buckets cost no memory.
        self.weight = [np.empty((rows, dim), np.float32) for rows in table_rows]
        self.m = [np.zeros((rows, dim), np.float32) for rows in table_rows]
        self.v = [np.zeros(rows, np.float32) for rows in table_rows]
        self.t = [np.zeros(rows, np.int64) for rows in table_rows]
        self.discard()

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows held here, with their optimizer state."""
        rows = sum(int(self.bounds[layer][b + 1] - self.bounds[layer][b]) for layer, b in self.owned)
        width = self.weight[0].shape[1] if self.weight else 0
        return rows * (2 * width * 4 + 4 + 8)

    def initialize(self, keys: Sequence[Key]) -> None:
        """Draw the first rows of `keys` from the seed; their moments are zero."""
        for key in keys:
            start, stop = self._range(key)
            shape = (stop - start, self.weight[key[0]].shape[1])
            drawn = initial_tensor(self.name(key), shape, seed=self.seed, std=self.init_std)
            self.weight[key[0]][start:stop] = drawn.numpy()
            for field in (self.m, self.v, self.t):
                field[key[0]][start:stop] = 0
            self.held.add(key)

    def assign(self, owned: Sequence[Key], primary: Sequence[Key]) -> None:
        """Say which of the held buckets follow the updates, and which of those answer for rows."""
        self.owned, self.primary = sorted(owned), sorted(primary)
        self.discard()

    def trim(self) -> None:
        """Forget buckets that are held and not assigned."""
        self.held = set(self.owned)

    def _range(self, key: Key) -> tuple[int, int]:
        start, stop = self.bounds[key[0]][key[1] : key[1] + 2]
        return int(start), int(stop)

    def name(self, key: Key) -> str:
        """Logical name of a bucket."""
        return bucket_name(self.layers[key[0]], key[1])

    def discard(self) -> None:
        """Forget the gradients of the step; the rows stay."""
        self.trees: list[TreeSum[Rows]] = [TreeSum(self.num_parts, merge_rows) for _ in self.layers]
        self.reduced: dict[Key, Rows] = {}

    def gather(self, layer: int, rows_N: np.ndarray) -> np.ndarray:
        """Return rows of a layer's table; fp32 [N, D]."""
        return gather_rows(self.weight[layer], rows_N)

    def add_gradients(self, part: int, per_layer: Sequence[Rows]) -> bool:
        """Add a part's row gradients; True once all parts are in.

        Args:
            part: logical part of the batch.
            per_layer: (rows int64 rising, sums fp32 [U, D]) of each memory layer, this slot's rows only.
        """
        for tree, rows in zip(self.trees, per_layer):
            tree.add(0, part, rows)
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

    def tensor_names(self, keys: Sequence[Key]) -> list[str]:
        """Logical names of everything that `tensors` gives."""
        return [self.name(key) + suffix for key in keys for suffix in FIELDS]

    def tensors(self, keys: Sequence[Key]) -> dict[str, torch.Tensor]:
        """Rows, moments and step counts of buckets held here, by logical name."""
        fields: tuple[list[np.ndarray], ...] = (self.weight, self.m, self.v, self.t)
        found = {}
        for key in keys:
            start, stop = self._range(key)
            for suffix, field in zip(FIELDS, fields):
                found[self.name(key) + suffix] = torch.from_numpy(field[key[0]][start:stop])
        return found

    def load(self, keys: Sequence[Key], tensors: dict[str, torch.Tensor]) -> None:
        """Take over buckets; rows carry their own step counts."""
        fields: tuple[list[np.ndarray], ...] = (self.weight, self.m, self.v, self.t)
        for key in keys:
            start, stop = self._range(key)
            for suffix, field in zip(FIELDS, fields):
                field[key[0]][start:stop] = tensors[self.name(key) + suffix].numpy()
            self.held.add(key)
