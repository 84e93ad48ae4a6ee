"""What a scheduler tells those who follow its job: the records so far, and how it ended."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job stopped.

    Args:
        error: for people.
        kind: class of the exception.
        user: whether it is a user's mistake.
    """

    error: str
    kind: str
    user: bool


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Records that a follower lacks.

    Args:
        epoch: of the scheduler; another one counts records from 0 again.
        seen: records that there are, those that the follower has included.
        records: the new ones, oldest first; the oldest of many may be gone.
        done: whether the job has ended.
        failure: why, unless it ended well.
    """

    epoch: str
    seen: int
    records: list[dict[str, Any]]
    done: bool
    failure: Failure | None
