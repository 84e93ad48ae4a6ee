"""Turn on Triton's interpreter where there is no GPU; import this before any module that uses Triton.

`prepare` mends some things of it. It turns a loop bound into an int through a one-element array, which NumPy 2.4
refuses; the element is read instead. The rest is time, of which our tests take less than half now. It replaces
the whole language anew for every call from a kernel to another function; once for a launch is enough. It looks for
overflows by six interpreted operations on each sum and product; NumPy computes the same. And it describes shape and type
anew for each of millions of values; a description is now made once.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import numpy as np
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
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    _replace_once(interpreter)
    _describe_once(interpreter)


def _refuse_overflow(semantic: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """End the kernel where a sum, difference or product does not fit into the integers that it is made of."""
    integer, name = lhs.type.scalar, operation.__name__
    if integer.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    found = exact(lhs.handle.data, rhs.handle.data, dtype=np.int64)
    fits = integer.get_int_min_value() <= found.min() and found.max() <= integer.get_int_max_value()
    assert fits, f"int{integer.int_bitwidth} overflow detected for operation {name}"


def _describe_once(interpreter: Any) -> None:
    """Keep what was found out about a type, by the name of the type."""
    core, np_dtype_of = interpreter.tl.core, interpreter._get_np_dtype
    describe_type, describe_tensor = core.block_type.__init__, core.tensor.__init__
    types: dict[Any, tuple[Any, ...]] = {}
    tensors: dict[str, tuple[Any, ...]] = {}
    np_dtypes: dict[str, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape))
        if key not in types:
            describe_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = types[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            describe_tensor(self, handle, type)
            tensors[type.name] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = tensors[type.name]

    def np_dtype(of: Any) -> Any:
        if of.name not in np_dtypes:
            np_dtypes[of.name] = np_dtype_of(of)
        return np_dtypes[of.name]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = np_dtype


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
