"""What ptxas says of a kernel for compute capability 9.0, on a machine without a GPU.

Triton's last stage runs ptxas and keeps the machine code, which nobody runs here. In its place what is said is kept, under keys
of its own in Triton's cache: ptxas, the longest of the stages, runs once for a kernel.

Compiling all takes minutes, and a kernel whose source, types and compiler have not changed compiles to what it did. So what was said is
recorded (golden/hopper.txt, `python tests/hopper_compile.py NAMES all record`), and only what is not in there is compiled, unless the word "all" is given.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import compile as compile_source

HOPPER = GPUTarget("cuda", 90, 32)
RECORD = Path(__file__).parent / "golden" / "hopper.txt"
branch = ""
"""First word of what is printed: the kernels that are being compiled."""
recorded = dict(line.split(maxsplit=1) for line in RECORD.read_text().splitlines()) if RECORD.exists() else {}
"""What was said of a launch, by its key."""
compiled: dict[str, str] = {}
"""The same of those that were compiled now."""


def _say(_backend: Any, ptx: str, *_: Any) -> bytes:
    """Stands in for the stage that makes machine code."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, check=True).stderr


def print_report(source: Any, options: dict[str, Any]) -> None:
    """Compile a kernel; print the branch, its name, bytes of shared memory, bytes of registers spilled to memory, and registers.

    Args:
        source: the kernel with its types and constants, as Triton's compiler takes it.
        options: of the launch.
    """
    key = f"{triton.__version__} {source.hash()} {sorted(options.items())}"
    key = hashlib.sha256(key.encode()).hexdigest()[:20]
    if "all" in sys.argv or key not in recorded:
        found = compile_source(source, target=HOPPER, options=options)
        said = found.asm["cubin"].decode()
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
        registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
        now = f"{source.fn.fn.__name__} {found.metadata.shared} {spilled} {registers}"
        assert "record" in sys.argv or recorded.get(key, now) == now, f"recorded: {recorded[key]}; now: {now}"
        recorded[key] = compiled[key] = now
    print(branch, recorded[key], flush=True)


def write_record() -> None:
    """Record what was compiled now, and forget the rest."""
    lines = sorted(f"{key} {said}" for key, said in compiled.items())
    RECORD.write_text("\n".join(lines) + "\n")


_hash = nvidia.CUDABackend.hash
nvidia.CUDABackend.make_cubin = _say
nvidia.CUDABackend.hash = lambda self: f"{_hash(self)}-said"
