"""One codec for all that travels or is journalled: a dataclass's fields to plain values, its tensors to raw frames.

The type hints of a frozen dataclass say what may stand in each field; both ends check it, so a sender's mistake is
an error where it is made and a stranger's frame is refused. Plain values are what msgpack and JSON share: numbers,
strings, lists, and maps of a dataclass's fields by name. A tensor is announced by its dtype and shape and travels as
raw bytes, cut into frames that every transport takes; nothing is ever unpickled.
"""

import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
_MOST_ELEMENTS = 1 << 48
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.bfloat16, torch.float16,
        torch.int32, torch.int64, torch.uint8, torch.bool,
    )
}  # fmt: skip
T = TypeVar("T")


class Frames:
    """The raw frames of a message that is being put together, in the order of its tensors."""

    def __init__(self, frames: Sequence[Any]) -> None:
        self._frames = frames
        self._next = 0

    def take(self, num_bytes: int) -> Any:
        """Return the next `num_bytes` bytes, joined where they came in several frames."""
        parts: list[memoryview] = []
        size = 0
        while size < num_bytes and self._next < len(self._frames):
            parts.append(memoryview(self._frames[self._next]))
            size += parts[-1].nbytes
            self._next += 1
        if size != num_bytes:
            raise ValueError(f"a tensor of {num_bytes} bytes has frames of {size}")
        return parts[0] if len(parts) == 1 else bytearray().join(parts)

    def check_empty(self) -> None:
        """Raise ValueError when frames are left that no tensor announced."""
        if self._next != len(self._frames):
            raise ValueError(f"{len(self._frames) - self._next} frames more than announced")


@dataclass(frozen=True)
class _Kind:
    """How values of one type are taken apart (its tensors' frames appended to a list) and put together again."""

    pack: Callable[[Any, list[Any]], Any]
    unpack: Callable[[Any, Frames], Any]


_known: dict[Any, _Kind] = {}


def pack(value: Any, frames: list[Any]) -> Any:
    """Return a dataclass as plain values.

    Args:
        value: an instance of a dataclass whose hints the codec knows.
        frames: the raw bytes of its tensors are appended here, without a copy where they lie on the CPU.

    Raises:
        ValueError: a field holds what its hint does not allow.
    """
    return _kind_of(type(value)).pack(value, frames)


def unpack(kind: type[T], plain: Any, frames: Sequence[Any]) -> T:
    """Put together what `pack` took apart; tensors are views of the frames, not to be written to.

    Args:
        kind: the dataclass.
        plain: as it came, from msgpack or JSON.
        frames: all that came with it.

    Raises:
        ValueError: it is not a `kind`, to the last field and frame.
    """
    left = Frames(frames)
    found: T = _kind_of(kind).unpack(plain, left)
    left.check_empty()
    return found


def to_plain(value: Any) -> Any:
    """Return a dataclass without tensors as plain values, for JSON."""
    frames: list[Any] = []
    plain = pack(value, frames)
    assert not frames, f"{type(value).__name__} holds tensors"
    return plain


def from_plain(kind: type[T], plain: Any) -> T:
    """Rebuild what `to_plain` gave, also after JSON has made strings of a map's numbers.

    Args:
        kind: type of the value.
        plain: values of JSON or msgpack.
    """
    return unpack(kind, plain, ())


def _kind_of(hint: Any) -> _Kind:
    if hint not in _known:
        _known[hint] = _new_kind(hint)
    return _known[hint]


