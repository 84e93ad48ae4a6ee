"""A model's folder as Hugging Face writes it: what is in it, checked before a weight is read, and tensors one by one.

Sizes, names, shapes and types come from the headers of the safetensors files; a file that was only half downloaded
shows there. FP8 weights are read as bfloat16: block by block, times the factor beside them (arXiv 2412.19437
section 3.3).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseray.errors import CheckpointError
from sparseray.model.hub import FP8_BLOCK, SCALE_SUFFIX, Entry, Fused, fused

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.bfloat16,
}
"""What a stored type is read as."""
MOST_NAMED, MOST_OPEN = 3, 4


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor is: its file, shape, and type as safetensors calls it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class HubFolder:
    """The model of one folder.

    Args:
        path: the folder.

    Raises:
        CheckpointError: something is missing, half there, or is not what the index says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isdir(path):
            raise CheckpointError(
                f"{str(path)[:200]} is not a folder; give one with {CONFIG} and {SINGLE} or {INDEX}"
            )
        self.config = self.read_json(CONFIG)
        self.stored: dict[str, Stored] = {}
        self._open: dict[str, Any] = {}
        for file, names in self._files().items():
            self.stored |= self._header(file, names)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a file of settings.

        Raises:
            CheckpointError: it is missing or no JSON object.
        """
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} has no {name}; download the whole model") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path / name} cannot be read ({' '.join(str(error).split())}); download it again"
            ) from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / name} is not a JSON object; download it again")
        return found

    def _files(self) -> dict[str, set[str] | None]:
        """Files with weights, and the names that the index promises of each."""
        if not (self.path / INDEX).exists():
            if (self.path / SINGLE).exists():
                return {SINGLE: None}
            raise CheckpointError(
                f"{self.path} has neither {SINGLE} nor {INDEX}; give a model that was saved as safetensors"
            )
        where = self.read_json(INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise CheckpointError(f"{self.path / INDEX} has no weight_map; download it again")
        found: dict[str, set[str] | None] = {}
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{self.path / INDEX} puts {name} into {str(file)[:80]!r}, which is no file of this folder;"
                    " download it again"
                )
            names = found.setdefault(file, set())
            assert names is not None
            names.add(name)
        return dict(sorted(found.items()))

    def _header(self, file: str, promised: set[str] | None) -> dict[str, Stored]:
        """What a file holds, compared with what the index says of it."""
        if not (self.path / file).is_file():
            raise CheckpointError(f"{self.path / file} is missing; download it")
        with self._reading(file) as archive:
            slices = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118
            found = {
                name: Stored(file=file, shape=tuple(s.get_shape()), dtype=s.get_dtype())
                for name, s in slices.items()
            }
        if promised is not None and promised != set(found):
            lacking, more = promised - set(found), set(found) - promised
            what = f"lacks {some(lacking)}" if lacking else f"has {some(more)}, which it does not name"
            raise CheckpointError(f"{self.path / INDEX} is wrong: {file} {what}; download both again")
        return found

    @contextmanager
    def _reading(self, file: str) -> Iterator[Any]:
        """An open file; the last ones stay open for the next tensors."""
        try:
            if file not in self._open:
                if len(self._open) == MOST_OPEN:
                    del self._open[next(iter(self._open))]
                self._open[file] = safe_open(self.path / file, framework="pt")
            yield self._open[file]
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path / file} is cut off or no safetensors file ({' '.join(str(error).split())}); download it again"
            ) from None

    def _place(self, name: str) -> tuple[str, Fused | None]:
        """Name of the stored tensor that holds one of theirs, and which part of it."""
        other = None if name in self.stored else fused(name)
        if other is not None and other.name in self.stored:
            return other.name, other
        return name, None

    def check(self, wanted: Iterable[Entry], is_left_out: Callable[[str], bool]) -> None:
        """See that the tensors are those of a model: all of them, with their shapes, of known types.

        Args:
            wanted: tensors of the model.
            is_left_out: of a name, whether the model does without it.

        Raises:
            CheckpointError: naming what does not fit.
        """
        used: set[str] = set()
        lacking: list[str] = []
        for entry in wanted:
            for name in entry.theirs:
                place, part = self._place(name)
                if place not in self.stored:
                    lacking.append(name)
                    continue
                self._check_one(place, part, entry)
                used.add(place)
        used |= {name + SCALE_SUFFIX for name in used}
        more = [name for name in self.stored if name not in used and not is_left_out(name)]
        for names, what, cure in (
            (lacking, "lacks", f"download it again, or mend {CONFIG}"),
            (more, "has tensors that its configuration has no place for:", f"mend {CONFIG}"),
        ):
            if names:
                raise CheckpointError(f"{self.path} {what} {some(names)}; {cure}")

    def _check_one(self, place: str, part: Fused | None, entry: Entry) -> None:
        stored, shape = self.stored[place], entry.piece
        if part is not None:
            rows = shape[0] * (1 if part.part == "down" else 2)
            shape = (stored.shape[0], rows, *shape[1:])
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.path / stored.file}: {place} has shape {list(stored.shape)}, and {CONFIG} says {list(shape)};"
                " they are of two models"
            )
        if stored.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise CheckpointError(
                f"{self.path / stored.file}: {place} is of type {stored.dtype}; what can be read is {known}"
            )
        if stored.dtype.startswith("F8"):
            scale = self.stored.get(place + SCALE_SUFFIX)
            blocks = tuple(-(-size // FP8_BLOCK) for size in stored.shape)
            if scale is None or scale.shape != blocks or len(blocks) != 2:
                found = None if scale is None else list(scale.shape)
                raise CheckpointError(
                    f"{self.path / stored.file}: {place} is FP8, and {place}{SCALE_SUFFIX} is {found} instead of"
                    f" {list(blocks)}: one factor for {FP8_BLOCK} x {FP8_BLOCK} weights; download it again"
                )

    def dtype(self, entry: Entry) -> torch.dtype:
        """What an entry is read as; fp32 for what only we have."""
        return DTYPES[self.stored[self._place(entry.theirs[0])[0]].dtype] if entry.theirs else torch.float32

    def read(self, entry: Entry) -> Tensor:
        """Read one of our tensors.

        Raises:
            CheckpointError: it cannot be read, or holds what is no number.
        """
        if not entry.theirs:
            return torch.zeros(entry.shape)
        pieces = [self._read_one(name) for name in entry.theirs]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        # Both ends of the range are NaN where one element is; far quicker than to look at each.
        if not all(end.isfinite() for end in torch.aminmax(tensor)):
            place = self._place(entry.theirs[0])[0]
            raise CheckpointError(
                f"{self.path / self.stored[place].file}: {place} holds NaN or infinity; the model is damaged, use another copy"
            )
        return tensor

    def check_copies(self, entry: Entry, tensor: Tensor) -> None:
        """See that what is stored once more under other names is the same, a tensor at a time.

        Args:
            entry: whose copies are looked at.
            tensor: of it.

        Raises:
            CheckpointError: naming the one that is not.
        """
        for name in entry.copies:
            if name not in self.stored:
                continue
            self._check_one(name, None, entry)
            if not torch.equal(self._read_one(name), tensor):
                raise CheckpointError(
                    f"{self.path / self.stored[name].file}: {name} is not equal to {entry.theirs[0]}; modules that predict"
                    f" further tokens share embedding and head here: set num_nextn_predict_layers to 0 in {CONFIG} to leave"
                    " them out"
                )

    def _read_one(self, name: str) -> Tensor:
        place, part = self._place(name)
        stored = self.stored[place]
        with self._reading(stored.file) as archive:
            if part is not None:
                inner = stored.shape[1] // 2
                rows = {"gate": slice(0, inner), "up": slice(inner, 2 * inner), "down": slice(None)}
                tensor: Tensor = archive.get_slice(place)[part.expert, rows[part.part]]
            else:
                tensor = archive.get_tensor(place)
        if not stored.dtype.startswith("F8"):
            return tensor
        factors = self.stored[place + SCALE_SUFFIX]
        with self._reading(factors.file) as archive:
            return dequantized(tensor, archive.get_tensor(place + SCALE_SUFFIX))


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """Weights of an FP8 matrix, bfloat16: each block of 128 x 128 times its factor, in fp32.

    Args:
        weight: [N, M] float8.
        scale: [ceil(N / 128), ceil(M / 128)].
    """
    found = torch.empty(weight.shape, dtype=torch.bfloat16)
    for block, factors in enumerate(scale.float()):
        rows = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
        found[rows] = weight[rows].float() * factors.repeat_interleave(FP8_BLOCK)[: weight.shape[1]]
    return found


def some(names: Iterable[str]) -> str:
    """The first of many names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return ", ".join(found[:MOST_NAMED]) + more
