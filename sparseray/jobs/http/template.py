"""The sandbox in which a checkpoint's chat template runs: it reads no files, and it ends.

Jinja's sandbox keeps a template from Python's inside and bounds `range`, but not loops in loops, macros that call
themselves, or products of texts. A template is a file that came with a model, and every chat runs it: here it has so
many steps (lines of Python that it and its filters run), counted rather than timed, so that the same conversation is
always answered alike.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.meta import find_referenced_templates
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparseray.errors import CheckpointError

MOST_STEPS = 1_000_000
"""A conversation of a thousand messages takes some tens of thousands; all of them about 0.2 s."""
MOST_SIZE = 1 << 20
"""Most characters, items or bits of a product."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, which looks at products before they are computed."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or a power, unless it is huge."""
        if _size(operator, left, right) > MOST_SIZE:
            raise SecurityError(f"{operator} gives more than {MOST_SIZE:,} characters, items or bits")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> int:
    """Characters, items or bits of a product or power of whole numbers, or of a text or list and a number."""
    sizes = [
        x.bit_length() if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 0
        for x in (left, right)
    ]
    if isinstance(left, int) and isinstance(right, int):
        return sizes[0] * max(right, 1) if operator == "**" else sum(sizes)
    times, size = (left, sizes[1]) if isinstance(left, int) else (right, sizes[0])
    return size * times if isinstance(times, int) else 0


class Template:
    """A Jinja template.

    Args:
        source: of it.

    Raises:
        CheckpointError: it is not Jinja, or asks for other files.
    """

    def __init__(self, source: str) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            if [*find_referenced_templates(environment.parse(source))]:
                raise CheckpointError("it reads other files")
            self._template = environment.from_string(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise CheckpointError(f"it is not Jinja ({error})") from error

    def render(self, **variables: Any) -> str:
        """Run it.

        Args:
            variables: what it may look at.

        Raises:
            SecurityError: it takes more steps, or room, than it has, or reaches for what it may not have.
            TemplateError: it refuses what it is given; other exceptions as from any expression.
        """
        left, before = MOST_STEPS, sys.gettrace()

        def count(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise SecurityError(f"it takes more than {MOST_STEPS:,} steps, so it may never end")
            return count

        sys.settrace(count)
        try:
            return self._template.render(**variables)
        except (RecursionError, MemoryError) as error:
            raise SecurityError(f"it takes more room than there is ({type(error).__name__})") from None
        finally:
            sys.settrace(before)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Write a value as JSON, in the way that Hugging Face's templates expect.

    Args:
        value: plain.
        ensure_ascii: write other characters as escapes.
        indent: spaces of a level; None for one line.
    """
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
