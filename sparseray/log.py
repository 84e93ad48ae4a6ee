"""Logging for every process of a run: one line a record, on stderr; a leaf.

`SPARSERAY_LOG` (debug, info, warning) sets the level; standard library logging does the rest.
"""

import logging
import os
import sys


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one module, configured once per process.

    Args:
        name: dotted module name, usually `__name__`.
    """
    root = logging.getLogger("sparseray")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("SPARSERAY_LOG", "info").upper())
        root.propagate = False
    return logging.getLogger(name)
