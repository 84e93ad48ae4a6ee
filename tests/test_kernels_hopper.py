"""Kernels compiled for compute capability 9.0, with or without a GPU: none has too much shared memory or spilled registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on Hopper."""
COUNTS = {"dense": 149, "range": 3, "window": 3, "selected": 1, "latent": 3}
MOST_SPILLED = {"dense": 128, "range": 160, "window": 160, "selected": 160, "latent": 16}
"""Bytes. Spilled registers inside the pipelined kernels' loops would cost more than all the rest gains."""
# One process compiles all that is not recorded: it loads for two seconds, and what may take minutes is to begin early.
pytestmark = pytest.mark.xdist_group("compilers")


def compiled(*words: str) -> dict[str, list[list[str]]]:
    """What is said of each launch, by the branch of hopper_compile.py; Triton's interpreter must not be on there."""
    script = Path(__file__).parent / "hopper_compile.py"
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, env=settings, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[list[str]]] = {}
    for line in done.stdout.splitlines():
        branch, *said = line.split()
        found.setdefault(branch, []).append(said)
    return found


@pytest.fixture(scope="module")
def reports() -> dict[str, list[list[str]]]:
    return compiled(*COUNTS)


def check(lines: list[list[str]], count: int, most_spilled: int) -> None:
    assert len(lines) == count
    for name, shared, spilled, _ in lines:
        assert int(shared) <= MOST_SHARED and int(spilled) <= most_spilled, (name, shared, spilled)


@pytest.mark.parametrize("branch", COUNTS)
def test_kernels_compile_for_hopper(branch: str, reports: dict[str, list[list[str]]]) -> None:
    check(reports[branch], COUNTS[branch], MOST_SPILLED[branch])


@pytest.mark.long
def test_kernels_of_every_width_compile_for_hopper() -> None:
    found = compiled("dense", "latent", "all")
    for branch, count in (("dense", 225), ("latent", 6)):
        check(found[branch], count, MOST_SPILLED[branch])
