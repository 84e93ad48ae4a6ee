"""The composition root of a run: every part of its control side, made once and put together here.

The scheduler opens a run with slots that are Ray actors, tests open one with threads; from here on they are
the same. A journal that knows the job already makes this a takeover from a scheduler that died.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseray.actors.installation import JobSpec
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.model.counts import count_parameters
from sparseray.model.dse_layout import DSELayout
from sparseray.platform.config import RunConfig, to_dict
from sparseray.platform.fleet.control import Control, Fleet
from sparseray.platform.generations import Elastic
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.opening import Validation, training_inventory
from sparseray.platform.planning.moves import piece_bytes
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.history import JobHistory, read_job
from sparseray.platform.run.journal import Journal
from sparseray.platform.run.ledger import Ledger
from sparseray.platform.training import Trainer

FleetOf = Callable[[Journal, JobHistory, JobSpec], Fleet]
"""Makes the fleet of a run: from its journal, what that knows of the job, and what slots build."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is open: what decides, what is decided about, and where it is written.

    Args:
        history: of the job, as it was when this was opened.
        journal, folder, ledger: where decisions, results and time go.
        fleet: the slots.
        elastic: who holds what.
        trainer: drives the steps.
    """

    history: JobHistory
    journal: Journal
    folder: RunFolder
    ledger: Ledger
    fleet: Fleet
    elastic: Elastic
    trainer: Trainer

    @staticmethod
    def open(
        config: RunConfig,
        mailbox: Mailbox,
        fleet_of: FleetOf,
        metrics: Metrics,
        *,
        validation: Validation,
        on_record: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> "Run":
        """Lead the run's journal and put everything together; nothing is sent yet.

        Args:
            config: of the run, with what follows from its data; its folder is written already.
            mailbox: the scheduler's; it names the job.
            fleet_of: makes the slots' fleet.
            metrics: of the scheduler.
            validation: how the validation loss is measured.
            on_record: told of every step, validation, checkpoint and event.
            should_stop: asked between two steps.
        """
        folder = RunFolder(Path(config.run_dir))
        journal = Journal(folder.journal)
        journal.lead()
        history = read_job(journal, mailbox.job)
        if not history.has_begun:
            journal.append("begin", generation=0, step=0, job=mailbox.job)
        layout = DSELayout.load(folder.identity) if config.model.dse.layers else None
        job = JobSpec(
            config=json.dumps(to_dict(config)),
            layout=str(folder.identity) if layout else "",
            layout_sha256=folder.layout_sha256(),
        )
        fleet = fleet_of(journal, history, job)
        control = Control(mailbox, fleet, config.cluster.deadline_s)
        ledger = Ledger(metrics)
        rows = [] if layout is None else [layout.num_rows(layer) for layer in config.model.dse.layers]
        elastic = Elastic(
            config,
            control,
            journal,
            folder,
            metrics,
            ledger,
            inventory=training_inventory(config),
            history=history,
            size=piece_bytes(config.model, rows, count_parameters(config.model)["dense"]),
            job=job,
            on_event=on_record,
        )
        trainer = Trainer(
            config,
            control,
            elastic,
            journal,
            folder,
            metrics,
            ledger,
            validation=validation,
            on_record=on_record,
            should_stop=should_stop,
        )
        return Run(
            history=history,
            journal=journal,
            folder=folder,
            ledger=ledger,
            fleet=fleet,
            elastic=elastic,
            trainer=trainer,
        )

    def train(self) -> None:
        """Begin, or go on for a scheduler that died, and train until the last step or until asked to stop."""
        if self.history.plan is None:
            self.trainer.start()
        else:
            self.trainer.take_over(self.history)
        self.trainer.run()
        self.elastic.finish(self.trainer.step)

    def close(self) -> None:
        """Close journal and mailbox; slots are the fleet's."""
        self.journal.close()
        self.elastic.control.mailbox.transport.close()
