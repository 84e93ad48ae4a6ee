"""A memory shard: buckets of the DSE tables, gathered by row and trained where they lie.

A layer's table is one address space of R rows, cut into contiguous buckets, in shared memory (tables.py). A shard maps
the whole range and has pages for its own buckets only, so an address needs no translation wherever a bucket lives.
DSE / Engram, arXiv 2601.07372; the update is row-wise Adam.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.state.kept_rows import KeptRows
from sparseray.actors.state.pieces import Key, row_bytes
from sparseray.actors.state.tables import SharedTable, TableView, version_of
from sparseray.actors.state.tree import TreeSum
from sparseray.actors.wire.messages import TableHandle
from sparseray.kernels.dse.cpu import gather_rows, merge_rows, rowwise_adam_, segment_sum_rows
from sparseray.model.buckets import bucket_bounds
from sparseray.model.config import ModelConfig
from sparseray.model.init import bucket_name, initial_tensor

Rows = tuple[np.ndarray, np.ndarray]
FIELDS = ("", "@m", "@v", "@t")
ROUNDING_STEP = 1_000_003
"""Apart from the seed, what the stochastic rounding of two layers' rows differs by."""


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
        self.config, self.layers = config.dse, config.dse.layers
        self.owned: list[Key] = []
        self.primary: list[Key] = []
        self.held: set[Key] = set()
        self._arriving: set[Key] = set()
        self.updates, self.generation = 0, 0
        self.seed, self.init_std = seed, config.init_std
        self.num_parts, self.betas, self.eps = num_parts, betas, eps
        self.bounds = [bucket_bounds(rows, config.dse.num_buckets) for rows in table_rows]
        self.tables = [SharedTable(rows, config.dse.head_dim, config.dse.row_dtype) for rows in table_rows]
        self.discard()

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows held here, with their optimizer state."""
        ranges = [self._range(key) for key in self.owned]
        return sum(stop - start for start, stop in ranges) * row_bytes(self.config)

    @property
    def handles(self) -> tuple[TableHandle, ...]:
        """What other processes of this host open the layers' tables by (`TableView`)."""
        return tuple(table.handle for table in self.tables)

    def initialize(self, keys: Sequence[Key], step: int = 0) -> None:
        """Draw the first rows of buckets from the seed; their moments are zero.

        Args:
            keys: which.
            step: that they shall count as of.
        """
        self._change(keys, step)
        self.held |= set(keys)
        # A generator draws in one thread, and every bucket has its own.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._draw, keys):
                pass

    def _draw(self, key: Key) -> None:
        start, stop = self._range(key)
        shape = (stop - start, self.config.head_dim)
        rows, *moments = self._fields(key)
        rows.copy_(initial_tensor(self.name(key), shape, seed=self.seed, std=self.init_std))
        for moment in moments:
            moment.zero_()

    def _change(self, keys: Sequence[Key], updates: int) -> None:
        """Expect rows of buckets that have seen so many updates; `assign` lets others read them."""
        assert not self.held or self.updates == updates, "buckets of different steps"
        self.updates = updates
        for layer in {layer for layer, _ in keys}:
            self.tables[layer].change()

    def assign(self, owned: Sequence[Key], primary: Sequence[Key], *, generation: int = 0) -> None:
        """Say which of the held buckets follow the updates; from now on others may read the rows.

        Args:
            owned: those that do.
            primary: those of them that answer for rows.
            generation: of the plan that says so.
        """
        self.owned, self.primary, self.generation = sorted(owned), sorted(primary), generation
        self.discard()
        self._publish()

    def _publish(self) -> None:
        for table in self.tables:
            table.publish(version_of(self.generation, self.updates))

    def trim(self) -> None:
        """Forget buckets that are held and not assigned, and give their memory back."""
        if self.held != set(self.owned):
            self._keep(set(self.owned))

    def _keep(self, keys: set[Key]) -> None:
        self.held = keys
        for layer, table in enumerate(self.tables):
            table.keep(self._range(key) for key in sorted(keys) if key[0] == layer)

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

    def _fields(self, key: Key) -> list[Tensor]:
        """Rows (in their dtype), first and second moments and updates of one bucket, as views."""
        table, (start, stop) = self.tables[key[0]], self._range(key)
        fields = (as_tensor(table.weight), *map(torch.from_numpy, (table.m, table.v, table.t)))
        return [field[start:stop] for field in fields]

    def gather(self, layer: int, rows_N: Tensor) -> Tensor:
        """Copy rows of a layer's table.

        Args:
            layer: index among the memory layers.
            rows_N: int64, any order, with repeats, of buckets that are held here.

        Returns:
            [N, D] in the rows' dtype.
        """
        return as_tensor(gather_rows(self.tables[layer].weight, rows_N.cpu().numpy()))

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
        """Update the touched rows once and return how many they were; forgets the gradients.

        Args:
            lr: learning rate of this step.
            scale: factor on the gradients (global-norm clipping).
        """
        updated = 0
        for layer, table in enumerate(self.tables):
            parts = [self.reduced[key] for key in self.owned if key[0] == layer]
            if not parts:
                continue
            rows = np.concatenate([part[0] for part in parts])
            sums = np.concatenate([part[1] for part in parts]) * np.float32(scale)
            table.change()
            rowwise_adam_(
                table.weight,
                table.m,
                table.v,
                table.t,
                rows,
                sums,
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=self.eps,
                seed=self.seed + ROUNDING_STEP * self.layers[layer],
            )
            updated += len(rows)
        self.updates += 1
        self.discard()
        self._publish()
        return updated

    def pass_over(self) -> None:
        """Count a step whose gradients are dropped; rows have counts of their own."""
        self.updates += 1
        self.discard()
        self._publish()

    def tensor_names(self, keys: Sequence[Key], *, with_optimizer: bool = True) -> list[str]:
        """Logical names of everything that `tensors` gives.

        Args:
            keys: buckets, held or not.
            with_optimizer: the names of their optimizer state too.
        """
        fields = FIELDS if with_optimizer else FIELDS[:1]
        return [self.name(key) + suffix for key in keys for suffix in fields]

    def tensors(self, keys: Sequence[Key], *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Rows, moments and update counts of buckets held here, by logical name, as views.

        Args:
            keys: buckets that are held.
            with_optimizer: the optimizer state too.
        """
        fields = [
            field for key in keys for field in self._fields(key)[: len(FIELDS) if with_optimizer else 1]
        ]
        return dict(zip(self.tensor_names(keys, with_optimizer=with_optimizer), fields, strict=True))

    def begin_copy(self) -> KeptRows | None:
        """Keep what is written over while the tables are copied; None where only an update writes, which can wait."""
        return None

    def begin_load(self, keys: Sequence[Key], step: int, *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Tensors of buckets to fill, as `tensors` gives them; they are held from `end_load` on.

        Args:
            keys: buckets; rows carry their own update counts.
            step: optimizer step that they will be from.
            with_optimizer: the optimizer state too; without it nothing is written, and no memory taken.
        """
        self._change(keys, step)
        self.held -= set(keys)
        self._arriving = set(keys)
        return self.tensors(keys, with_optimizer=with_optimizer)

    def end_load(self) -> None:
        """Hold what has been filled."""
        self.held |= self._arriving
        self._arriving = set()

    def drop_load(self) -> None:
        """Forget what was to be filled, and give its memory back."""
        self._arriving = set()
        self._keep(self.held)


def as_tensor(rows_RD: np.ndarray) -> Tensor:
    """The same memory as a tensor: float32, or bfloat16 where numpy holds the bits as uint16."""
    if rows_RD.dtype == np.uint16:
        return torch.from_numpy(rows_RD.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows_RD)


def warm_loops(row_dtype: str) -> None:
    """Compile once, or load compiled, every loop that a step runs on tables of one dtype, here and at a reader."""
    rows, sums = segment_sum_rows(np.array([1, 0, 1]), np.ones((3, 4), np.float32))
    merged = merge_rows((rows, sums), (rows, sums.copy()))
    table = SharedTable(4, 4, row_dtype)
    table.change()
    rowwise_adam_(table.weight, table.m, table.v, table.t, *merged, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
    gather_rows(table.weight, rows)
    table.publish(0)
    view = TableView.open(table.handle)
    if view is not None:
        view.gather(rows, np.empty((len(rows), 4), table.weight.dtype), generation=0, step=0)
