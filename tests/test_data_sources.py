"""Sources as they are found: links, loops, what may not be read, odd names and marks; targets that cannot be made."""

import os
import signal
from pathlib import Path

import pytest
from conftest import write_corpus
from processes import start, wait_until

from sparseray.actors.training.manifest import Manifest
from sparseray.errors import DataError, UserError
from sparseray.jobs import data
from sparseray.jobs.tokens import corpus as sources
from sparseray.jobs.tokens.prepare import prepare


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text", documents=24)
    return tmp_path / "text"


def made(tmp_path: Path, *folders: Path) -> Manifest:
    return prepare([str(f) for f in folders], tmp_path / "out", vocab_size=300, validation_fraction=0.1)


def test_linked_folders_are_followed_once_and_loops_end(tmp_path: Path, text: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "linked").symlink_to(text)
    (source / "again").symlink_to(text)
    (text / "loop").symlink_to(source)
    (source / "gone").symlink_to(tmp_path / "nowhere")
    manifest = made(tmp_path, source)
    assert manifest.sources[0].files == 24
    assert manifest.sources[0].skipped == {"dangling links": 1}


def test_what_cannot_be_read_is_named_and_counted(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (text / "shut").mkdir()
    walk, readable = os.walk, os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).endswith("003.txt") and readable(path, mode)
    )

    def walked(top: Path, *, followlinks: bool, onerror: object) -> object:
        for found in walk(top, followlinks=followlinks):
            if found[0].endswith("shut"):
                onerror(PermissionError(13, "Permission denied", found[0]))  # type: ignore[operator]
            else:
                yield found

    monkeypatch.setattr(os, "walk", walked)
    monkeypatch.setattr(sources.log, "propagate", True)
    monkeypatch.setattr(sources.log.parent, "propagate", True)
    manifest = made(tmp_path, text)
    assert manifest.sources[0].skipped == {"unreadable": 1, "unreadable folders": 1}
    assert f"{text / '003.txt'} is left out: unreadable" in caplog.text
    assert f"{text / 'shut'} is left out: unreadable folders" in caplog.text


def test_a_byte_order_mark_is_no_text_and_a_name_that_is_no_utf8_is_no_obstacle(
    tmp_path: Path, text: Path
) -> None:
    plain = made(tmp_path, text)
    first = sorted(text.iterdir())[0]
    first.write_bytes(b"\xef\xbb\xbf" + first.read_bytes())
    os.rename(text / "005.txt", os.fsencode(text) + b"/005-\xe4.txt")
    prepare([str(text)], tmp_path / "marked", vocab_size=300, validation_fraction=0.1)
    marked = prepare(
        [str(text)], tmp_path / "marked", vocab_size=300, validation_fraction=0.1, overwrite=True
    )
    assert marked.splits == plain.splits


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_source_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match="is empty; give 'stdlib'"):
        prepare([source], tmp_path / "out")


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null/out", "r\udce4ume"])
def test_a_target_that_cannot_be_made_is_found_before_any_work(
    tmp_path: Path, text: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sparseray.jobs.tokens.prepare.find_sources", lambda *_a, **_o: pytest.fail("it began")
    )
    with pytest.raises(UserError, match="--out"):
        prepare([str(text)], Path(out))


def test_paths_of_the_command_are_expanded(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPUS", "text")
    assert (
        data.main(["prepare", "--source", "~/$CORPUS", "--vocab_size", "300", "--out", "~/räume 1/data"]) == 0
    )
    assert (tmp_path / "räume 1" / "data" / "manifest.json").exists()
    assert data.main(["prepare", "--source", "$NO_SUCH_THING/x", "--out", "~/x"]) == 2
    assert "NO_SUCH_THING is not set" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_preparation_that_is_told_to_stop_leaves_nothing_half_done(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(
        ["data", "prepare", "--source", "stdlib", "--out", str(tmp_path / "out")], tmp_path / "log.txt"
    )
    wait_until(lambda: list(tmp_path.glob("out*")) or "MB" in (tmp_path / "log.txt").read_text(), "some work")
    process.send_signal(number)
    assert process.wait(30) == 130
    assert (tmp_path / "log.txt").read_text().endswith("interrupted: nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
