"""Which kinds of processor and library computed a run: bits are equal on one kind only, so another one is told.

Slots say their kind when they are prepared; the run folder keeps all that took part.
"""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch


def kind_here() -> str:
    """Name what of this process decides about bits: processor, its vector instructions, torch, BLAS and threads."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        model = platform.processor() or platform.machine()
    shown = torch.__config__.show()
    blas = next((name for name in ("mkl", "openblas", "accelerate") if name in shown.lower()), "blas")
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_initialized() else ""
    return (
        f"{gpu}{model} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, "
        f"{blas}, {torch.get_num_threads()} threads"
    )


class Machines:
    """The kinds that have computed a run.

    Args:
        path: JSON file in the run folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[str] = set(json.loads(path.read_text())) if path.exists() else set()

    def news(self, kinds: Iterable[str]) -> str:
        """Note the kinds of the slots that are there, and return what should be told of them, or "".

        Args:
            kinds: of all slots; empty ones are unknown.
        """
        fresh = {kind for kind in kinds if kind} - self._known
        if not fresh:
            return ""
        before = sorted(self._known)
        self._known |= fresh
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(sorted(self._known), indent=1))
        os.replace(temporary, self._path)
        if not before and len(fresh) == 1:
            return ""
        others = f"; so far it was {'; '.join(before)}" if before else ""
        return (
            f"slots compute on {' and on '.join(sorted(fresh))}{others}: results may differ in their last bits from "
            "a run on machines of one kind"
        )
