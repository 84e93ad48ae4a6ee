"""The `demo` command: real text, real actors that die and are added, a trained model that answers over HTTP.

Prepares the standard library as a corpus and trains the tiny model with 2 + 2 + 2 actors; meanwhile an
expert shard is killed and an attention worker is added (jobs/demo_story.py). Then it serves the checkpoint,
asks for three completions (one streamed), and leaves pictures. Two to three minutes.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sparseray.errors import UserError
from sparseray.jobs.output import print_line
from sparseray.model.presets import preset
from sparseray.platform import config as configuration
from sparseray.platform.checks import check_cluster, check_folder
from sparseray.platform.config import ClusterConfig, DataConfig, RunConfig, TrainConfig
from sparseray.platform.settings import expand_path

EXAMPLE = """example:
  python -m sparseray demo --out demo
"""
PROMPTS = ("def __init__(self, ", "import ", "    for i in range(")
START_DEADLINE_S = 90.0


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
    from sparseray.platform.opening import training_inventory
    from sparseray.platform.run.folder import RunFolder

    started = time.monotonic()
    data, run = out / "data", out / f"run-{steps}"
    check_folder(out, "--out")
    config = demo_config(data, run, steps)
    check_cluster(config.cluster, training_inventory(config))
    if not (data / "manifest.json").exists():
        say("1/4 preparing the corpus: the Python standard library's own sources")
        from sparseray.jobs import data as data_command

        code = data_command.main(["prepare", "--source", "stdlib", "--out", str(data)])
        if code:
            return code
    else:
        say(f"1/4 the corpus is there already: {data}")
    say(
        "2/4 training: 2 attention workers, 2 expert shards, 2 memory shards and a spare, each an actor of its own"
    )
    folder = RunFolder(run.absolute())

    def beside(scheduler: Any) -> AbstractContextManager[None]:
        return story(scheduler, folder, steps=steps, attention=config.cluster.attention_workers + 1, tell=say)

    code = pretrain.run(config, print_line, beside)
    if code:
        return code
    checkpoint = folder.newest_checkpoint()
    assert checkpoint is not None, "a finished run has a checkpoint"
    say("3/4 serving the checkpoint, experts and memory again in actors, and asking it")
    serve_and_ask(checkpoint)
    say(f"4/4 done in {time.monotonic() - started:.0f} s")
    print("\n".join(summary(folder)))
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


def demo_config(data: Path, run: Path, steps: int) -> RunConfig:
    """The tiny model on six slots and a spare one, every piece of state held twice."""
    return RunConfig(
        model=preset("tiny"),
        data=DataConfig(path=str(data)),
        train=TrainConfig(steps=steps, checkpoint_every=75, eval_every=75),
        # A machine that is busy with a slot's start must not look like a dead slot: hanging is not in the story.
        cluster=ClusterConfig(
            attention_workers=2, expert_shards=2, memory_shards=2, replication=2, standby=1, hang_s=5.0
        ),
        run_dir=str(run),
    )


def serve_and_ask(checkpoint: Path) -> None:
    """Start the server as a user would, ask it three times, and stop it.

    Raises:
        UserError: the server did not come up.
    """
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "sparseray",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, env=os.environ, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server)
        for prompt in PROMPTS[:2]:
            answer = post(
                f"{url}/v1/completions", {"prompt": prompt, "max_tokens": 48, "temperature": 0.7, "seed": 1}
            )
            print(f"--- {prompt!r} gives\n{prompt}{json.loads(answer)['choices'][0]['text']}", flush=True)
        print(f"--- {PROMPTS[2]!r}, streamed, gives", flush=True)
        stream(f"{url}/v1/completions", PROMPTS[2])
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def free_port() -> int:
    """Return a port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Wait for `/ready`.

    Raises:
        UserError: the server ended or did not answer in time.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"the server ended with status {server.returncode}; its message stands above")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise UserError(f"the server did not answer at {url}/ready within {START_DEADLINE_S:g} s")


def _request(url: str, body: dict[str, object]) -> urllib.request.Request:
    return urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})


def post(url: str, body: dict[str, object]) -> bytes:
    """Send JSON and return the answer's bytes."""
    with urllib.request.urlopen(_request(url, body), timeout=60) as answer:
        content: bytes = answer.read()
        return content


def stream(url: str, prompt: str) -> None:
    """Ask for a streamed completion and print the text as it comes."""
    print(prompt, end="", flush=True)
    body: dict[str, object] = {
        "prompt": prompt,
        "max_tokens": 48,
        "temperature": 0.7,
        "seed": 2,
        "stream": True,
    }
    with urllib.request.urlopen(_request(url, body), timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                print(json.loads(line[6:])["choices"][0].get("text", ""), end="", flush=True)
    print(flush=True)
