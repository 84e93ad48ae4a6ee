"""The command line: help with an example that parses, the nearest name for a typo, exit codes."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from background import ROOT, environment, free_ports, sparseray
from processes import answering

from sparseray import __version__
from sparseray.__main__ import COMMANDS, main
from sparseray.jobs import (
    dashboard,
    data,
    demo,
    down,
    evaluate,
    export,
    import_,
    plan,
    pretrain,
    publish,
    running,
    scale,
    serve,
    status,
    submit,
    top,
    up,
)
from sparseray.platform.config import load_yaml
from sparseray.platform.reachable import SETTINGS
from sparseray.platform.run import lock
from sparseray.platform.run.registry import register_run, registered_runs

HELPS = [[name] for name in COMMANDS] + [["data", "prepare"]]


class Out:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["sparseray", *arguments])
        self._monkeypatch.setenv("COLUMNS", "200")
        try:
            code = main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *self._capsys.readouterr()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Out:
    return Out(monkeypatch, capsys)


def examples(help_: str) -> list[list[str]]:
    """Words of the example's command lines, with continued lines joined."""
    text = help_[re.search(r"^examples?:$", help_, re.MULTILINE).end() :].replace("\\\n", " ")  # type: ignore[union-attr]
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(("python -m sparseray ", "sparseray "))]


def test_help_names_every_command_and_the_first_step(cli: Out) -> None:
    for arguments in ((), ("--help",), ("-h",), ("help",)):
        code, out, err = cli(*arguments)
        assert (code, err) == (0, "")
        assert out.startswith("usage: sparseray COMMAND")
        assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)
        assert "sparseray demo" in out
    assert cli("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_the_help_of_a_command_has_an_example_of_it_that_parses(
    cli: Out, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = cli(*command, "--help")
    assert (code, err) == (0, "")
    found = examples(out)
    assert any(words[3 : 3 + len(command)] == command for words in found), out
    ran: list[str] = []

    def note(name: str) -> object:
        return lambda *_args, **_options: ran.append(name) or 0

    # What a command does after its options have been read is replaced; reading them is what is tested.
    for module, name in (
        (plan, "run"),
        (plan, "show_job"),
        (up, "up"),
        (down, "down"),
        (pretrain, "run"),
        (serve, "run"),
        (import_, "run"),
        (export, "run"),
        (evaluate, "run"),
        (submit, "submit"),
        (demo, "demo"),
        (scale, "scale"),
        (status, "show"),
        (top, "watch"),
        (publish, "publish"),
    ):
        monkeypatch.setattr(module, name, note(module.__name__.rstrip("_")))
    monkeypatch.setattr(dashboard, "run", note(dashboard.__name__))
    monkeypatch.setattr(serve, "weights_of", lambda *_: (Path(), ""))
    monkeypatch.setattr(publish, "only_server", str)

    for module in (scale, status, top):
        monkeypatch.setattr(module, "connect", lambda run_dir: None)
    monkeypatch.setattr("sparseray.jobs.tokens.prepare.prepare", note(data.__name__))
    monkeypatch.setattr(data, "_report", note("report"))
    monkeypatch.chdir(ROOT)
    for words in found:
        code, _, err = cli(*words[3:])
        assert code == 0, (words, err)
        assert f"sparseray.jobs.{words[3]}" in ran, words


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("pretran", "pretrain"), ("server", "serve"), ("demos", "demo"), ("sumbit", "submit")],
)
def test_an_unknown_command_names_the_nearest_one(cli: Out, typo: str, nearest: str) -> None:
    assert cli(typo) == (2, "", f"sparseray: error: unknown command {typo!r}; did you mean {nearest!r}?\n")


