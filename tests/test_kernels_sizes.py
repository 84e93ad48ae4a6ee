"""Models of sizes that nobody tuned for: every kernel that they need compiles for a GPU and fits its shared memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_kernels_of_odd_models_compile_for_hopper() -> None:
    script = Path(__file__).parent / "model_compile.py"
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=settings, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    counted = [line for line in lines if re.fullmatch(r".*: \d+ kernels", line)]
    assert lines == counted, [line for line in lines if line not in counted]
    assert sum(int(line.split()[-2]) for line in counted) > 400
