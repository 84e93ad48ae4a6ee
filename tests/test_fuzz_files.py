"""Damaged data sets and checkpoints: each ends in a sentence, or gives what the whole one gives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fuzz_files import files

SECONDS = 10.0


@pytest.mark.parametrize("kind", ["data", "checkpoints"])
def test_no_damage_ends_in_a_traceback_or_in_something_else(tmp_path: Path, kind: str) -> None:
    end = time.monotonic() + SECONDS
    ends, faults = files(kind, tmp_path, 1_000_000, is_late=lambda: time.monotonic() > end)
    assert not faults, "\n".join(faults[:10])
    assert ends["refused"] > 20