def test_a_command_far_from_all_others_points_to_the_help(cli: Out) -> None:
    assert cli("xyzzy") == (2, "", "sparseray: error: unknown command 'xyzzy'; see sparseray --help\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "--train.stepz", "3"], ["--train.stepz", "train.steps"]),
        (["pretrain", "--train.steps", "x"], ["train.steps", "x"]),
        (["pretrain", "--train.steps", "0"], ["train.steps=0", "at least 1"]),
        (["pretrain", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["pretrain"], ["data.path is not set", "data prepare"]),
        (["pretrain", "--data.path", "nowhere"], ["nowhere"]),
        (["serve"], ["checkpoint"]),
        (["serve", "--checkpoint", "nowhere"], ["nowhere"]),
        (["serve", "--checkpoint", "x", "--serve.max_batc", "3"], ["--serve.max_batc", "serve.max_batch"]),
        (["serve", "--checkpoint", "x", "--port", "many"], ["port", "many"]),
        (["data", "prepare", "--source", "/nowhere/at/all", "--out", "out"], ["/nowhere/at/all"]),
        (["submit", "pretrain", "--config", "nowhere.yaml"], ["nowhere.yaml", "nothing was submitted"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    cli: Out, arguments: Sequence[str], words: Sequence[str]
) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and re.match(r"sparseray( \w+)?: error: ", err), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "arguments", [["data"], ["submit"], ["submit", "dance"], ["demo", "--steps", "x"], ["data", "prepare"]]
)
def test_missing_or_wrong_arguments_exit_with_2_and_the_usage(cli: Out, arguments: Sequence[str]) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ") and "error: " in err


RUNNING = [["scale", "experts", "3"], ["status"], ["top", "--once"]]


@pytest.mark.parametrize("command", RUNNING, ids=lambda command: command[0])
def test_a_command_about_a_running_job_says_which_there_are(
    cli: Out, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    code, out, err = cli(*command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no run is going on" in err and "sparseray pretrain" in err

    # Two that are gone: nobody listens on their ports any more.
    runs = [tmp_path / "first", tmp_path / "second"]
    for run, port in zip(runs, free_ports(2)):
        register_run(run, f"127.0.0.1:{port}")
    code, out, err = cli(*command, "--run_dir", str(runs[0]))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(runs[0]) in err and "does not answer" in err and "pretrain" in err
    assert not registered_runs()
    # One or many that are gone are as good as none, and a server that runs is shown all the same.
    for gone in (runs[:1], runs):
        for run, port in zip(gone, free_ports(2)):
            register_run(run, f"127.0.0.1:{port}")
        code, out, err = cli(*command)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "no run is going on" in err and not registered_runs()
    with answering(SETTINGS) as port:
        for run in runs:
            register_run(run, f"127.0.0.1:{port}")
        code, out, err = cli(*command, "--run_dir", str(tmp_path / "third"))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert all(word in err for word in (str(tmp_path / "third"), str(runs[0]), str(runs[1]))), err
        code, out, err = cli(*command)
        assert "2 runs are going on" in err and "--run_dir" in err
        # One that holds its folder is going on, and one that does not was killed.
        asked: list[str] = []
        monkeypatch.setattr("sparseray.jobs.running._attach", lambda run: asked.append(run.run_dir))
        runs[1].mkdir()
        held = lock.hold(runs[1])
        running.connect("")
        assert held is not None and asked == [str(runs[1])]
        held.close()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["scale"], "role"),
        (["scale", "gpu", "2"], "invalid choice: 'gpu'"),
        (["scale", "experts"], "count"),
        (["scale", "experts", "many"], "invalid int value: 'many'"),
        (["status", "runs/first", "more"], "unrecognized arguments"),
        (["top", "--every", "often"], "invalid float value: 'often'"),
    ],
)
def test_wrong_arguments_about_a_running_job_are_named(cli: Out, arguments: list[str], word: str) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"usage: sparseray {arguments[0]}") and word in err, err


@pytest.mark.one_in(3)
@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_is_shown_without_loading_what_only_the_work_needs(command: list[str]) -> None:
    program = (
        "import sys; from sparseray.__main__ import main\n"
        f"sys.argv = ['sparseray', *{command!r}, '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'triton', 'numba', 'starlette', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_module_runs_as_a_process() -> None:
    found = sparseray("pretran")
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert sparseray("--version").stdout.strip() == __version__


def test_ctrl_c_while_a_command_starts_is_one_line(cli: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "run", interrupted)
    assert cli("serve", "--checkpoint", "x") == (130, "", "sparseray: interrupted\n")


@pytest.mark.long
def test_a_command_that_only_shows_something_ends_with_its_reader() -> None:
    # A device that is named has nothing to be told about it on the other output.
    options = "--config configs/tiny.yaml --cluster.device=cpu"
    command = f"{shlex.quote(sys.executable)} -m sparseray plan {options} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


def test_the_resolved_configuration_is_printed_and_reads_back(cli: Out, tmp_path: Path) -> None:
    code, out, err = cli("pretrain", "--config", str(ROOT / "configs" / "tiny.yaml"), "--print_config")
    assert (code, err) == (0, "")
    (tmp_path / "tiny.yaml").write_text(out)
    assert load_yaml(tmp_path / "tiny.yaml") == load_yaml(ROOT / "configs" / "tiny.yaml")
