"""Loaded by every Python process whose path has this folder: training rests within each step, before its commit.

`SPARSERAY_TEST_REST_S` says how long. A test that watches a run, or waits for what happens beside it, needs a run that
goes on, not one that keeps every core busy meanwhile.
"""

import os
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_REST_S = float(os.environ.get("SPARSERAY_TEST_REST_S", "0"))
_MODULE = "sparseray.platform.trainer"


class _Finder(MetaPathFinder):
    """Finds the module of the training loop, as Python does, and changes it once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is not None and spec.loader is not None:
            _change(spec.loader)
        return spec


def _change(loader: Loader) -> None:
    load = loader.exec_module

    def exec_module(module: Any) -> None:
        load(module)
        collect = module.Trainer._collect

        def rested(self: Any, step: int) -> Any:
            time.sleep(_REST_S)
            return collect(self, step)

        module.Trainer._collect = rested

    loader.exec_module = exec_module  # type: ignore[method-assign]


if _REST_S:
    sys.meta_path.insert(0, _Finder())
