"""What happens to runs in the field: readers and terminals that go, folders in use, other settings, damaged journals.

Each cure that a message gives is done here as it is written.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from local_cluster import tiny_run, train
from processes import environment

from sparseray.errors import CheckpointError, ConfigError, UserError
from sparseray.jobs import pretrain
from sparseray.platform.config import RunConfig, load_yaml
from sparseray.platform.opening import open_training
from sparseray.platform.run import checkpoint, folder, lock
from sparseray.platform.run.journal import Journal, set_aside_if_damaged

HOLD = "import sys, time, pathlib; from sparseray.platform.run import lock; f = lock.hold(pathlib.Path(sys.argv[1]), ray='here:1'); print('held' if f else 'refused', flush=True); time.sleep(100)"  # fmt: skip


def hold(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_folder_is_held_by_one_process_and_by_none_once_that_is_killed(tmp_path: Path) -> None:
    run_dir = tmp_path / "räume 1"
    run_dir.mkdir()
    process = hold(run_dir)
    try:
        assert lock.hold(run_dir) is None
        with pytest.raises(ConfigError) as refused:
            pretrain.check_free(run_dir)
        for words in (f"process {process.pid} on ", "here:1", "another run_dir"):
            assert words in str(refused.value)
        (command,) = re.findall(r"`python -m sparseray (.*)`", str(refused.value))
        assert shlex.split(command) == ["top", "--run_dir", str(run_dir)]
    finally:
        process.kill()
        process.wait()
    pretrain.check_free(run_dir)
    file = lock.hold(run_dir)
    assert file is not None
    file.close()


def test_a_file_system_without_locks_costs_a_warning_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlocked(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unlocked)
    file = lock.hold(tmp_path)
    assert file is not None and lock.holder(tmp_path) is None
    file.close()


def resumed(run_dir: Path, config: RunConfig) -> RunConfig:
    """What `pretrain` does in a folder before it starts anything."""
    inputs = open_training(replace(config, run_dir=str(run_dir)))
    inputs.create_folder()
    return inputs.config


def test_a_finished_run_takes_more_steps_at_another_rate_and_the_journal_says_so(
    corpus: Path, tmp_path: Path
) -> None:
    config = tiny_run(corpus, steps=3)
    first = train(tmp_path / "run", config)
    other = replace(
        config,
        optim=replace(config.optim, lr=5e-4, warmup_steps=2),
        train=replace(config.train, steps=5, eval_every=2),
    )
    resumed(tmp_path / "run", other)
    assert load_yaml(tmp_path / "run" / "config.yaml").optim.lr == 5e-4
    journal = Journal(tmp_path / "run" / "journal.sqlite")
    changed = journal.last("settings")
    journal.close()
    assert changed is not None and changed["step"] == 3
    assert {c.split()[0] for c in changed["changed"]} == {
        "optim.lr", "optim.warmup_steps", "train.steps", "train.eval_every",
    }  # fmt: skip
    assert "optim.lr 0.002 -> 0.0005" in changed["changed"]
    records = train(tmp_path / "run", other).records
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert [r["loss"] for r in records[:3]] == [r["loss"] for r in first.records]
    assert all(r["lr"] <= 5e-4 for r in records[3:])


def test_a_run_folder_that_was_moved_goes_on_where_it_is(corpus: Path, tmp_path: Path) -> None:
    config = tiny_run(corpus, steps=4)
    whole = train(tmp_path / "whole", config)
    train(tmp_path / "run", config, stop_after=2)
    moved = tmp_path / "elsewhere, run 2"
    (tmp_path / "run").rename(moved)
    assert resumed(moved, config).run_dir == str(moved)
    assert train(moved, config).digest == whole.digest


def test_what_may_not_change_is_named_beside_what_may(corpus: Path, tmp_path: Path) -> None:
    config = tiny_run(corpus, steps=2)
    train(tmp_path / "run", config)
    other = replace(config, train=replace(config.train, seed=1, steps=9))
    with pytest.raises(
        ConfigError, match=r"train\.seed \(0 there, 1 here\).*optim\.\*, train\.steps"
    ) as refused:
        resumed(tmp_path / "run", other)
    assert "train.steps (" not in str(refused.value)


def test_a_gradient_that_is_not_finite_is_cured_as_its_message_says(corpus: Path, tmp_path: Path) -> None:
    config = tiny_run(corpus, steps=4)
    steep = replace(
        config, optim=replace(config.optim, lr=1000.0, clip=0.0, warmup_steps=0, weight_decay=1000.0)
    )
    steep = replace(steep, train=replace(steep.train, checkpoint_every=1))
    with pytest.raises(UserError) as stopped:
        train(tmp_path / "run", steep)
    (option,) = re.findall(r"--(optim\.lr=\S+)", str(stopped.value))
    assert float(option.split("=")[1]) == 100.0
    cured = replace(steep, optim=replace(steep.optim, lr=float(option.split("=")[1])))
    assert resumed(tmp_path / "run", cured).optim.lr == 100.0


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_a_damaged_journal_is_kept_aside_and_the_run_goes_on_from_its_checkpoint(
    corpus: Path, tmp_path: Path, damage: str
) -> None:
    config = tiny_run(corpus, steps=4)
    run_dir = tmp_path / "run"
    train(run_dir, replace(config, train=replace(config.train, checkpoint_every=2)), stop_after=2)
    whole = train(tmp_path / "whole", config)
    path = run_dir / "journal.sqlite"
    assert set_aside_if_damaged(path) is None
    content = path.read_bytes()
    path.write_bytes(b"no database " * 500 if damage == "garbage" else content[: len(content) // 2])
    said = open_training(replace(config, run_dir=str(run_dir))).create_folder()
    (aside,) = run_dir.glob("journal.sqlite.damaged-*")
    assert str(path) in said[0] and str(aside) in said[0] and "step_2, which is whole" in said[0]
    assert train(run_dir, config).records[-1]["loss"] == whole.records[-1]["loss"]


@pytest.mark.parametrize("ending", ["closed pipe", "full disk"])
def test_output_that_finds_no_reader_ends_nothing(ending: str, tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\nfrom sparseray.jobs.output import lasting_output, print_line\n"
        "with lasting_output():\n"
        "    for i in range(20000): print_line(f'line {i}')\n"
        "    print('more', file=sys.stderr, flush=True)\n"
        f"    pathlib.Path({str(tmp_path / 'end')!r}).write_text('reached')\n"
    )
    target = "| head -n 1" if ending == "closed pipe" else "> /dev/full"
    shell = f"set -o pipefail; {shlex.quote(sys.executable)} -c {shlex.quote(program)} {target}"
    done = subprocess.run(["bash", "-c", shell], env=environment(), capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "end").read_text()) == (0, "reached"), done.stderr
    assert done.stderr == "more\n"


def test_a_disk_that_is_full_costs_a_checkpoint_and_lines_that_come_later_and_nothing_else(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(corpus, steps=6)
    config = replace(config, train=replace(config.train, checkpoint_every=2))
    whole = train(tmp_path / "whole", config)
    write, finish, begun = folder._write_whole, checkpoint.finish, checkpoint.begin
    full = {"is": False}

    def begin(root: Path, step: int) -> Path:
        full["is"] = step == 2
        return begun(root, step)

    def refused(path: Path, line: str) -> None:
        if full["is"]:
            raise OSError(28, "No space left on device")
        write(path, line)

    def unfinished(directory: Path, manifest: dict[str, object]) -> Path:
        if full["is"]:
            raise OSError(28, "No space left on device")
        return finish(directory, manifest)

    monkeypatch.setattr(checkpoint, "begin", begin)
    monkeypatch.setattr(checkpoint, "finish", unfinished)
    monkeypatch.setattr(folder, "_write_whole", refused)
    run_dir = tmp_path / "run"
    done = train(run_dir, config)
    assert [r["step"] for r in done.folder.records()] == [1, 2, 3, 4, 5, 6] and done.curve == whole.curve
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step_4", "step_6"]
    (event,) = [e for e in done.folder.event_lines() if e["kind"] == "unsaved"]
    assert event["step"] == 2 and "No space left" in event["text"]
    assert done.digest == whole.digest


def test_the_last_checkpoint_that_cannot_be_written_is_told_and_the_same_command_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(corpus, steps=4)
    config = replace(config, train=replace(config.train, checkpoint_every=3))
    whole = train(tmp_path / "whole", config)
    with monkeypatch.context() as patched:
        write = checkpoint.write_part

        def refused(directory: str, part: str, tensors: dict[str, object]) -> object:
            if "step_4" in directory:
                raise CheckpointError(f"{directory}/{part} cannot be written: No space left on device")
            return write(directory, part, tensors)

        patched.setattr(checkpoint, "write_part", refused)
        with pytest.raises(
            UserError, match=r"no checkpoint of step 4.*No space left.*the same command goes on"
        ):
            train(tmp_path / "run", config)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_3"]
    assert train(tmp_path / "run", config).digest == whole.digest


def test_a_line_that_is_cut_by_a_full_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    folder._write_whole(path, "first\n")
    limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import pathlib; from sparseray.platform.run.folder import _write_whole; _write_whole(pathlib.Path({str(path)!r}), 'a longer line\\n')"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", limit], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "OSError" in done.stderr
    assert path.read_text() == "first\n"


def test_a_journal_that_cannot_be_written_is_waited_for_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseray.platform.run.journal.WAIT_S", 0.0)
    book = Journal(tmp_path / "journal.sqlite")
    book.lead()
    book.append("commit", generation=1, step=1)
    book._db.execute("PRAGMA query_only=ON")
    with pytest.raises(UserError, match=r"journal\.sqlite cannot be written.*checkpoints are whole.*goes on"):
        book.append("commit", generation=1, step=2)
    book._db.execute("PRAGMA query_only=OFF")
    book.append("commit", generation=1, step=2)
    assert [row["step"] for row in book.read("commit")] == [2, 1]
    book.close()
