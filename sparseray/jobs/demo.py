"""The `demo` command: real text, one platform that trains and serves, actors that die and are lent.

Prepares the standard library as a corpus and trains the tiny model with 2 + 2 + 2 actors; meanwhile an expert shard is
killed, a server joins the platform, under load training lends it a slot, and an engine is killed in mid-stream
(jobs/demo_story.py). Then the server goes over to what was learned and is asked, and leaves pictures. Two to three minutes.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparseray.errors import UserError
from sparseray.jobs.demo_server import SLOTS, DemoServer
from sparseray.jobs.output import print_line
from sparseray.model.presets import preset
from sparseray.platform import config as configuration
from sparseray.platform.checks import check_cluster, check_folder
from sparseray.platform.config import ClusterConfig, DataConfig, RunConfig, TrainConfig
from sparseray.platform.fleet.lease import Kind
from sparseray.platform.run.registry import RegisteredPlatform
from sparseray.platform.settings import expand_path

EXAMPLE = """example:
  python -m sparseray demo --out demo
"""
PROMPTS = ("def __init__(self, ", "import ", "    for i in range(")
VERSION_S = 30.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 when everything worked, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="sparseray demo",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", default="demo", help="folder for corpus, run and report, default %(default)s"
    )
    parser.add_argument("--steps", type=int, default=150, help="training steps, default %(default)s")
    options = parser.parse_args(list(arguments))
    try:
        return demo(Path(expand_path(options.out, "--out")), options.steps)
    except UserError as error:
        return configuration.die(error)


def say(text: str) -> None:
    """Tell a person what happens now."""
    # One write: a line of another thread cannot come between.
    print(f"\n=== {text}\n", end="", flush=True)


def demo(out: Path, steps: int) -> int:
    """Run the whole story in `out`; what is already there is not done again."""
    from sparseray.jobs import pretrain
    from sparseray.jobs.demo_story import story, summary
    from sparseray.platform.opening import slots_of, training_inventory
    from sparseray.platform.run.folder import RunFolder

    started = time.monotonic()
    data, run = out / "data", out / f"run-{steps}"
    check_folder(out, "--out")
    config = demo_config(data, run, steps)
    inventory = training_inventory(config)
    check_cluster(config.cluster, inventory)
    folder = RunFolder(run.absolute())
    outcome: list[str] = []
    with ExitStack() as stack:
        # Its slots load while the corpus is prepared.
        coming = stack.enter_context(platform(slots_of(config, inventory) + SLOTS))
        if code := prepare(data):
            return code
        address = coming.result().address
        config = replace(config, cluster=replace(config.cluster, address=address))
        server = DemoServer(folder.path, address, out / "server.txt")
        stack.callback(server.close)

        @contextmanager
        def beside(scheduler: Any) -> Iterator[None]:
            with story(scheduler, folder, server, steps=steps, tell=say) as told:
                yield
            outcome.extend(told.outcome)

        say(
            "2/4 training: 2 attention workers, 2 expert shards, 2 memory shards and a spare, each an actor of its own"
        )
        if code := pretrain.run(config, print_line, beside):
            return code
        checkpoint = folder.newest_checkpoint()
        assert checkpoint is not None, "a finished run has a checkpoint"
        say("3/4 the server goes over to what was learned, and is asked")
        ask_trained(server, checkpoint)
    say(f"4/4 done in {time.monotonic() - started:.0f} s")
    print("\n".join([*summary(folder), *outcome]))
    print(
        f"the story:     {folder.report / 'timeline.png'}\n"
        f"loss curve:    {folder.report / 'loss.png'}\n"
        f"expert load:   {folder.report / 'experts.png'}\n"
        f"step records:  {folder.metrics}\n"
        f"checkpoint:    {checkpoint}\n"
        "try next:\n"
        f"  {pretrain.serve_hint(checkpoint)}\n"
        f"  python -m sparseray pretrain --config configs/tiny.yaml --data.path {shlex.quote(str(data))} "
        "--train.steps 1000 --run_dir runs/longer"
    )
    return 0


def prepare(data: Path) -> int:
    """Make the corpus, unless it is there; the exit code."""
    if (data / "manifest.json").exists():
        say(f"1/4 the corpus is there already: {data}")
        return 0
    say("1/4 preparing the corpus: the Python standard library's own sources")
    from sparseray.jobs import data as data_command

    return data_command.main(["prepare", "--source", "stdlib", "--out", str(data)])


def demo_config(data: Path, run: Path, steps: int) -> RunConfig:
    """The tiny model on six slots and a spare one, every piece of state held twice, slots to lend."""
    return RunConfig(
        model=preset("tiny"),
        data=DataConfig(path=str(data)),
        train=TrainConfig(steps=steps, checkpoint_every=max(1, steps // 2), eval_every=max(1, steps // 2)),
        # A machine that is busy with a slot's start must not look like a dead slot: hanging is not in the story.
        cluster=ClusterConfig(
            attention_workers=2,
            expert_shards=2,
            memory_shards=2,
            replication=2,
            standby=1,
            hang_s=5.0,
            lend=True,
        ),
        run_dir=str(run),
    )


@contextmanager
def platform(slots: int) -> Iterator["Future[RegisteredPlatform]"]:
    """Have a platform of that many slots, and of no more, started beside the body; it is ended in the end."""
    from sparseray.jobs.down import down
    from sparseray.jobs.up import begin

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(begin, slots, "", Kind(), max_slots=slots)
        try:
            yield coming
        finally:
            down(coming.result().address)


def ask_trained(server: DemoServer, checkpoint: Path) -> None:
    """Have the server go over to a checkpoint, and ask it.

    Args:
        server: that has served the run.
        checkpoint: its last.

    Raises:
        UserError: the server does not take it, or does not answer.
    """
    from sparseray.jobs.publish import publish
    from sparseray.platform.cluster import detach

    print(publish(server.folder, str(checkpoint)), flush=True)
    detach()
    deadline = time.monotonic() + VERSION_S
    for number, prompt in enumerate(PROMPTS):
        heard = server.stream(prompt, 48, number)
        while not heard.version.startswith(f"{checkpoint.name}-") and time.monotonic() < deadline:
            heard = server.stream(prompt, 48, number)
        print(f"--- {heard.version}: {prompt!r} gives\n{prompt}{heard.text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
