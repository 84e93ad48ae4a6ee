"""The picture of an elastic run over wall time: loss, slots by role, and what happened to them.

Drawn by jobs/watch/report.py from the records and events of a run folder; labels of events stand in rows
above the loss, placed such that no label covers another or another's line.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Event = dict[str, Any]

COLOURS = {
    "start": "#6b7480",
    "lost": "#c2352b",
    "recovered": "#2f8f4e",
    "resized": "#1f5fa8",
    "draining": "#c77f12",
    "drained": "#1f5fa8",
    "rebalanced": "#7a4fa3",
    "restored": "#c77f12",
    "scheduler": "#c2352b",
    "checkpoint": "#aab4bf",
    "ready": "#8f99a6",
}
QUIET = ("checkpoint", "ready")
"""Kinds that change nothing in training: thin dotted lines."""
ROLES = {"attention": "#4c78a8", "experts": "#e39a3b", "memory": "#5ba36b", "standby": "#d3d8de"}
OTHER = "#6b7480"
WIDTH, LEFT, RIGHT, BOTTOM = 11.0, 0.75, 1.15, 0.55
LOSS_HEIGHT, SLOTS_HEIGHT, GAP, ROW = 3.0, 1.35, 0.14, 0.2
"""Inches."""
MAX_ROWS, MAX_LETTERS = 9, 34


def draw_timeline(figure: Any, records: Sequence[Event], events: Sequence[Event]) -> None:
    """Draw a run onto an empty figure and set the figure's size.

    Args:
        figure: a matplotlib figure with an Agg canvas.
        records: one per step, with "time" (Unix seconds) and "loss".
        events: with "time", "kind", "text" and the number of slots in each role, in order of time.
    """
    times = [item["time"] for item in (*records, *events)]
    start, span = min(times), max(max(times) - min(times), 1e-3)
    unit, name = (
        (1.0, "seconds") if span < 300 else (60.0, "minutes") if span < 3 * 3600 else (3600.0, "hours")
    )
    events = [event | {"x": (event["time"] - start) / unit} for event in events]
    end = span / unit
    labelled = [event for event in events if event["kind"] not in ("checkpoint", "end")]
    widths = _text_widths(figure, [_label(event) for event in labelled])
    plot = WIDTH - LEFT - RIGHT
    # A label stands to the right of its line: the last ones need room.
    right = max(end * 1.01, *(e["x"] * plot / max(plot - w, plot / 2) for e, w in zip(labelled, widths)), 0.0)
    rows = label_rows([event["x"] for event in labelled], [width * right / plot for width in widths])
    strip = ROW * (max(rows, default=-1) + 1) + 0.1
    height = BOTTOM + SLOTS_HEIGHT + GAP + LOSS_HEIGHT + strip + 0.55
    figure.set_size_inches(WIDTH, height)

    def axes(bottom: float, tall: float) -> Any:
        return figure.add_axes((LEFT / WIDTH, bottom / height, plot / WIDTH, tall / height))

    slots = axes(BOTTOM, SLOTS_HEIGHT)
    loss = axes(BOTTOM + SLOTS_HEIGHT + GAP, LOSS_HEIGHT)
    labels = axes(BOTTOM + SLOTS_HEIGHT + GAP + LOSS_HEIGHT, strip)
    for ax in (slots, loss, labels):
        ax.set_xlim(0, right)
    _draw_loss(loss, records, start, unit)
    _draw_slots(slots, events, end)
    _draw_events(loss, slots, events)
    _draw_labels(labels, labelled, rows, strip)
    slots.set_xlabel(f"{name} since the start of the run")
    figure.text(
        LEFT / WIDTH, 1 - 0.26 / height, "One run, its actors come and go", fontsize=12, weight="bold"
    )
    figure.text(LEFT / WIDTH, 1 - 0.46 / height, _subtitle(records, events), fontsize=8.5, color=OTHER)


def label_rows(starts: Sequence[float], widths: Sequence[float]) -> list[int]:
    """Rows for labels that begin at their line and extend to the right, 0 the lowest; -1: no room.

    The line of a label runs up to its row; so a label stands above all whose line it would cross.

    Args:
        starts: where the lines are.
        widths: of the labels, in the same unit.
    """
    rows = [-1] * len(starts)
    order = sorted(range(len(starts)), key=lambda i: (starts[i], i), reverse=True)
    for position, label in enumerate(order):
        crossed = [
            rows[other] for other in order[:position] if starts[other] <= starts[label] + widths[label]
        ]
        row = max(crossed, default=-1) + 1
        rows[label] = row if row < MAX_ROWS else -1
    return rows


def _subtitle(records: Sequence[Event], events: Sequence[Event]) -> str:
    """Say in a line what the picture shows."""
    kinds = [event["kind"] for event in events]
    parts = [f"{len(records)} steps"]
    for kind, name, plural in (
        ("lost", "slot lost", "slots lost"),
        ("resized", "resize", "resizes"),
        ("restored", "return to a checkpoint", "returns to a checkpoint"),
    ):
        count = kinds.count(kind)
        if count:
            parts.append(f"{count} {name if count == 1 else plural}")
    goodput = next((event["goodput"] for event in reversed(events) if "goodput" in event), None)
    return ", ".join(parts) + ("" if goodput is None else f", goodput {goodput:.3f}")


def _label(event: Event) -> str:
    text = str(event["text"] or event["kind"])
    if event["kind"] == "recovered" and "total" in event:
        text = f"back after {event['total']:.2f} s"
    elif event["kind"] == "resized" and "pause" in event:
        text = f"{text.split(', ')[0]}, {event['pause'] * 1000:.0f} ms pause"
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 1].rstrip() + "…"


def _text_widths(figure: Any, labels: Sequence[str]) -> list[float]:
    """Widths in inches, with the space after a label."""
    renderer = figure.canvas.get_renderer()
    found = []
    for label in labels:
        text = figure.text(0, 0, label, fontsize=8)
        found.append(text.get_window_extent(renderer).width / figure.dpi + 0.12)
        text.remove()
    return found


def _draw_loss(axes: Any, records: Sequence[Event], start: float, unit: float) -> None:
    if records:
        x = [(record["time"] - start) / unit for record in records]
        losses = [record["loss"] for record in records]
        axes.plot(x, losses, color="#b3c3d4", linewidth=0.8, label="each step")
        axes.plot(
            x, _smoothed(np.array(losses, np.float64)), color="#1b3a5c", linewidth=1.8, label="smoothed"
        )
        axes.legend(
            frameon=False, loc="upper left", bbox_to_anchor=(1.005, 1.0), fontsize=8, handlelength=1.2
        )
    axes.set_ylabel("loss, nats per token")
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _smoothed(values_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Means over neighbours on both sides, fewer towards the ends; unlike a running mean it does not lag."""
    found, half = np.empty_like(values_N), max(2, len(values_N) // 50)
    for i in range(len(values_N)):
        reach = min(half, i, len(values_N) - 1 - i)
        found[i] = values_N[i - reach : i + reach + 1].mean()
    return found


def _draw_slots(axes: Any, events: Sequence[Event], end: float) -> None:
    """Stack the roles: the height of a band is the number of slots in that role."""
    x = [event["x"] for event in events] + [end]
    base = np.zeros(len(x))
    for role, colour in ROLES.items():
        counts = np.array([event[role] for event in events] + [events[-1][role]], np.float64)
        top = base + counts
        axes.fill_between(
            x, base, top, step="post", color=colour, linewidth=0, label=role, zorder=2, alpha=0.9
        )
        axes.step(
            x, np.where(counts > 0, top, np.nan), where="post", color="white", linewidth=0.8, zorder=2.5
        )
        base = top
    axes.set_ylim(0, max(1.0, float(base.max())) * 1.12)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("slots by role")
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], names[::-1], frameon=False, loc="upper left", bbox_to_anchor=(1.005, 1.05), fontsize=8,
        handlelength=1.0, labelspacing=0.35,
    )  # fmt: skip


