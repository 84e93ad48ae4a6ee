"""How a preparation tells of its progress."""

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: what is being done, bytes done and bytes in all."""

    def __call__(self, phase: str, done_bytes: int, total_bytes: int, /) -> None: ...


def quiet(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Report nothing."""
