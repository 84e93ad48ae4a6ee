"""A process stops for ever before one named rename.

`SPARSERAY_TEST_HOLD` is the last part of the new name. Gives a test the time to kill a run at that point.
"""

import os
import time
from typing import Any

_HELD = os.environ.get("SPARSERAY_TEST_HOLD", "")
_rename = os.rename


def _hold(source: Any, target: Any, **options: Any) -> None:
    if os.path.basename(target) == _HELD:
        with open(f"{os.path.dirname(source)}/held", "w"):
            pass
        time.sleep(600)
    _rename(source, target, **options)


if _HELD:
    os.rename = _hold
