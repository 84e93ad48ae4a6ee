"""A configuration as plain values, for YAML, JSON and msgpack, and back."""

import types
import typing
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

from sparseray.errors import ConfigError

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Return plain values for YAML, JSON or msgpack."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_dict(kind: type[C], value: dict[str, Any]) -> C:
    """Rebuild a dataclass from `to_dict`; lists become tuples where the field says so.

    Args:
        kind: the dataclass.
        value: plain values by field.

    Raises:
        ConfigError: a key that the dataclass lacks.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ConfigError(f"unknown keys {unknown} for {kind.__name__}; was this written by another version?")
    return kind(**{name: _typed(hints[name], item) for name, item in value.items()})


def _typed(hint: Any, value: Any) -> Any:
    if is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and any(typing.get_origin(o) is tuple or o is tuple for o in options):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return value
