"""Pictures of a run, drawn from its folder: loss curve, expert load, and a timeline of its events.

Written as PNG into `report/` by pretrain and demo; nothing here is needed to train.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparseray.jobs.watch.timeline import draw_timeline
from sparseray.platform.run.folder import RunFolder


def write_report(folder: RunFolder) -> Path:
    """Draw `report/loss.png`, `experts.png` and `timeline.png`, as far as there is data; return the folder."""
    # Drawing takes most of a second to import; training must not wait for it at its start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records, events = [r for r in folder.records() if "spike" not in r], folder.event_lines()
    folder.report.mkdir(parents=True, exist_ok=True)
    if events:
        figure = Figure()
        FigureCanvasAgg(figure)
        draw_timeline(figure, records, events)
        figure.savefig(folder.report / "timeline.png", dpi=130)
    if not records:
        return folder.report
    evaluations = []
    if folder.evaluations.exists():
        evaluations = [json.loads(line) for line in folder.evaluations.read_text().splitlines()]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    earlier, shift = earlier_records(folder)
    _draw_loss(figure.subplots(), records, evaluations, earlier, shift)
    figure.savefig(folder.report / "loss.png", dpi=110)
    load = np.array([record["expert_load"] for record in records], np.float64)
    if load.size:
        figure = Figure(figsize=(9, 2.2 * load.shape[1] + 0.6), layout="constrained")
        _draw_load(figure, [record["step"] for record in records], load)
        figure.savefig(folder.report / "experts.png", dpi=110)
    return folder.report


def earlier_records(folder: RunFolder) -> tuple[list[dict[str, Any]], int]:
    """Records of the run whose checkpoint a run began with, and where on that run's axis its own step 0 lies.

    Nothing, and 0, where it began with a seed, or that run is not there any more.
    """
    origin = folder.origin()
    if origin is None:
        return [], 0
    before = RunFolder(Path(origin.checkpoint).parent.parent)
    return [r for r in before.records() if "spike" not in r], origin.step - origin.begin


def _draw_loss(
    axes: Any,
    records: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    earlier: list[dict[str, Any]],
    shift: int,
) -> None:
    """Draw a run's loss; on one axis with that of the run that it goes on from, if there is one."""
    steps, losses = [shift + r["step"] for r in records], [r["loss"] for r in records]
    if earlier:
        axes.plot(
            [r["step"] for r in earlier],
            _smoothed([r["loss"] for r in earlier]),
            color="#8a6d3b",
            linewidth=2,
            label="the run that it goes on from, smoothed",
        )
        axes.axvline(steps[0] - 1, color="#777777", linewidth=1, linestyle=":")
    axes.plot(steps, losses, color="#b9c7d6", linewidth=1, label="training loss of each step")
    axes.plot(steps, _smoothed(losses), color="#1f5fa8", linewidth=2, label="smoothed")
    if evaluations:
        axes.plot(
            [shift + e["step"] for e in evaluations],
            [e["eval_loss"] for e in evaluations],
            "o",
            color="#c2452d",
            label=f"validation, last {evaluations[-1]['eval_bits_per_byte']:.3f} bits per byte",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_title("Loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _smoothed(losses: list[float]) -> np.ndarray:
    smooth = np.array(losses, np.float64)
    for i in range(1, len(smooth)):
        smooth[i] = 0.9 * smooth[i - 1] + 0.1 * smooth[i]
    return smooth


def _draw_load(figure: Any, steps: list[int], load_SLE: np.ndarray) -> None:
    """Draw, for each MoE layer, the share of tokens that each expert got, over steps."""
    share = load_SLE / load_SLE.mean(2, keepdims=True)
    axes = np.atleast_1d(figure.subplots(share.shape[1], 1, sharex=True))
    for layer, ax in enumerate(axes):
        image = ax.imshow(
            share[:, layer].T,
            aspect="auto",
            origin="lower",
            cmap="viridis",
            vmin=0.0,
            vmax=2.0,
            interpolation="nearest",
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, share.shape[2] - 0.5),
        )
        ax.set_ylabel(f"MoE layer {layer}\nexpert")
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("step")
    figure.colorbar(image, ax=list(axes), label="load over mean")
    figure.suptitle("Expert load (1 is even)")
