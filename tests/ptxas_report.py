"""What ptxas says of a kernel for compute capability 9.0, on a machine without a GPU.

Triton's last stage runs ptxas and keeps the machine code, which nobody runs here. In its place what is said is kept, under keys
of its own in Triton's cache: ptxas, the longest of the stages, runs once for a kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import compile as compile_source

HOPPER = GPUTarget("cuda", 90, 32)
branch = ""
"""First word of what is printed: the kernels that are being compiled."""


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
    compiled = compile_source(source, target=HOPPER, options=options)
    said = compiled.asm["cubin"].decode()
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    print(branch, source.fn.fn.__name__, compiled.metadata.shared, spilled, registers, flush=True)


_hash = nvidia.CUDABackend.hash
nvidia.CUDABackend.make_cubin = _say
nvidia.CUDABackend.hash = lambda self: f"{_hash(self)}-said"
