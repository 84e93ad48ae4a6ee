"""How far a command has come with bytes: a bar on a terminal, plain lines in a pipe; both on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseray.jobs.tokens.prepare import Progress

PLAIN_INTERVAL_S = 2.0


@contextmanager
def progress_of_bytes() -> Iterator["Progress"]:
    """Yield a progress callback: a bar on a terminal, else a line every two seconds, both on stderr."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks = {}

        def show(phase: str, done_bytes: int, total_bytes: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total_bytes)
            bar.update(tasks[phase], completed=done_bytes)

        yield show


def _plain_lines() -> "Progress":
    """Return a callback that prints a line when a phase begins, ends, and every two seconds between."""
    last_phase, last_time = "", 0.0

    def show(phase: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        if phase != last_phase or now - last_time >= PLAIN_INTERVAL_S or done_bytes == total_bytes:
            last_phase, last_time = phase, now
            print(
                f"{phase}: {done_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB", file=sys.stderr, flush=True
            )

    return show
