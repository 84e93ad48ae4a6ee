"""Turn on Triton's interpreter where there is no GPU; import this before any module that uses Triton.

The interpreter turns a loop bound into an int through a one-element array, which NumPy 2.4 refuses;
`prepare` makes it read the element instead.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def prepare() -> None:
    """Set TRITON_INTERPRET and mend the interpreter's loop bounds, without a GPU only."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if not getattr(interpreter, "_index_mended", False):
        interpreter._patch_lang_tensor = patched
        interpreter._index_mended = True


prepare()
