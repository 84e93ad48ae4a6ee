"""The timeline of a run: written from records and events, its labels never on top of each other."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from sparseray.jobs.watch.report import write_report
from sparseray.jobs.watch.timeline import MAX_ROWS, label_rows
from sparseray.platform.run.folder import RunFolder

PNG = b"\x89PNG\r\n\x1a\n"
HAPPENED = [
    (0.0, "start", "2 attention + 2 experts + 2 memory", (2, 2, 2, 1)),
    (12.0, "lost", "expert slot 3 killed", (2, 1, 2, 1)),
    (12.9, "recovered", "standby slot 6 took over", (2, 2, 2, 0)),
    (16.0, "checkpoint", "step 40", (2, 2, 2, 0)),
    (20.0, "resized", "4 attention, 3 experts", (4, 3, 2, 1)),
    (32.0, "checkpoint", "step 90", (4, 3, 2, 1)),
    (34.0, "lost", "memory slot 4 and attention slot 0 killed at once", (3, 3, 1, 1)),
    (34.8, "recovered", "survivors share", (3, 3, 2, 0)),
    (38.0, "rebalanced", "experts 1.62 to 1.08", (3, 3, 2, 0)),
    (44.0, "scheduler", "scheduler killed", (3, 3, 2, 0)),
    (45.5, "restored", "scheduler back at step 120", (3, 3, 2, 0)),
    (52.0, "resized", "2 attention, 2 experts", (2, 2, 2, 2)),
    (58.5, "checkpoint", "step 150", (2, 2, 2, 2)),
]


def write_run(folder: RunFolder, *, steps: int = 150, start: float = 1.7e9) -> None:
    """Write the records and events of a made-up run."""
    source = random.Random(0)
    folder.path.mkdir(parents=True, exist_ok=True)
    for step in range(1, steps + 1):
        loss = 3.0 + 4.6 * math.exp(-step / 40) + source.gauss(0, 0.06)
        folder.append({"step": step, "time": start + 0.4 * step, "loss": loss, "expert_load": []})
    lines = [
        json.dumps(
            {"time": start + at, "step": int(at / 0.4), "generation": 1, "kind": kind, "text": text}
            | dict(zip(("attention", "experts", "memory", "standby"), counts))
        )
        for at, kind, text, counts in HAPPENED
    ]
    folder.events.write_text("\n".join(lines) + "\n")


def test_the_timeline_is_drawn_from_records_and_events(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    write_run(folder)
    report = write_report(folder)
    content = (report / "timeline.png").read_bytes()
    assert content.startswith(PNG) and len(content) > 20_000
    assert (report / "loss.png").exists()
    changed = folder.events.read_text().replace("expert slot 3 killed", "another text")
    folder.events.write_text(changed)
    assert (write_report(folder) / "timeline.png").read_bytes() != content


def test_a_run_without_events_has_no_timeline(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    write_run(folder)
    folder.events.unlink()
    assert not (write_report(folder) / "timeline.png").exists()


def test_events_before_the_first_step_are_drawn(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    write_run(folder, steps=0)
    assert (write_report(folder) / "timeline.png").exists()
    folder.events.write_text(folder.events.read_text().splitlines()[0])
    assert (write_report(folder) / "timeline.png").exists()


def test_a_cut_last_event_does_not_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.event_lines() == []
    write_run(folder)
    whole: list[dict[str, Any]] = folder.event_lines()
    assert [event["text"] for event in whole] == [text for _, _, text, _ in HAPPENED]
    folder.events.write_text(folder.events.read_text()[:-30])
    assert folder.event_lines() == whole[:-1]


@pytest.mark.parametrize("seed", range(10))
def test_no_label_covers_another_or_a_line(seed: int) -> None:
    source = random.Random(seed)
    starts = sorted(source.uniform(0, 100) for _ in range(source.randint(1, 40)))
    widths = [source.uniform(1, 15) for _ in starts]
    rows = label_rows(starts, widths)
    assert all(row < MAX_ROWS for row in rows)
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            if i != j and row >= 0 and other >= 0 and starts[i] <= starts[j] <= starts[i] + widths[i]:
                assert other < row, "the line of j would run through the label of i"
    assert label_rows([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == [2, 1, 0]
