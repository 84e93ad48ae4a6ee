"""Changes a module of a process as soon as that has loaded it."""

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


class _Finder(MetaPathFinder):
    """Finds one module, as Python does, and has it changed once it is loaded."""

    def __init__(self, module: str, change: Callable[[Any], None]) -> None:
        self.module, self.change = module, change

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.module else None
        if spec is not None and spec.loader is not None:
            self._change(spec.loader)
        return spec

    def _change(self, loader: Loader) -> None:
        load = loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            self.change(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]


def when_loaded(module: str, change: Callable[[Any], None]) -> None:
    """Change a module once it is loaded.

    Args:
        module: its full name.
        change: what to do with it.
    """
    sys.meta_path.insert(0, _Finder(module, change))
