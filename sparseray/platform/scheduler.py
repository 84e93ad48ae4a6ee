"""The scheduler: one named actor that alone decides, and writes every decision to its journal first.

It runs the training loop in a thread of its own and answers questions about it; its words to the
slots go through its mailbox, never through Ray. It belongs to no driver, and Ray restarts it when it
dies: the new one reads the journal, finds the slots by name and goes on in the next generation.
"""

import json
import os
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import ray

from sparseray.actors.installation import JobSpec
from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.codec import from_plain
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.errors import FencedError, UserError
from sparseray.log import get_logger
from sparseray.model.counts import count_parameters
from sparseray.model.dse_layout import DSELayout
from sparseray.platform.config import RunConfig, from_dict, to_dict
from sparseray.platform.fleet.control import Control, Member
from sparseray.platform.fleet.ray_fleet import RayFleet
from sparseray.platform.fleet.transport import ZmqTransport, private_directory, remove_directory
from sparseray.platform.generations import Elastic
from sparseray.platform.metrics.exporter import Metrics, write_targets
from sparseray.platform.planning.replan import num_slots, piece_bytes
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.journal import Journal
from sparseray.platform.run.ledger import Ledger
from sparseray.platform.run.registry import forget_run, register_run
from sparseray.platform.training import Trainer

log = get_logger(__name__)

KEPT_RECORDS = 5000
DRIVER_GONE_S = 60.0


