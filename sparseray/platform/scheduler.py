"""The scheduler: one named actor that alone decides, and writes every decision to its journal first.

It runs the training loop in a thread of its own and answers questions about it; its words to the
slots go through its mailbox, never through Ray.
"""

import threading
import time
import traceback
from pathlib import Path
from typing import Any

from sparseray.actors.assignment import Plan
from sparseray.actors.mailbox import Mailbox
from sparseray.actors.messages import SCHEDULER
from sparseray.errors import UserError
from sparseray.log import get_logger
from sparseray.platform.config import RunConfig, from_dict
from sparseray.platform.journal import Journal
from sparseray.platform.metrics import Metrics, write_targets
from sparseray.platform.run_folder import RunFolder
from sparseray.platform.training import Trainer
from sparseray.platform.transport import ZmqTransport, private_directory

log = get_logger(__name__)


class Scheduler:
    """Decides for one job.

    Args:
        job: identifier of the job.
        transport, bind_host: as for a slot.
        config: the run, as plain values.
        plan: placement to start with, as plain values.
        bytes_per_token, validation_batches: of the validation split.
        metric_targets: addresses of the slots' metrics.
    """

    def __init__(
        self,
        *,
        job: str,
        transport: str,
        bind_host: str,
        config: dict[str, Any],
        plan: dict[str, Any],
        bytes_per_token: float,
        validation_batches: int,
        metric_targets: dict[str, str],
    ) -> None:
        self._config = from_dict(RunConfig, config)
        self._plan = Plan.from_dict(plan)
        self._folder = RunFolder(Path(self._config.run_dir))
        self._metrics = Metrics({"slot": "scheduler"}, declare="scheduler")
        targets = metric_targets | {"scheduler": self._metrics.serve(bind_host)}
        write_targets(self._folder.targets, targets, self._folder.path.name)
        directory = private_directory(job) if transport == "ipc" else None
        self._mailbox = Mailbox(ZmqTransport("scheduler", directory, bind_host), SCHEDULER, job)
        self._records: list[dict[str, Any]] = []
        self._stopping = threading.Event()
        self._failure: dict[str, Any] | None = None
        self._numbers = {"bytes_per_token": bytes_per_token, "validation_batches": validation_batches}
        self._thread = threading.Thread(target=self._run, daemon=True, name="training")

    def start(self) -> None:
        """Start training."""
        self._thread.start()

    def _run(self) -> None:
        journal = Journal(self._folder.journal)
        try:
            has_memory = (self._folder.identity / "dse_layout.json").exists()
            Trainer(
                self._config,
                self._plan,
                self._mailbox,
                journal,
                self._folder,
                self._metrics,
                layout=str(self._folder.identity) if has_memory else "",
                bytes_per_token=float(self._numbers["bytes_per_token"]),
                validation_batches=int(self._numbers["validation_batches"]),
                on_record=self._records.append,
                should_stop=self._stopping.is_set,
            ).run()
        except Exception as error:
            log.error("training stopped:\n%s", traceback.format_exc())
            self._failure = {
                "error": str(error),
                "kind": type(error).__name__,
                "user": isinstance(error, UserError),
            }
        finally:
            journal.close()

    def progress(self, after: int, wait_s: float = 0.5) -> dict[str, Any]:
        """Return the records after the first `after` ones, waiting a little for new ones.

        Returns:
            {"records": [...], "done": bool, "failure": None or {"error", "kind", "user"}}
        """
        deadline = time.monotonic() + wait_s
        while len(self._records) <= after and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        done = not self._thread.is_alive()
        return {"records": self._records[after:], "done": done, "failure": self._failure}

    def stop(self) -> None:
        """Stop after the current step, with a checkpoint."""
        self._stopping.set()

    def status(self) -> dict[str, Any]:
        """Plan, roles and last decisions, for people."""
        roles = {slot: self._plan.roles_of(slot) for slot in self._plan.addresses}
        return {"generation": self._plan.generation, "roles": roles, "run_dir": str(self._folder.path)}
