"""The `pretrain` command: checks everything, starts slots and a scheduler, and follows the run.

Nothing is written and nothing is started before configuration, data and run folder have been
checked. The same command goes on from the newest checkpoint of its run folder.
"""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sparseray.errors import ConfigError, RunFailedError, SchedulerLostError, UserError
from sparseray.jobs.output import print_line
from sparseray.jobs.signals import stops_noted
from sparseray.platform import config as configuration
from sparseray.platform.config import RunConfig
from sparseray.platform.fleet.forked_workers import ForkedWorkers, forked_workers
from sparseray.platform.run import lock
from sparseray.platform.run.progress import Failure, Progress
from sparseray.platform.run.registry import adopt_platform

if TYPE_CHECKING:
    from sparseray.actors.training.token_data import TokenDataset
    from sparseray.platform.run.folder import RunFolder

DESCRIPTION = """Pretrain a sparse model on Ray actors.

example:
  python -m sparseray data prepare --source stdlib --out data/stdlib
  python -m sparseray pretrain --config configs/tiny.yaml --data.path data/stdlib --train.steps 100 \\
      --cluster.attention_workers 2 --cluster.expert_shards 2 --cluster.memory_shards 2 --run_dir runs/first
"""

Show = Callable[[str], None]
Beside = Callable[[Any], AbstractContextManager[None]]
SCHEDULER_DEADLINE_S = 60.0
LOCK_S = 3.0
"""How long the processes of a command that was killed may take to notice."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 when the last step is reached, 130 after Ctrl-C, 2 for a user's mistake, 1 if it failed."""
    try:
        config = configuration.parse(arguments, prog="sparseray pretrain", description=DESCRIPTION)
        return run(config, print_line)
    except UserError as error:
        return configuration.die(error)
    except RunFailedError as error:
        configuration.die(error)
        return 1


def run(config: RunConfig, show: Show, beside: Beside = nullcontext) -> int:
    """Train until the last step or Ctrl-C.

    Args:
        config: the run.
        show: shows a line to a person.
        beside: takes the scheduler and gives what is entered while the run is followed.

    Raises:
        UserError: something in the configuration, data, folder or cluster does not fit; nothing is lost.
    """
    with forked_workers(config.cluster) as workers:
        return _run(config, show, beside, workers)


def _run(config: RunConfig, show: Show, beside: Beside, workers: ForkedWorkers | None) -> int:
    from sparseray.platform.opening import open_training, slots_of, training_inventory

    if not config.cluster.address:
        check_free(Path(config.run_dir))
    inputs = open_training(config)
    config, folder, newest = inputs.config, inputs.folder, inputs.newest
    if newest is not None and int(newest.name.removeprefix("step_")) >= config.train.steps:
        show(
            f"nothing to do: {newest} has all of train.steps={config.train.steps}; more of them go on from it, "
            f"and it serves with: {serve_hint(newest)}"
        )
        return 0
    _show_start(config, inputs.train, show)
    adopt_platform(config.cluster.address)
    from sparseray.platform.cluster import Cluster

    show("starting Ray and its slots ...")
    count = slots_of(config, training_inventory(config))
    cluster = Cluster(config.cluster, count, run_dir=folder.path, workers=workers)
    is_interrupted = False
    try:
        scheduler = cluster.find_job()
        if scheduler is None:
            check_free(folder.path)
            for line in inputs.create_folder():
                show(line)
            scheduler = cluster.start_job(configuration.to_dict(config), inputs.validation)
            if newest is not None:
                show(f"going on from {newest}")
        else:
            show("this run is going on already, in the same cluster: following it")
        with beside(scheduler):
            is_interrupted = follow(scheduler, config, show)
    except BaseException:
        cluster.stop(at_once=True)
        raise
    cluster.stop()
    return _finish(folder, config, is_interrupted, show)


def check_free(run_dir: Path) -> None:
    """See that no other process trains in a run folder.

    Raises:
        ConfigError: one does; it says who, since when, and how to follow it.
    """
    deadline = time.monotonic() + LOCK_S
    while (found := lock.holder(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if found:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.get("time", 0)))
        folder = shlex.quote(str(run_dir.absolute()))
        raise ConfigError(
            f"run_dir={run_dir} is in use: process {found.get('pid', '?')} on {found.get('host', '?')} has trained there "
            f"since {since}, on the Ray at {found.get('ray', '?')}; follow it with "
            f"`python -m sparseray top --run_dir {folder}`, or give another run_dir"
        )


