"""State moves between slots in chunks of SPARSERAY_TEST_CHUNK_BYTES, so that a tiny model's takes many of them."""

import os
from typing import Any

from loading import when_loaded

_BYTES = int(os.environ.get("SPARSERAY_TEST_CHUNK_BYTES", "0"))


def _change(module: Any) -> None:
    module.CHUNK_BYTES = _BYTES


if _BYTES:
    when_loaded("sparseray.actors.exchange.chunks", _change)
