"""The composition root of a job: every part of its control side, made once and put together here.

The scheduler opens a run with slots that are Ray actors, tests open one with threads; from here on they are
the same, and so are training and serving. A journal that knows the job already makes this a takeover from a
scheduler that died.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparseray.actors.installation import JobSpec
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.model.counts import count_parameters
from sparseray.model.dse_layout import DSELayout
from sparseray.platform.config import RunConfig, to_dict
from sparseray.platform.fleet.control import Control, Fleet
from sparseray.platform.generations import Generations
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.offers import Offers
from sparseray.platform.opening import Validation
from sparseray.platform.planning.moves import piece_bytes
from sparseray.platform.reconciler import Reconciler
from sparseray.platform.run.events import Events
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.history import JobHistory, read_job
from sparseray.platform.run.journal import Journal
from sparseray.platform.run.ledger import Ledger
from sparseray.platform.run.machines import Machines
from sparseray.platform.server import Server
from sparseray.platform.serving import Served, Serving
from sparseray.platform.trainer import Trainer
from sparseray.platform.training import Training

FleetOf = Callable[[Journal, JobHistory, JobSpec], Fleet]
"""Makes the fleet of a run: from its journal, what that knows of the job, and what slots build."""
Task = Validation | Served
"""What a job is for: training, with a way to validate, or serving."""


class Driver(Protocol):
    """Drives a workload: `Trainer` its steps, `Server` its time."""

    @property
    def step(self) -> int:
        """The last committed step, or the version of the weights that are served."""
        ...

    def start(self) -> None:
        """Give every slot its roles and its state."""

    def take_over(self, history: JobHistory) -> None:
        """Go on where a scheduler that died had stopped."""

    def run(self) -> None:
        """Go on to the end."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A job that is open: what decides, what is decided about, and where it is written.

    Args:
        history: of the job, as it was when this was opened.
        folder: where results go.
        generations, reconciler: who holds what, and what is wanted.
        driver: of the workload.
    """

    history: JobHistory
    folder: RunFolder
    generations: Generations
    reconciler: Reconciler
    driver: Driver

    @staticmethod
    def open(
        config: RunConfig,
        mailbox: Mailbox,
        fleet_of: FleetOf,
        metrics: Metrics,
        *,
        task: Task,
        on_record: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
        offers: Callable[[], Offers | None] = lambda: None,
    ) -> "Run":
        """Lead the job's journal and put everything together; nothing is sent yet.

        Args:
            config: of the run, with what follows from its data; its folder is there already.
            mailbox: the scheduler's; it names the job.
            fleet_of: makes the slots' fleet.
            metrics: of the scheduler.
            task: what the job is for.
            on_record: told of every step, validation, checkpoint and event.
            should_stop: asked between two steps.
            offers: on the same platform, of the run that a server follows, or of a server that follows the run.
        """
        folder = RunFolder(Path(config.run_dir))
        journal, history = _lead(folder, mailbox.job)
        identity = folder.identity if isinstance(task, Validation) else task.identity_folder
        layout = DSELayout.load(identity) if config.model.dse.layers else None
        spec = _spec(config, identity, layout, is_serving=isinstance(task, Served))
        fleet, ledger = fleet_of(journal, history, spec), Ledger(metrics)
        rows = [] if layout is None else [layout.num_rows(layer) for layer in config.model.dse.layers]
        workload = _workload(config, spec, folder, journal, task, mailbox, offers)
        generations = Generations(
            config.cluster,
            Control(mailbox, fleet, config.cluster.deadline_s),
            journal,
            Events(folder, metrics, config.cluster.replication, on_record),
            workload,
            history=history,
            size=piece_bytes(
                config.model, rows, count_parameters(config.model)["dense"], config.optim.moments
            ),
        )
        reconciler = Reconciler(generations, ledger, Machines(folder.machines), history)
        driver: Driver
        if isinstance(workload, Training):
            assert isinstance(task, Validation)
            driver = Trainer(
                config,
                workload,
                generations,
                reconciler,
                validation=task,
                on_record=on_record,
                should_stop=should_stop,
            )
        else:
            driver = Server(config, workload, generations, reconciler, should_stop=should_stop)
        return Run(
            history=history, folder=folder, generations=generations, reconciler=reconciler, driver=driver
        )

    def drive(self) -> None:
        """Begin, or go on for a scheduler that died, to the last step or until asked to stop."""
        if self.history.plan is None:
            self.driver.start()
        else:
            self.driver.take_over(self.history)
        self.driver.run()
        self.reconciler.finish(self.driver.step)

    def close(self) -> None:
        """Close journal and mailbox; slots are the fleet's."""
        self.generations.journal.close()
        self.generations.control.mailbox.transport.close()


def _spec(config: RunConfig, identity: Path, layout: DSELayout | None, *, is_serving: bool) -> JobSpec:
    return JobSpec(
        config=json.dumps(to_dict(config)),
        layout=str(identity) if layout else "",
        layout_sha256=layout.sha256 if layout else "",
        serving=is_serving,
        tokenizer=str(identity / "tokenizer.json"),
    )


def _lead(folder: RunFolder, job: str) -> tuple[Journal, JobHistory]:
    """Take the lead of a run's journal, and read what it knows of the job."""
    journal = Journal(folder.journal)
    journal.lead()
    history = read_job(journal, job)
    if not history.has_begun:
        journal.append("begin", generation=0, step=0, job=job)
    return journal, history


def _workload(
    config: RunConfig,
    spec: JobSpec,
    folder: RunFolder,
    journal: Journal,
    task: Task,
    mailbox: Mailbox,
    offers: Callable[[], Offers | None],
) -> Training | Serving:
    if isinstance(task, Validation):
        return Training(config, spec, folder, journal, offers)
    return Serving(config, spec, task, mailbox, journal, offers)
