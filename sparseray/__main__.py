"""The command line: `sparseray COMMAND ...`, or `python -m sparseray COMMAND ...`."""

import importlib
import os
import sys

from sparseray.errors import UserError
from sparseray.jobs.output import lasting_output
from sparseray.jobs.places import settle
from sparseray.jobs.signals import stops_interrupt

COMMANDS = {
    "demo": (
        "sparseray.jobs.demo",
        "train a tiny model with several actors, serve it, ask it: the whole story",
    ),
    "data": ("sparseray.jobs.data", "turn text or code into token shards"),
    "plan": ("sparseray.jobs.plan", "show who would hold what in a run; starts nothing"),
    "up": ("sparseray.jobs.up", "start a platform by itself, with warm slots that jobs join"),
    "down": ("sparseray.jobs.down", "end the platform that `up` started"),
    "pretrain": ("sparseray.jobs.pretrain", "train a model on Ray actors"),
    "scale": ("sparseray.jobs.scale", "change how many actors play a role in a running job"),
    "status": ("sparseray.jobs.status", "plan, roles, replicas and last events of a running job"),
    "top": ("sparseray.jobs.top", "watch a running job: speed, loss, load of every slot, events"),
    "serve": ("sparseray.jobs.serve", "answer over HTTP, OpenAI-compatible"),
    "publish": ("sparseray.jobs.publish", "have a running server go on with other weights"),
    "import": ("sparseray.jobs.import_", "turn a Hugging Face model (DeepSeek family) into a checkpoint"),
    "export": ("sparseray.jobs.export", "turn a checkpoint into a Hugging Face model"),
    "evaluate": ("sparseray.jobs.evaluate", "measure a checkpoint: loss, infilling, needles in long texts"),
    "dashboard": (
        "sparseray.jobs.dashboard",
        "show the dashboards as one page; set up Prometheus and Grafana",
    ),
    "submit": ("sparseray.jobs.submit", "run a command as a job of a Ray cluster"),
}

READ = ("plan", "status", "top", "dashboard")
"""Commands that only show something: they end with their reader. All others go on."""


def usage() -> str:
    """Return the text of `--help`."""
    lines = "\n".join(f"  {name:10} {help_}" for name, (_, help_) in COMMANDS.items())
    return (
        "usage: sparseray COMMAND [options]\n\n"
        "Elastic training and serving on Ray of models that are sparse in attention, computation and memory.\n\n"
        f"commands:\n{lines}\n\n"
        "`sparseray COMMAND --help` shows options and an example. Start with: sparseray demo"
    )


def main() -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from sparseray import __version__

        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see sparseray --help"
        print(f"sparseray: error: unknown command {arguments[0]!r}; {hint}", file=sys.stderr)
        return 2
    if arguments[0] in READ:
        return _run(arguments)
    with lasting_output():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        with stops_interrupt():
            settle()
            module = importlib.import_module(COMMANDS[arguments[0]][0])
            return int(module.main(arguments[1:]))
    except UserError as error:
        print(f"sparseray: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparseray: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Nobody reads on, as in `top | head`: the end of a command that only shows something.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