def _draw_events(loss: Any, slots: Any, events: Sequence[Event]) -> None:
    """Draw a line for each event, and a band from each loss of a slot to the next good news."""
    covered = -1.0
    for position, event in enumerate(events):
        is_quiet = event["kind"] in QUIET
        for ax in (loss, slots):
            ax.axvline(
                event["x"],
                color=COLOURS.get(event["kind"], OTHER),
                linewidth=0.7 if is_quiet else 1.1,
                linestyle=":" if is_quiet else "-",
                alpha=0.7 if is_quiet else 0.85,
                zorder=1 if is_quiet else 3,
            )
        if event["kind"] == "lost" and event["x"] >= covered:
            later = (e["x"] for e in events[position:] if e["kind"] in ("recovered", "restored"))
            covered = next(later, event["x"])
            loss.axvspan(event["x"], covered, color=COLOURS["lost"], alpha=0.12, linewidth=0)
    if any(event["kind"] == "checkpoint" for event in events):
        loss.plot([], [], color=COLOURS["checkpoint"], linewidth=0.9, linestyle=":", label="checkpoint")
        loss.legend(
            frameon=False, loc="upper left", bbox_to_anchor=(1.005, 1.0), fontsize=8, handlelength=1.2
        )


def _draw_labels(axes: Any, events: Sequence[Event], rows: Sequence[int], strip: float) -> None:
    axes.set_ylim(0, strip)
    axes.axis("off")
    for event, row in zip(events, rows):
        if row < 0:
            continue
        colour, y = COLOURS.get(event["kind"], OTHER), ROW * (row + 0.5)
        axes.plot([event["x"]] * 2, [0, y + 0.4 * ROW], color=colour, linewidth=1.1, alpha=0.85)
        axes.annotate(
            _label(event), (event["x"], y), xytext=(3, 0), textcoords="offset points", fontsize=8, color=colour,
            va="center", annotation_clip=False,
        )  # fmt: skip
    hidden = sum(row < 0 for row in rows)
    if hidden:
        axes.annotate(
            f"{hidden} more without room for a label", (1.0, 1.0), xycoords="axes fraction", ha="right",
            va="bottom", fontsize=7, color=OTHER,
        )  # fmt: skip
