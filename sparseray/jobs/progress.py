"""How far a command has come, with bytes or samples: a bar on a terminal, plain lines in a pipe; both on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseray.jobs.tokens.progress import Progress

PLAIN_INTERVAL_S = 2.0


@contextmanager
def progress_of_bytes() -> Iterator["Progress"]:
    """Yield a progress callback: a bar on a terminal, else a line every two seconds, both on stderr."""
    if not sys.stderr.isatty():
        yield _plain_lines(lambda done, total: f"{done / 1e6:.1f} of {total / 1e6:.1f} MB")
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(DownloadColumn(), TransferSpeedColumn()) as show:
        yield show


@contextmanager
def progress_of_counts() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback that is told (phase, done, in all) of things that are counted."""
    if not sys.stderr.isatty():
        yield _plain_lines(lambda done, total: f"{done} of {total}")
        return
    from rich.progress import MofNCompleteColumn

    with _bar(MofNCompleteColumn()) as show:
        yield show


@contextmanager
def _bar(*columns: Any) -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with Bar(*shown, console=Console(stderr=True)) as bar:
        tasks = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield show


def _plain_lines(amount: Callable[[int, int], str]) -> Callable[[str, int, int], None]:
    """Return a callback that prints a line when a phase begins, ends, and every two seconds between."""
    last_phase, last_time = "", 0.0

    def show(phase: str, done: int, total: int) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        if phase != last_phase or now - last_time >= PLAIN_INTERVAL_S or done == total:
            last_phase, last_time = phase, now
            print(f"{phase}: {amount(done, total)}", file=sys.stderr, flush=True)

    return show
