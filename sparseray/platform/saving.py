"""The checkpoints of a training run: when one is due, which slots still write, and when it counts.

Slots that compute in slabs write beside the next steps (actors/training/background_save.py). A change of plan cuts that off, as
pieces lie elsewhere then, and waits for nothing: what is there by then never counts, and another checkpoint is made as soon as no
slot has the old one in its memory any more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.codec import to_plain
from sparseray.actors.wire.envelope import Message
from sparseray.actors.wire.messages import SaveCheckpoint, Saved, SavedTensor, StillWriting
from sparseray.errors import UserError
from sparseray.platform.config import RunConfig, to_dict
from sparseray.platform.device import saves_beside
from sparseray.platform.generations import Generations
from sparseray.platform.installing import disk_seconds
from sparseray.platform.metrics.training import StepMetrics
from sparseray.platform.run import checkpoint
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.ledger import Ledger
from sparseray.platform.spikes import rollback_target


@dataclass
class Saving:
    """A checkpoint that slots are writing.

    Args:
        step: that it is of.
        generation: whose slots write it.
        folder: unfinished.
        waiting: slots that have not answered.
        tensors: what those that have wrote.
        started: when it began.
    """

    step: int
    generation: int
    folder: Path
    waiting: set[int]
    tensors: dict[str, SavedTensor] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def take(self, message: Message[Saved]) -> bool:
        """Add an answer; True once all are in.

        Raises:
            UserError: a slot could not write.
        """
        if message.step != self.step + 1:
            return False  # Of a checkpoint that was given up.
        if message.body.error:
            raise UserError(message.body.error)
        self.tensors |= message.body.tensors
        self.waiting.discard(message.source)
        return not self.waiting


class Checkpoints:
    """Has slots write checkpoints, one at a time.

    Args:
        config: the run.
        generations: who holds what.
        folder: of the run.
        ledger: where the time goes.
        metrics: of steps and checkpoints.
        on_record: told of every checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        generations: Generations,
        folder: RunFolder,
        ledger: Ledger,
        metrics: StepMetrics,
        on_record: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.generations, self.control = config, generations, generations.control
        self.folder, self.ledger, self.metrics, self.on_record = folder, ledger, metrics, on_record
        self._saving: Saving | None = None
        self._is_wanted = False
        self._busy_at = -1
        """The last step in which a slot had one in its memory that was given up."""

    def take_over(self, step: int, begin: int) -> None:
        """Want the one that fell due last if a scheduler that died has left none: it may have been under way.

        Args:
            step: the last committed one.
            begin: that the run goes on from.
        """
        every, newest = self.config.train.checkpoint_every, self.folder.newest_checkpoint()
        last = step - step % every if every else 0
        self._is_wanted = last > (checkpoint.step_of(newest) if newest else begin)

    def is_due(self, step: int) -> bool:
        """Whether one is to be made of a step that was committed: on schedule, or in the place of one that was cut off."""
        every = self.config.train.checkpoint_every
        self._is_wanted = self._is_wanted or (every > 0 and step % every == 0)
        return self._is_wanted

    def save(self, step: int, *, is_last: bool) -> None:
        """Write a checkpoint of the committed step; training goes on from memory where that fails, and tells of it.

        Where a slot would have to wait for memory it is the turn of a later step.

        Args:
            step: the committed one.
            is_last: nothing comes after it.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        # Slots that compute in slabs write copies beside the next steps; the last checkpoint is waited for.
        # What a spike goes back to must not depend on how fast a disk is.
        can_wait = self.config.train.spike != "rollback" and not is_last
        in_background = can_wait and saves_beside(self.config)
        # The first step of a generation tells whether slots still write what a change of plan has cut off.
        self._is_wanted = in_background and (self.generations.since_change == 0 or self._busy_at == step)
        if self._is_wanted:
            return
        if in_background and self._saving is not None:
            text = f"the checkpoint of step {self._saving.step} is still being written"
            self.generations.tell("unsaved", step, f"no checkpoint of step {step}: {text}")
            return
        try:
            with self.ledger.state("checkpointing"):
                saving = self._begin(step, in_background=in_background)
                if not in_background:
                    size = self.generations.size
                    limit_s = self.control.deadline_s + 60 + disk_seconds(self._plan, size)
                    for message in self.control.messages(Saved, deadline_s=limit_s):
                        if saving.take(message):
                            break
                    self._finish(saving)
        except (OSError, UserError) as error:
            text = self._unsaved(error, step)
            if is_last:
                raise UserError(
                    f"{text}; free space or mend {self.folder.checkpoints}, and the same command goes on from the "
                    "newest checkpoint there"
                ) from None

    def hear(self, message: Message[Any]) -> None:
        """Take note of what a slot says, `Saved` or `StillWriting`, of one that is written beside the steps."""
        saving = self._saving
        if isinstance(message.body, StillWriting):
            self._busy_at = message.step
            return
        try:
            if saving is not None and saving.take(message):
                self._saving = None
                self._finish(saving)
        except (OSError, UserError) as error:
            self._saving = None
            self._unsaved(error, message.step - 1)

    def cut_off(self, step: int) -> None:
        """Take note of a change of plan: what slots were writing is given up, and wanted again.

        Args:
            step: that the slots hold now.
        """
        saving = self._saving
        if saving is None or saving.generation == self.generations.generation:
            return
        self._saving = None
        self._is_wanted = saving.step <= step
        checkpoint.set_aside(saving.folder)
        text = f"a change of plan cut off the checkpoint of step {saving.step}"
        self.generations.tell("postponed", step, f"{text}; another one is made once its files are closed")

    @property
    def _plan(self) -> Plan:
        assert self.generations.plan is not None
        return self.generations.plan

    def _unsaved(self, error: Exception, step: int) -> str:
        """Tell that there is no checkpoint of a step, and return that."""
        checkpoint.give_up(self.folder.checkpoints, step)
        text = f"no checkpoint of step {step}: {' '.join(str(error).split())}"
        self.generations.tell("unsaved", step, text)
        return text

    def _begin(self, step: int, *, in_background: bool) -> Saving:
        """Have every slot write what is primary there."""
        unfinished = checkpoint.begin(self.folder.checkpoints, step)
        self.folder.copy_identity(unfinished)
        plan = self._plan
        slots = {plan.dense[0], *plan.expert_primaries, *plan.memory_primaries}
        saving = Saving(step=step, generation=plan.generation, folder=unfinished, waiting=slots)
        self._saving = saving if in_background else None
        # As a part of the open step, so that a slot that has not applied the last commit yet keeps it back.
        body = SaveCheckpoint(directory=str(unfinished), in_background=in_background)
        self.control.post(sorted(slots), body, step=step + 1)
        return saving

    def _finish(self, saving: Saving) -> None:
        """Give a checkpoint its manifest and its final name: from now on it counts."""
        tensors = {name: to_plain(entry) for name, entry in saving.tensors.items()}
        files = {entry["file"] for entry in tensors.values()}
        identity = sorted(path.name for path in self.folder.identity.iterdir())
        files |= {*identity}
        sizes = {name: (saving.folder / name).stat().st_size for name in sorted(files)}
        manifest = {
            "format": checkpoint.FORMAT,
            "step": saving.step,
            "digest": checkpoint.digest(tensors),
            "config": to_dict(self.config),
            "dse_layout_sha256": self.folder.layout_sha256(),
            "files": sizes,
            "identity": {name: checkpoint.file_sha256(saving.folder / name) for name in identity},
            "tensors": dict(sorted(tensors.items())),
        }
        final = checkpoint.finish(saving.folder, manifest)
        self.generations.journal.append(
            "checkpoint", generation=saving.generation, step=saving.step, digest=manifest["digest"]
        )
        target = rollback_target(self.folder.checkpoints, self.config.train, saving.step + 1)
        checkpoint.prune(self.folder.checkpoints, self.config.train.keep_checkpoints, target)
        seconds = time.perf_counter() - saving.started
        self.metrics.checkpoint(seconds, sum(sizes.values()))
        record = {"step": saving.step, "checkpoint": str(final), "digest": manifest["digest"]}
        self.on_record({**record, "seconds": seconds})