def _new_kind(hint: Any) -> _Kind:
    if hint in (int, str, bool):
        return _exact(hint)
    if hint is float:
        return _Kind(lambda value, _: _number(value), lambda value, _: _number(value))
    if hint is Tensor:
        return _Kind(_pack_tensor, _unpack_tensor)
    if is_dataclass(hint):
        return _dataclass(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2 and arguments[1] is types.NoneType:
        return _optional(_kind_of(arguments[0]))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _sequence(arguments[0])
    if origin is tuple:
        return _row([_kind_of(argument) for argument in arguments])
    if origin is dict:
        return _map(arguments[0], _kind_of(arguments[1]))
    raise TypeError(f"{hint!r} does not travel; the codec has no rule for it")


def _exact(kind: type) -> _Kind:
    def check(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{value!r:.60} is no {kind.__name__}")
        return value

    return _Kind(check, check)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r:.60} is no number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def _optional(inner: _Kind) -> _Kind:
    return _Kind(
        lambda value, frames: None if value is None else inner.pack(value, frames),
        lambda value, frames: None if value is None else inner.unpack(value, frames),
    )


def _sequence(hint: Any) -> _Kind:
    inner = _kind_of(hint)

    def check(value: Any, kind: type) -> None:
        if not isinstance(value, kind):
            raise ValueError(f"{value!r:.60} is no {kind.__name__}")

    def are_plain(value: Any) -> bool:
        # Long rows of numbers and names are what prompts, placements and a step's tokens are made of.
        return hint in (int, str) and set(map(type, value)) <= {hint}

    def pack_it(value: Any, frames: list[Any]) -> Any:
        check(value, tuple)
        return list(value) if are_plain(value) else [inner.pack(item, frames) for item in value]

    def unpack_it(value: Any, frames: Frames) -> Any:
        check(value, list)
        return tuple(value) if are_plain(value) else tuple(inner.unpack(item, frames) for item in value)

    return _Kind(pack_it, unpack_it)


def _row(inner: Sequence[_Kind]) -> _Kind:
    def check(value: Any, kind: type[list[Any]] | type[tuple[Any, ...]]) -> None:
        if not isinstance(value, kind) or len(value) != len(inner):
            raise ValueError(f"{value!r:.60} is no {kind.__name__} of {len(inner)}")

    def pack_it(value: Any, frames: list[Any]) -> Any:
        check(value, tuple)
        return [kind.pack(item, frames) for kind, item in zip(inner, value)]

    def unpack_it(value: Any, frames: Frames) -> Any:
        check(value, list)
        return tuple(kind.unpack(item, frames) for kind, item in zip(inner, value))

    return _Kind(pack_it, unpack_it)


def _map(key: type, inner: _Kind) -> _Kind:
    keys = _kind_of(key)

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r:.60} is no map")

    def unpack_key(name: Any, frames: Frames) -> Any:
        return int(name) if key is int and isinstance(name, str) else keys.unpack(name, frames)

    def pack_it(value: Any, frames: list[Any]) -> Any:
        check(value)
        return {keys.pack(name, frames): inner.pack(item, frames) for name, item in value.items()}

    def unpack_it(value: Any, frames: Frames) -> Any:
        check(value)
        return {unpack_key(name, frames): inner.unpack(item, frames) for name, item in value.items()}

    return _Kind(pack_it, unpack_it)


def _dataclass(kind: Any) -> _Kind:
    hints = typing.get_type_hints(kind)
    inner = {field.name: _kind_of(hints[field.name]) for field in fields(kind)}

    def pack_it(value: Any, frames: list[Any]) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{value!r:.60} is no {kind.__name__}")
        try:
            return {name: field.pack(getattr(value, name), frames) for name, field in inner.items()}
        except ValueError as error:
            raise ValueError(f"{kind.__name__}: {error}") from None

    def unpack_it(value: Any, frames: Frames) -> Any:
        # In the order of the fields, which is that of the frames.
        if not isinstance(value, dict) or list(value) != list(inner):
            raise ValueError(f"{value!r:.60} has not the fields of {kind.__name__}")
        return kind(**{name: field.unpack(value[name], frames) for name, field in inner.items()})

    return _Kind(pack_it, unpack_it)


def _pack_tensor(value: Any, frames: list[Any]) -> Any:
    if not isinstance(value, Tensor):
        raise ValueError(f"{value!r:.60} is no tensor")
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype {name} does not travel")
    if value.numel():
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        frames += [raw[start : start + CHUNK_BYTES] for start in range(0, raw.nbytes, CHUNK_BYTES)]
    return [name, list(value.shape)]


def _unpack_tensor(value: Any, frames: Frames) -> Any:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        raise ValueError(f"{value!r:.60} announces no tensor")
    name, shape = value
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"dtype {name!r:.60} does not travel")
    if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 16:
        raise ValueError(f"shape {shape!r:.60} is none")
    if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise ValueError(f"shape {shape!r:.60} is too large")
    dtype = _DTYPES[name]
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    raw = frames.take(math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(np.frombuffer(raw, np.uint8)).view(dtype).reshape(shape)
