"""Memory tables in shared memory: one map over all rows of a layer, with pages only where a bucket is held.

The map is an anonymous file of the kernel (memfd). It has no name, so a killed process leaves nothing behind; it does
not count against the size of /dev/shm (64 MB in many containers); and a process of the same user on the same
host opens it through /proc, to gather rows without asking. It spans all rows, so a row's address needs no
translation and every gather loop, on a CPU or a GPU, has one base pointer. Giving a bucket away punches its pages out
of the file. A word in the header says what the rows are: (generation, step), or that they are changing.

Shapes: R rows of a layer's table, D row width, N looked-up rows.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sparseray.actors.wire.messages import TableHandle
from sparseray.kernels.dse.gather import gather_rows, read_word, write_word
from sparseray.log import get_logger

log = get_logger(__name__)

TOKEN, VERSION = 0, 1
CHANGING = -1
SHARED_MEMORY = "/dev/shm"
ROW_TYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
"""How numpy holds rows of each `dse.row_dtype`."""


def process_namespace() -> str:
    """Names the set of processes within which a process id means the same: boot and PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip() if boot.exists() else ''}-{os.stat('/proc/self/ns/pid').st_ino}"


def version_of(generation: int, step: int) -> int:
    """The header's word for rows as they are in a generation after a step's commit.

    Args:
        generation: of the plan, below 2^31.
        step: of the commit, below 2^32.
    """
    return generation << 32 | step


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def anonymous_file(size: int) -> int:
    """Open a file of `size` bytes without a name and, until it is written, without memory."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("sparseray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, size)
        # A reader that maps the file can rely on its length.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return descriptor
    # Some builds of Python lack the call; a file that is unlinked at once is the same, but for its room.
    folder: str | None = SHARED_MEMORY
    room = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    if room < size:
        folder = None
        log.warning(
            "%s has room for %d of %d bytes: shared memory lies in %s",
            SHARED_MEMORY,
            room,
            size,
            tempfile.gettempdir(),
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class SharedTable:
    """One layer's table with its optimizer state, at its owner.

    Args:
        num_rows: R; all of them have an address, whoever holds them.
        width: D.
        row_dtype: float32 or bfloat16; `weight` holds the latter as uint16.
    """

    def __init__(self, num_rows: int, width: int, row_dtype: str) -> None:
        self.num_rows, self.width, self.row_dtype = num_rows, width, row_dtype
        kinds: list[tuple[np.dtype[Any], tuple[int, ...]]] = [
            (ROW_TYPES[row_dtype], (num_rows, width)),
            (np.dtype(np.float32), (num_rows, width)),
            (np.dtype(np.float32), (num_rows,)),
            (np.dtype(np.int64), (num_rows,)),
        ]
        self._row_bytes = [kind.itemsize * (shape[1] if len(shape) > 1 else 1) for kind, shape in kinds]
        self._starts = [mmap.PAGESIZE]
        for row_bytes in self._row_bytes:
            self._starts.append(self._starts[-1] + _pages(row_bytes * num_rows))
        self._descriptor = anonymous_file(self._starts[-1])
        self._map = mmap.mmap(self._descriptor, self._starts[-1])
        self._words = np.frombuffer(self._map, np.int64, 2)
        self._words[TOKEN] = secrets.randbits(62)
        self._words[VERSION] = CHANGING
        self.weight, self.m, self.v, self.t = (
            np.frombuffer(self._map, kind, int(np.prod(shape)), start).reshape(shape)
            for (kind, shape), start in zip(kinds, self._starts)
        )

    def __del__(self) -> None:
        # The map itself goes with the arrays that view it.
        with contextlib.suppress(AttributeError):
            os.close(self._descriptor)

    @property
    def handle(self) -> TableHandle:
        """What another process opens the table by."""
        return TableHandle(
            namespace=process_namespace(),
            pid=os.getpid(),
            descriptor=self._descriptor,
            token=int(self._words[TOKEN]),
            num_rows=self.num_rows,
            width=self.width,
            row_dtype=self.row_dtype,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the table takes."""
        return os.fstat(self._descriptor).st_blocks * 512

    def change(self) -> None:
        """Say that the rows are changing: nobody else may read them until `publish`."""
        write_word(self._words, VERSION, CHANGING)

    def publish(self, version: int) -> None:
        """Say which rows these are; see `version_of`."""
        write_word(self._words, VERSION, version)

    def keep(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Give back the memory of all rows outside some ranges.

        Args:
            ranges: [first row, row after the last), rising and disjoint.
        """
        stop_before = 0
        for start, stop in [*ranges, (self.num_rows, self.num_rows)]:
            for offset, row_bytes in zip(self._starts, self._row_bytes):
                self._punch(offset + stop_before * row_bytes, offset + start * row_bytes)
            stop_before = stop

    def _punch(self, start: int, stop: int) -> None:
        """Give back the pages that lie wholly between two offsets."""
        first, last = _pages(start), stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._map.madvise(mmap.MADV_REMOVE, first, last - first)


class TableView:
    """The rows of another process's table, read only and without asking it. `open` makes one."""

    def __init__(self, handle: TableHandle, view: mmap.mmap) -> None:
        self.handle, self._map = handle, view
        self._words = np.frombuffer(view, np.int64, 2)
        kind, size = ROW_TYPES[handle.row_dtype], handle.num_rows * handle.width
        self._weight = np.frombuffer(view, kind, size, mmap.PAGESIZE).reshape(-1, handle.width)

    @classmethod
    def open(cls, handle: TableHandle) -> "TableView | None":
        """Map a table; None when it lies on another host, or its process is gone."""
        if handle.namespace != process_namespace():
            return None
        size = handle.num_rows * handle.width * ROW_TYPES[handle.row_dtype].itemsize
        try:
            descriptor = os.open(f"/proc/{handle.pid}/fd/{handle.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                view = mmap.mmap(descriptor, mmap.PAGESIZE + size, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            log.warning("the memory table of process %d is not to be read here: %s", handle.pid, error)
            return None
        found = cls(handle, view)
        return found if int(found._words[TOKEN]) == handle.token else None

    def gather(self, rows_N: np.ndarray, out_ND: np.ndarray, *, generation: int, step: int) -> bool:
        """Gather rows as they are in a generation after a step's commit.

        The owner may still be applying that commit, or have gone on in another generation: then ask it instead.

        Args:
            rows_N: int64 rows of buckets that the plan of that generation gives to the owner.
            out_ND: float32, or uint16 for bfloat16 rows; undefined if the answer is False.
            generation, step: of which rows are wanted.

        Returns:
            Whether `out_ND` holds those rows.
        """
        wanted = version_of(generation, step)
        if read_word(self._words, VERSION) != wanted:
            return False
        gather_rows(self._weight, rows_N, out_ND)
        return bool(read_word(self._words, VERSION) == wanted)
