"""What a configuration value may be: a range beside the dataclass's field that holds it, and one check of both.

`within` declares a range, `check` refuses what a made dataclass holds outside of it, and `complaint` says the same of
a value that stands in a file or an option and has not become a dataclass yet (platform/config.py).
"""

import functools
import math
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from sparseray.errors import ConfigError

T = TypeVar("T")
LARGEST = 1 << 40
"""No count, size or number of steps goes beyond it: what does is a slip of the keyboard."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Range of a number; the ends `at_least` and `at_most` belong to it, `above` and `below` do not."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def complaint(self, value: float) -> str:
        """What a number must be that lies outside; empty for one that does not."""
        ends = (
            (f"at least {_short(self.at_least)}", value >= self.at_least),
            (f"above {_short(self.above)}", value > self.above),
            (f"at most {_short(self.at_most)}", value <= self.at_most),
            (f"below {_short(self.below)}", value < self.below),
        )
        return next((f"must be {end}" for end, is_kept in ends if not is_kept), "")


def within(
    default: T,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> T:
    """Declare a dataclass's field with a default and a range.

    Args:
        default: value where none is given.
        at_least, at_most: ends that belong to the range.
        above, below: ends that do not.
    """
    limits = Limits(at_least=at_least, at_most=at_most, above=above, below=below)
    made: T = field(default=default, metadata={"limits": limits})
    return made


def count(default: T, at_least: int = 1, at_most: int = LARGEST) -> T:
    """Declare a field that counts something."""
    return within(default, at_least, at_most)


def check(section: str, made: Any) -> None:
    """See that every value of a dataclass has its field's type and lies in its range.

    Args:
        section: dotted name that stands before the field's in messages.
        made: the dataclass.

    Raises:
        ConfigError: naming the first that does not.
    """
    kind = typing.cast(Hashable, type(made))
    hints = hints_of(kind)
    for item in fields(made):
        if problem := complaint(hints[item.name], limits_of(item), getattr(made, item.name)):
            raise ConfigError(f"{section}.{item.name}={getattr(made, item.name)!r} {problem}")


@functools.cache
def hints_of(kind: Hashable) -> Mapping[str, Any]:
    """Types of a dataclass's fields."""
    return typing.get_type_hints(kind)


def limits_of(item: "Field[Any]") -> Limits:
    """The range that a field was declared with; all numbers where none was."""
    return typing.cast(Limits, item.metadata.get("limits", Limits()))


def complaint(hint: Any, limits: Limits, value: Any) -> str:
    """Say what a value must be to fit a type and a range; empty when it does.

    Args:
        hint: type of the field.
        limits: range of the field; each number of a tuple must be in it.
        value: what was given.
    """
    if is_dataclass(hint):
        return "" if isinstance(value, typing.cast(type, hint)) else "must be a section"
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        (hint,) = (option for option in options if option is not type(None))
        return "" if value is None else complaint(hint, limits, value)
    if origin is typing.Literal:
        return "" if value in options else f"must be {' or '.join(map(str, options))}"
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return f"must be a list such as [{'1, 2' if options[0] is int else 'full, nsa'}]"
        found = (complaint(options[0], limits, item) for item in value)
        return next((f"must hold items that each {text}" for text in found if text), "")
    return _simple_complaint(hint, limits, value)


def _simple_complaint(hint: Any, limits: Limits, value: Any) -> str:
    if hint is bool:
        return "" if isinstance(value, bool) else "must be true or false"
    if hint is str:
        return _text_complaint(value)
    what = "a whole number" if hint is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int if hint is int else int | float):
        return f"must be {what}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    return limits.complaint(value)


def _text_complaint(value: object) -> str:
    if not isinstance(value, str):
        return "must be text; put it in quotes"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "must be UTF-8 text; rename the file or folder"
    return "must not hold a NUL character" if "\0" in value else ""


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) < math.inf and float(value).is_integer() else f"{value:g}"
