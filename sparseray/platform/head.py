"""A Ray head of the platform's own, that outlives the command which starts it: `up` starts one, `down` ends it.

It listens on loopback, and asks for a token as a Ray that a run brings along does: whoever may connect may run code.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from sparseray.errors import ClusterError
from sparseray.platform.ray_settings import OBJECT_STORE_BYTES, set_environment

RAY = (sys.executable, "-m", "ray.scripts.scripts")
START_S, END_S = 60.0, 30.0


def start_head(num_cpus: int, log: Path) -> tuple[str, int]:
    """Start a head, and return its address and the id of the process that ends it.

    Args:
        num_cpus: logical CPUs that slots may reserve.
        log: file for what Ray says.

    Raises:
        ClusterError: it does not come up.
    """
    set_environment()
    _ensure_token()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += [f"--num-cpus={num_cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += ["--include-dashboard=false", "--dashboard-agent-listen-port=0", "--disable-usage-stats"]
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + START_S
    while "--block" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            said = " ".join(log.read_text().split())[-300:]
            raise ClusterError(f"a Ray head did not start: {said}; free memory or CPUs, and try again")
        time.sleep(0.05)
    return f"127.0.0.1:{port}", process.pid


def is_head(pid: int) -> bool:
    """Whether a process is a head that `start_head` started, and not another that has its id since."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return "start" in words and "--head" in words and RAY[2] in words


def stop_head(pid: int) -> None:
    """End a head with all processes of its node."""
    if not is_head(pid):
        return
    process = psutil.Process(pid)
    process.terminate()
    try:
        process.wait(END_S)
    except psutil.TimeoutExpired:
        for each in [process, *process.children(recursive=True)]:
            each.kill()


def _ensure_token() -> None:
    """Make the user's token, unless there is one, or token authentication is not wanted."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in os.environ:
        subprocess.run([*RAY, "get-auth-token", "--generate"], capture_output=True, check=False)
