"""Acts on the policy of lending (planning/lending.py): looks at jobs and pool, and changes what training runs want.

The rest follows from that wish, by the lines of every resize: the run gives its slots back between two steps, the pool
hands them to the leases that wait, and when they come back free the run's own wish starts them again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparseray.errors import FencedError, UserError
from sparseray.log import get_logger
from sparseray.platform.fleet.lease import Kind
from sparseray.platform.fleet.pool import Pool
from sparseray.platform.fleet.pool_actor import kind_of
from sparseray.platform.job import Job
from sparseray.platform.planning.lending import Loan, View, decide, to_spare

log = get_logger(__name__)


@dataclass
class Loans:
    """The loans of a platform.

    Args:
        pool: of its slots.
    """

    pool: Pool

    def __post_init__(self) -> None:
        self._idle_since: dict[Kind, float] = {}

    def turn(self, jobs: Sequence[Job]) -> None:
        """Decide on at most one loan or return of each kind of slot, and begin it."""
        running = {job.job: job for job in jobs if job.is_running}
        lenders = [(job, found) for job in running.values() if (found := job.lender()) is not None]
        # What comes back stays warm until the run has it again.
        self.pool.owed = sum(
            max(0, lender.lent.slots(colocated=lender.colocated) + job.lacking()) for job, lender in lenders
        )
        now = time.monotonic()
        for kind in {kind_of(job.config.cluster) for job, _ in lenders}:
            own = tuple(lender for job, lender in lenders if kind_of(job.config.cluster) == kind)
            wanted = sum(max(0, job.lacking()) for job in running.values() if job.is_serving)
            missing, room = min(wanted, self.pool.lacking(kind)), self.pool.room(kind)
            if missing or not room:
                self._idle_since.pop(kind, None)
            idle_s = now - self._idle_since.setdefault(kind, now) if room and not missing else 0.0
            return_s = min(running[lender.job].config.cluster.lend_return_s for lender in own)
            loan = decide(View(lenders=own, lacking=missing, room=room, idle_s=idle_s), return_s)
            if loan is not None:
                self._begin(running[loan.job], loan, missing, idle_s)
                self._idle_since.pop(kind, None)

    def _begin(self, job: Job, loan: Loan, missing: int, idle_s: float) -> None:
        slots = f"{abs(loan.count)} slot{'s' if abs(loan.count) > 1 else ''}"
        why = (
            f"{slots} to serving, which lacks {missing}"
            if loan.count > 0
            else f"{slots} by serving, idle for {idle_s:.0f} s"
        )
        try:
            job.lend(loan, why)
        except (UserError, FencedError) as error:
            log.warning("a loan of %s cannot be decided: %s", job.folder.path, error)

    def to_borrow(self, jobs: Sequence[Job], kind: Kind) -> int:
        """Slots that training runs would lend a server.

        Args:
            jobs: of the platform.
            kind: of slot.
        """
        found = [job.lender() for job in jobs if job.is_running and kind_of(job.config.cluster) == kind]
        return sum(len(to_spare(lender)) for lender in found if lender is not None)
