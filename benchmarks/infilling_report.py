"""Tables of what benchmarks/infilling.py evaluated: rates side by side, seed by seed, and whether the two aims are met."""

import json
import statistics
from pathlib import Path
from typing import Any

from sparseray.jobs.evaluation.intervals import share

Results = dict[float, dict[int, dict[str, Any]]]
"""What `evaluate` wrote, by rate and seed."""
MOST_WORSE = 0.01
"""Of the left-to-right loss."""


def report(folder: Path) -> str:
    """Return the tables of all texts; models of other steps than the most are left out.

    Args:
        folder: of the results.
    """
    texts: dict[str, dict[tuple[float, int], dict[str, Any]]] = {}
    for path in sorted(folder.glob("*_rate*_seed*.json")):
        text, rate, seed = path.stem.split("_")
        key = float(rate.removeprefix("rate")), int(seed.removeprefix("seed"))
        texts.setdefault(text, {})[key] = json.loads(path.read_text())
    return "\n\n".join(f"## {text}\n\n{_of_text(found)}" for text, found in texts.items()) + "\n"


def _of_text(found: dict[tuple[float, int], dict[str, Any]]) -> str:
    steps = [one["step"] for one in found.values()]
    step = max(steps, key=steps.count)
    rates: Results = {}
    for (rate, seed), one in sorted(found.items(), reverse=True):
        if one["step"] == step:
            rates.setdefault(rate, {})[seed] = one["figures"]
    others = len(steps) - steps.count(step)
    lines = [f"{step} steps{f' ({others} models of other steps left out)' if others else ''}", ""]
    lines += ["| | " + " | ".join(f"rate {rate:g}, {len(of)} seeds" for rate, of in rates.items()) + " |"]
    lines += ["|---" * (len(rates) + 1) + "|"]
    for name in next(iter(next(iter(rates.values())).values())):
        cells = [_cell([figures[name] for figures in of.values()]) for of in rates.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_verdicts(rates)])


def _cell(of: list[dict[str, Any]]) -> str:
    """Of shares: all seeds' samples together with their interval; else the mean; and each seed's value."""
    values = [one["value"] for one in of]
    if of[0]["interval"] == "wilson":
        samples = sum(one["samples"] for one in of)
        all_in_all = share(round(sum(one["value"] * one["samples"] for one in of)), samples)
        interval = f"{100 * all_in_all.low:.2f} to {100 * all_in_all.high:.2f}"
        each = ", ".join(f"{100 * value:.2f}" for value in values)
        return f"**{100 * all_in_all.value:.2f} %** ({interval}; {samples} samples: {each})"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"**{statistics.fmean(values):.4f}**{spread} ({', '.join(f'{value:.4f}' for value in values)})"


def _verdicts(rates: Results) -> list[str]:
    """The loss of the same seeds beside each other, and exact match against the best that the other rate does."""
    if len(rates) < 2:
        return []
    ours, theirs = rates[max(rates)], rates[min(rates)]
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return []
    name = "loss, nats per token"
    worse = [ours[seed][name]["value"] / theirs[seed][name]["value"] - 1 for seed in both]
    mean = statistics.fmean(worse)
    said = "met" if mean <= MOST_WORSE else "missed"
    each = ", ".join(f"{100 * one:+.2f} %" for one in worse)
    lines = [
        f"- left-to-right loss: {100 * mean:+.2f} % ({each}), at most {100 * MOST_WORSE:+.0f} % wanted: {said}"
    ]
    for kind in ("line", "span"):
        filled = statistics.fmean(ours[seed][f"infilling, {kind}"]["value"] for seed in both)
        peers = {
            way: statistics.fmean(theirs[seed][f"{way}, {kind}"]["value"] for seed in both)
            for way in ("infilling", "before alone")
        }
        said = "better" if filled > max(peers.values()) else "not better"
        lines.append(
            f"- exact match of a {kind}: {100 * filled:.2f} %, without rearranged documents "
            f"{100 * peers['infilling']:.2f} %, and {100 * peers['before alone']:.2f} % from what is before alone: {said}"
        )
    return lines
