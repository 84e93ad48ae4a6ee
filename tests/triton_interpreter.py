"""Turn on Triton's interpreter where there is no GPU; import this before any module that uses Triton.

`prepare` mends two things of it. It turns a loop bound into an int through a one-element array, which NumPy 2.4
refuses; the element is read instead. And it replaces the whole language anew for every call from a kernel to another
function, a third of the time of our tests; once for a launch is enough.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import torch


def prepare() -> None:
    """Set TRITON_INTERPRET and mend the interpreter, without a GPU only."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    if getattr(interpreter, "_is_mended", False):
        return
    interpreter._is_mended = True
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    _replace_once(interpreter)


def _replace_once(interpreter: Any) -> None:
    """Have the language replaced at a kernel's launch, and for a function that it calls only where it uses another."""
    patch_lang, tl = interpreter._patch_lang, interpreter.tl
    replaced: set[str] = set()

    @functools.cache
    def names(fn: Any) -> frozenset[str]:
        modules = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value)}
        return frozenset(modules & {tl.__name__, tl.core.__name__})

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc,name-defined]
        """What a launch replaced; once it is restored the next one begins anew."""

        def restore(self) -> None:
            super().restore()
            replaced.clear()

    def patch_lang_once(fn: Any) -> Any:
        if names(fn) <= replaced:
            return interpreter._LangPatchScope()
        is_launch = not replaced
        scope = patch_lang(fn)
        replaced.update(names(fn))
        if is_launch:
            whole = Scope()
            whole._changes = scope._changes
            return whole
        return scope

    interpreter._patch_lang = patch_lang_once


prepare()
