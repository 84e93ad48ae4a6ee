"""The `submit` command: runs a sparseray command as a job of a Ray cluster, through the Jobs API.

Prints the `ray job submit` line that does the same, follows the job's log, and returns its exit
status. Paths are made absolute: the cluster sees the same files, or gets them by `--working_dir`.
"""

import argparse
import asyncio
import http.client
import os
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseray.errors import ClusterError, ConfigError, UserError
from sparseray.platform.config import die
from sparseray.platform.settings import expand_path

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXAMPLE = """example:
  ray start --head
  python -m sparseray submit pretrain --address http://127.0.0.1:8265 --config configs/tiny.yaml \\
      --data.path data/stdlib --run_dir runs/submitted

All options after the command's name are its own, except --address, --working_dir and --no_wait.
A cluster with token authentication is reached with RAY_AUTH_TOKEN or ~/.ray/auth_token.
"""
PATH_OPTIONS = ("--config", "--data.path", "--run_dir", "--checkpoint", "--out")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_S = 8.0
SUBMITTABLE = ("pretrain", "demo", "data")


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status is the job's, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="sparseray submit",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=SUBMITTABLE, help="sparseray command to run on the cluster")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS),
        help="dashboard of the Ray head, default %(default)s",
    )
    parser.add_argument(
        "--working_dir", help="folder that Ray copies to the cluster; paths then stay relative to it"
    )
    parser.add_argument("--no_wait", action="store_true", help="return once the job is accepted")
    options, rest = parser.parse_known_args(list(arguments))
    try:
        return submit(options.command, rest, options.address, options.working_dir, wait=not options.no_wait)
    except UserError as error:
        return die(error)


def entrypoint(command: str, rest: Sequence[str], *, keep_paths: bool) -> list[str]:
    """Return the command line that the job runs.

    Args:
        command: sparseray command.
        rest: its options.
        keep_paths: leave paths relative (they are inside the working directory).
    """
    words, is_path = [], False
    for word in rest:
        name, equals, value = word.partition("=")
        if is_path and not keep_paths:
            word = _absolute(word)
        elif name in PATH_OPTIONS and equals and not keep_paths:
            word = f"{name}={_absolute(value)}"
        is_path = name in PATH_OPTIONS and not equals
        words.append(word)
    if command == "pretrain" and not any(word.split("=")[0] == "--cluster.address" for word in words):
        words += ["--cluster.address", "auto"]
    # The environment that this command runs in, not whatever `python` is on the head.
    return [sys.executable, "-m", "sparseray", command, *words]


def _absolute(path: str) -> str:
    return str(Path(expand_path(path, "submit")).absolute())


def submit(command: str, rest: Sequence[str], address: str, working_dir: str | None, *, wait: bool) -> int:
    """Submit, follow the log, and return the job's exit status.

    Raises:
        ClusterError: the head cannot be reached or refuses the token.
        ConfigError: a file that the job needs is missing.
    """
    _check_files(rest)
    words = entrypoint(command, rest, keep_paths=working_dir is not None)
    line = ["ray", "job", "submit", "--address", address]
    line += ["--working-dir", working_dir] if working_dir else []
    print(shlex.join([*line, "--", *words]), flush=True)
    client = _connect(address)
    runtime: dict[str, Any] = {"working_dir": working_dir} if working_dir else {}
    try:
        job = client.submit_job(entrypoint=shlex.join(words), runtime_env=runtime)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"{address} did not accept the job: {_one_line(error)}") from None
    print(f"job {job} accepted by {address}", flush=True)
    if not wait:
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        stop = shlex.join(["ray", "job", "stop", "--address", address, job])
        print(f"the job goes on; stop it with: {stop}", file=sys.stderr)
        return 130
    info = client.get_job_info(job)
    print(f"job {job}: {info.status}", flush=True)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    return 0 if str(info.status) == "SUCCEEDED" else 1


def _check_files(rest: Sequence[str]) -> None:
    for word, following in zip(rest, [*rest[1:], ""]):
        name, equals, value = word.partition("=")
        path = value if equals else following
        if name in ("--config", "--data.path") and not Path(expand_path(path, name)).exists():
            raise ConfigError(f"{name} {path} does not exist; nothing was submitted")


def _check_answers(address: str) -> None:
    """See that somebody answers at an address within seconds; Ray's client waits for minutes.

    Raises:
        ClusterError: nobody does.
    """
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return  # It answers; what it refuses is told by the client.
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ClusterError(
            f"the Ray head at {address} cannot be used: {_one_line(error)}; check the address, such as {DEFAULT_ADDRESS}, "
            "and that the head was started with its dashboard"
        ) from None


def _connect(address: str) -> "JobSubmissionClient":
    _check_answers(address)
    # Ray's client would take these instead of the address it is given.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or token_file.exists()):
        # A client that starts no cluster sends its token only when told to.
        os.environ["RAY_AUTH_MODE"] = "token"
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        client.get_version()
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        text = _one_line(error)
        cure = (
            "give the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            if isinstance(error, AuthenticationError)
            else "check the address, and that the head was started with its dashboard"
        )
        raise ClusterError(f"the Ray head at {address} cannot be used: {text}; {cure}") from None
    return client


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


async def _follow(client: "JobSubmissionClient", job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
