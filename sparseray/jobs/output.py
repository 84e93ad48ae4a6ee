"""What a command says, and what becomes of it when nobody reads: words that find no reader never end a run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def print_line(line: str) -> None:
    """Write one line at once, also into a pipe."""
    print(line, flush=True)


class Lasting:
    """A text stream that is silent from the first write that fails: a closed pipe, a full disk, a terminal gone.

    Args:
        stream: where words go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_read = stream, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing once that failed."""
        if self._is_read:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                # A terminal that knows no more than ASCII reads the rest of the line.
                return self._stream.write(text.encode("ascii", "replace").decode())
            except (OSError, ValueError):
                self._fall_silent()
        return len(text)

    def flush(self) -> None:
        """Pass on what was written, or nothing once that failed."""
        if self._is_read:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._fall_silent()

    def _fall_silent(self) -> None:
        self._is_read = False
        # What is left in the stream's buffer would fail again when Python ends, and change the exit code.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Have standard output and standard error outlive their readers."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = kept
