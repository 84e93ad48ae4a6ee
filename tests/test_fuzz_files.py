"""Damaged data sets and checkpoints: each ends in a sentence, or gives what the whole one gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_files import files

FEW, MANY = {"data": 1_000, "checkpoints": 250}, {"data": 20_000, "checkpoints": 5_000}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["", "many"])
@pytest.mark.parametrize("kind", ["data", "checkpoints"])
def test_no_damage_ends_in_a_traceback_or_in_something_else(
    tmp_path: Path, kind: str, cases: dict[str, int]
) -> None:
    ends, faults = files(kind, tmp_path, cases[kind])
    assert not faults, "\n".join(faults[:10])
    assert ends["refused"] > 20