def _show_start(config: RunConfig, train: "TokenDataset", show: Show) -> None:
    from sparseray.model.counts import count_parameters

    parameters, t = count_parameters(config.model), config.train
    tokens = t.logical_shards * t.sequences_per_shard * t.seq_len
    show(
        f"model: {parameters['total'] / 1e6:.2f} M parameters, {parameters['active'] / 1e6:.2f} M active per token | "
        f"data: {train.num_tokens / 1e6:.2f} M tokens | step: {tokens} tokens in {t.logical_shards} logical shards"
    )


def follow(scheduler: Any, config: RunConfig, show: Show) -> bool:
    """Show the run's records until it ends; True when Ctrl-C ended it.

    Raises:
        UserError: training stopped for a reason the user can mend.
        RunFailedError: training stopped for another reason.
    """
    from sparseray.platform.cluster import ask

    failure: Failure | None = None
    with _interrupts(show) as interrupted:
        seen, epoch, last_step, done, started = 0, "", 0, False, time.monotonic()
        heard, is_told = time.monotonic(), False
        while not done:
            try:
                if interrupted and not is_told:
                    ask(scheduler, "stop")
                    is_told = True
                state: Progress = ask(scheduler, "progress", seen, epoch)
            except SchedulerLostError as error:
                if time.monotonic() - heard > SCHEDULER_DEADLINE_S:
                    raise RunFailedError(
                        f"the scheduler is gone: {error}; checkpoints are whole, and the same command goes on from the last"
                    ) from None
                time.sleep(0.2)
                continue
            if epoch and state.epoch != epoch:
                show("the scheduler died; a new one has taken over")
                is_told = False
            for record in state.records:
                if "loss" not in record or record["step"] > last_step or "event" in record:
                    show(describe(record, config.train.steps, started, first=last_step == 0))
                last_step = max(last_step, record["step"]) if "loss" in record else last_step
                if record.get("event") == "restored":
                    last_step = record["step"]
            seen, epoch, done, heard = state.seen, state.epoch, state.done, time.monotonic()
            failure = state.failure
    if failure is not None:
        if failure.user:
            raise UserError(failure.error)
        raise RunFailedError(
            f"{failure.kind}: {failure.error}; checkpoints are whole. The same command goes on from "
            "the last one; should it end at this step again, the cause is no accident: see the scheduler's log in Ray's session"
        )
    return bool(interrupted)


@contextmanager
def _interrupts(show: Show) -> Iterator[list[int]]:
    """Note the first Ctrl-C, after which the run shall stop with a checkpoint; end at once on the second."""
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt
        show(
            "stopping after this step, with a checkpoint; Ctrl-C again stops at once and loses the steps since the last one"
        )

    with stops_noted(handle):
        yield seen


def describe(record: dict[str, Any], steps: int, started: float, *, first: bool) -> str:
    """One line for people about a step, a validation, a checkpoint or an event."""
    if "event" in record:
        return f"*** {record['event']} after step {record['step']}: {record['text']}"
    if "checkpoint" in record:
        return f"checkpoint {record['checkpoint']} ({record['seconds']:.2f} s)"
    if "eval_loss" in record:
        return f"step {record['step']} | validation {record['eval_loss']:.4f} nats, {record['eval_bits_per_byte']:.4f} bits/byte"
    if "spike" in record:
        return f"step {record['step']}/{steps} | left out: {record['why']}"
    left = (steps - record["step"]) * record["seconds"]
    return (
        f"step {record['step']}/{steps} | loss {record['loss']:.4f} | grad {record['grad_norm']:.3f} | "
        f"{record['tokens_per_second']:,.0f} tok/s | experts max/mean {record['expert_load_max_over_mean']:.2f} | "
        f"left {int(left) // 60}m{int(left) % 60:02d}s"
    )


def _finish(folder: "RunFolder", config: RunConfig, is_interrupted: bool, show: Show) -> int:
    from sparseray.jobs.watch.report import write_report

    picture = write_report(folder)
    newest = folder.newest_checkpoint()
    show(f"records: {folder.metrics}")
    show(f"pictures: {picture}")
    if newest is not None:
        show(f"checkpoint: {newest}; serve it with: {serve_hint(newest)}")
    if is_interrupted:
        show("interrupted; the same command goes on from the checkpoint")
        return 130
    return 0


def serve_hint(checkpoint: Path) -> str:
    """The command that serves a checkpoint."""
    return f"python -m sparseray serve --checkpoint {shlex.quote(str(checkpoint))}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
