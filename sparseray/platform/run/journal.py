"""The scheduler's journal: every decision is written here before it takes effect.

SQLite in WAL mode, one row a decision. A decision that is not in the journal has not happened; one
that is there has, whoever died meanwhile. Of several schedulers only the last to lead can write.
"""

import contextlib
import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from sparseray.errors import FencedError, UserError
from sparseray.log import get_logger

log = get_logger(__name__)

WAIT_S = 300.0


class Journal:
    """Appends and reads decisions of one run.

    Args:
        path: database file; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10.0)
        self._db.execute("PRAGMA journal_mode=WAL")
        # A killed process loses nothing in WAL mode; only a power cut needs more than NORMAL.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS decisions ("
            "id INTEGER PRIMARY KEY, time REAL NOT NULL, generation INTEGER NOT NULL, "
            "step INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL)"
        )
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS leaders (epoch INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, "
            "time REAL NOT NULL)"
        )
        self._epoch = 0
        # The training thread decides, and so do users' wishes, in threads of their own.
        self._lock = threading.Lock()

    def lead(self) -> None:
        """Take over the journal: whoever led before can append no more."""
        found = self._db.execute("INSERT INTO leaders (pid, time) VALUES (?, ?)", (os.getpid(), time.time()))
        self._epoch = int(found.lastrowid or 0)

    def leads(self) -> bool:
        """Whether nobody has taken the lead since."""
        (newest,) = self._db.execute("SELECT max(epoch) FROM leaders").fetchone()
        return bool(newest == self._epoch)

    def append(self, kind: str, *, generation: int, step: int, **body: Any) -> None:
        """Write one decision; it is in the file when this returns.

        Args:
            kind: of the decision.
            generation: of the plan that it is of.
            step: that it is of.
            body: plain values.

        Raises:
            FencedError: another scheduler leads now; nothing was written.
            UserError: the file cannot be written.
        """
        done = self._insert((time.time(), generation, step, kind, json.dumps(body), self._epoch))
        if done.rowcount != 1:
            raise FencedError(
                f"another scheduler has taken over this run; {kind} of step {step} was not decided"
            )

    def _insert(self, values: tuple[Any, ...]) -> sqlite3.Cursor:
        """Write a row; a disk that is full or read-only is waited for, as nothing may happen that is not written.

        Raises:
            UserError: it stayed so, or the file is damaged.
        """
        deadline, is_told = time.monotonic() + WAIT_S, False
        while True:
            try:
                with self._lock:
                    return self._db.execute(
                        "INSERT INTO decisions (time, generation, step, kind, body) SELECT ?, ?, ?, ?, ? "
                        "WHERE (SELECT max(epoch) FROM leaders) = ?",
                        values,
                    )
            except sqlite3.DatabaseError as error:
                if time.monotonic() > deadline or not isinstance(error, sqlite3.OperationalError):
                    raise UserError(
                        f"the journal {self._path} cannot be written ({error}), so no step can be decided; checkpoints "
                        "are whole: free space or mend the disk, and the same command goes on from the newest one"
                    ) from None
                if not is_told:
                    log.error("%s cannot be written, training waits for it: %s", self._path, error)
                is_told = True
                time.sleep(1.0)

    def last(self, kind: str) -> dict[str, Any] | None:
        """Return the newest decision of a kind, or None."""
        rows = self.read(kind, limit=1)
        return rows[0] if rows else None

    def read(self, kind: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Return up to `limit` decisions, newest first.

        Args:
            kind: of the decisions; None for all kinds.
            limit: how many at most.
        """
        where, values = ("WHERE kind = ?", (kind,)) if kind else ("", ())
        rows = self._db.execute(
            f"SELECT id, time, generation, step, kind, body FROM decisions {where} ORDER BY id DESC LIMIT ?",
            (*values, limit),
        )
        return [
            {"id": i, "time": t, "generation": generation, "step": step, "kind": name, **json.loads(body)}
            for i, t, generation, step, name, body in rows
        ]

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def set_aside_if_damaged(path: Path) -> Path | None:
    """Keep a journal that cannot be read under another name, so that a run can begin a new one.

    A run goes on from its checkpoints; the journal serves schedulers that take over from one another.

    Returns:
        the name it is kept under; None when it is whole or not there.
    """
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=10.0)) as db:
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if found == "ok":
                return None
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    return aside