class Scheduler:
    """Decides for one job.

    Args:
        job: identifier of the job.
        config: the run, as plain values; `run_dir` and `data.path` absolute.
        placement: what there is to place, for `make_plan`.
        bytes_per_token, validation_batches: of the validation split.
    """

    def __init__(
        self,
        *,
        job: str,
        config: dict[str, Any],
        placement: dict[str, Any],
        bytes_per_token: float,
        validation_batches: int,
    ) -> None:
        self._job_id, self._config = job, from_dict(RunConfig, config)
        self._placement = placement
        self._numbers = {"bytes_per_token": bytes_per_token, "validation_batches": validation_batches}
        self._folder = RunFolder(Path(self._config.run_dir))
        self._epoch = f"{os.getpid()}-{time.time()}"
        self._records: deque[dict[str, Any]] = deque(maxlen=KEPT_RECORDS)
        self._told = 0
        self._stopping, self._released, self._closed = (threading.Event() for _ in range(3))
        self._failure: dict[str, Any] | None = None
        self._asked = time.monotonic()
        self._fleet: RayFleet | None = None
        self._elastic: Elastic | None = None
        self._ledger: Ledger | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="training")
        journal = Journal(self._folder.journal)
        begun = journal.last("begin")
        journal.close()
        if begun is not None and begun["job"] == job:
            self._thread.start()

    def start(self) -> None:
        """Start training; without effect once it runs."""
        if not self._thread.is_alive() and self._thread.ident is None:
            self._thread.start()

    # -- the training thread ---------------------------------------------------------------------

    def _run(self) -> None:
        journal = Journal(self._folder.journal)
        try:
            journal.lead()
            self._train(journal)
        except FencedError as error:
            # Slots, targets and sockets are the other scheduler's now.
            log.error("this scheduler acts no more: %s", error)
            journal.close()
            os._exit(1)
        except Exception as error:
            log.error("training stopped:\n%s", traceback.format_exc())
            self._failure = {
                "error": str(error),
                "kind": type(error).__name__,
                "user": isinstance(error, UserError),
            }
        finally:
            journal.close()
            write_targets(self._folder.targets, {}, self._folder.path.name)
            threading.Thread(target=self._end, daemon=True, name="end").start()

    def _train(self, journal: Journal) -> None:
        config, cluster = self._config, self._config.cluster
        metrics = Metrics({"slot": "scheduler"}, declare="scheduler")
        own = metrics.serve(cluster.bind_host)
        directory = private_directory(self._job_id) if cluster.transport == "ipc" else None
        mailbox = Mailbox(ZmqTransport("scheduler", directory, cluster.bind_host), SCHEDULER, self._job_id)
        layout = DSELayout.load(self._folder.identity) if config.model.dse.layers else None
        spec = JobSpec(
            config=json.dumps(to_dict(config)),
            layout=str(self._folder.identity) if layout else "",
            layout_sha256=self._folder.layout_sha256(),
        )

        def show_targets(members: dict[int, Member]) -> None:
            targets = {f"slot-{slot}": member.metrics for slot, member in members.items()}
            write_targets(self._folder.targets, targets | {"scheduler": own}, self._folder.path.name)

        used = [entry["slot"] for entry in self._of_job(journal, "slot")]
        counter = max(used, default=-1)

        def next_slot() -> int:
            nonlocal counter
            counter += 1
            journal.append("slot", generation=0, step=0, slot=counter, job=self._job_id)
            return counter

        fleet = self._fleet = RayFleet(self._job_id, cluster, spec, next_slot, show_targets, journal.leads)
        control = Control(mailbox, fleet, cluster.deadline_s)
        ledger = self._ledger = Ledger(metrics)
        rows = [] if layout is None else [layout.num_rows(layer) for layer in config.model.dse.layers]
        elastic = self._elastic = Elastic(
            config,
            control,
            journal,
            self._folder,
            metrics,
            ledger,
            placement=self._placement,
            size=piece_bytes(config.model, rows, count_parameters(config.model)["dense"]),
            job=spec,
            on_event=self._tell,
        )
        fleet.is_spare = elastic.is_spare
        trainer = Trainer(
            config,
            control,
            elastic,
            journal,
            self._folder,
            metrics,
            ledger,
            bytes_per_token=float(self._numbers["bytes_per_token"]),
            validation_batches=int(self._numbers["validation_batches"]),
            on_record=self._tell,
            should_stop=self._stopping.is_set,
        )
        try:
            self._begin_or_take_over(journal, fleet, trainer, used)
            trainer.run()
            elastic.finish(trainer.step)
        finally:
            mailbox.transport.close()

    def _of_job(self, journal: Journal, kind: str, limit: int = 1 << 30) -> list[dict[str, Any]]:
        """Decisions of a kind since this job began, newest first."""
        begun = journal.last("begin")
        if begun is None or begun["job"] != self._job_id:
            return []
        return [entry for entry in journal.read(kind, limit=limit) if entry["id"] > begun["id"]]

    def _begin_or_take_over(
        self, journal: Journal, fleet: RayFleet, trainer: Trainer, used: list[int]
    ) -> None:
        register_run(self._folder.path, ray.get_runtime_context().gcs_address)
        active = self._of_job(journal, "active", limit=1)
        plans = {entry["generation"]: entry["plan"] for entry in self._of_job(journal, "plan")}
        trainer.elastic.generation = max(plans, default=0)
        fleet.reopen(used)
        if not active:
            if not used:
                journal.append("begin", generation=0, step=0, job=self._job_id)
            p, c = self._placement, self._config.cluster
            count = num_slots(p["attention"], p["experts"], p["memory"], colocated=c.colocated)
            fleet.open(count + c.standby - len(fleet.members()))
            trainer.start()
            return
        plan = from_plain(Plan, plans[active[0]["generation"]])
        newest = [entry for kind in ("commit", "restore") for entry in self._of_job(journal, kind, limit=1)]
        last = max([*newest, *active], key=lambda entry: entry["id"])
        commit = None
        if last["kind"] == "commit":
            commit = last
        elif newest and newest[0]["kind"] == "commit" and newest[0]["step"] == last["step"]:
            commit = newest[0]
        trainer.take_over(plan, commit, last["step"])

    def _tell(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self._told += 1

    def _end(self) -> None:
        """Leave nothing behind, whether or not a driver is there to see the end."""
        while not self._released.wait(1.0):
            if time.monotonic() - self._asked > DRIVER_GONE_S:
                break
        if self._fleet is not None:
            self._fleet.close()
        forget_run(self._folder.path)
        remove_directory(self._job_id)
        self._closed.set()

    # -- questions -----------------------------------------------------------------------------

    def progress(self, after: int, epoch: str = "", wait_s: float = 0.5) -> dict[str, Any]:
        """Return the records after the first `after` ones of `epoch`, waiting a little for new ones.

        Returns:
            {"epoch", "seen", "records": [...], "done": bool, "failure": None or {"error", "kind", "user"}}
        """
        self._asked = time.monotonic()
        after = after if epoch == self._epoch else 0
        deadline = self._asked + wait_s
        while self._told <= after and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        done = not self._thread.is_alive()
        told, kept = self._told, list(self._records)
        new = kept[max(0, len(kept) - (told - after)) :] if told > after else []
        return {
            "epoch": self._epoch,
            "seen": told,
            "records": new,
            "done": done,
            "failure": self._failure,
        }

    def stop(self) -> None:
        """Stop after the current step, with a checkpoint."""
        self._stopping.set()

    def release(self, wait_s: float = 10.0) -> bool:
        """End all slots; True once that is done. Called by the driver that has seen the end."""
        self._released.set()
        return self._closed.wait(wait_s)

    def job(self) -> str:
        """Identifier of the job, part of its slots' names."""
        return self._job_id

    def pid(self) -> int:
        """Process id of this scheduler."""
        return os.getpid()

    def scale(self, role: str, count: int) -> dict[str, Any]:
        """Ask for another number of slots of a role.

        Returns:
            {"error": ""} or why it is refused; nothing is changed then.
        """
        if self._elastic is None or self._elastic.plan is None or not self._thread.is_alive():
            return {"error": "the job is not training (yet); ask again once it has made a step"}
        try:
            self._elastic.request(role, count)
        except UserError as error:
            return {"error": str(error)}
        return {"error": ""}

    def status(self) -> dict[str, Any]:
        """What there is to see: plan, roles, replicas, slots, last events, last steps."""
        found: dict[str, Any] = {
            "run_dir": str(self._folder.path),
            "state": self._state(),
            "steps": self._config.train.steps,
            "records": [r for r in list(self._records)[-400:] if "loss" in r][-50:],
            "events": self._folder.event_lines()[-12:],
        }
        elastic, fleet = self._elastic, self._fleet
        if elastic is None or fleet is None or elastic.plan is None:
            return found
        plan, ages = elastic.plan, fleet.ages()
        found |= {
            "generation": plan.generation,
            "settled": elastic.is_settled(),
            "sizes": elastic.sizes(),
            "wanted": vars(elastic.wanted),
            "starting": fleet.starting(),
            "room": fleet.room(),
            "replicas": {"target": self._config.cluster.replication, "actual": elastic.replicas()},
            "goodput": self._ledger.goodput if self._ledger else 1.0,
            "load": elastic.load.tolist(),
            "slots": [
                {
                    "slot": slot,
                    "pid": member.pid,
                    "node": member.node,
                    "roles": plan.roles_of(slot) if slot in plan.addresses else ["standby"],
                    "shards": plan.parts_of(slot),
                    "experts": len(plan.experts_of(slot)),
                    "buckets": len(plan.buckets_of(slot)),
                    "heartbeat_age_s": ages.get(slot, 0.0),
                }
                for slot, member in sorted(fleet.members().items())
            ],
        }
        return found

    def _state(self) -> str:
        if self._failure is not None:
            return f"failed: {self._failure['error']}"
        if self._thread.is_alive():
            return "stopping" if self._stopping.is_set() else "training"
        return "ended" if self._thread.ident else "starting"
