"""Training rests within each step, before its commit; `SPARSERAY_TEST_REST_S` says how long.

A test that watches a run, or waits for what happens beside it, needs a run that goes on, not one that keeps every core
busy meanwhile.
"""

import os
import time
from typing import Any

from loading import when_loaded

_REST_S = float(os.environ.get("SPARSERAY_TEST_REST_S", "0"))


def _change(module: Any) -> None:
    collect = module.Trainer._collect

    def rested(self: Any, step: int) -> Any:
        time.sleep(_REST_S)
        return collect(self, step)

    module.Trainer._collect = rested


if _REST_S:
    when_loaded("sparseray.platform.trainer", _change)
