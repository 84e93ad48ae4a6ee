"""Fill-in-the-middle against none: equal tokens on configs/tiny.yaml, several seeds, infilling and left-to-right loss.

`python -m benchmarks.infilling run --folder DIR --rate 0.5 --seed 1` trains one model with the product and evaluates
it (`data prepare`, `pretrain`, `evaluate`), some minutes each; what is there already is not done again. The text is
made here: the first of two lines of random names can be known from the second, so from what is behind the gap alone.
(On the standard library's sources so small a model fills no gap after so few tokens, at any rate.)
`python -m benchmarks.infilling report --folder DIR` compares all of them as a table.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS, WORDS = 20_000, 10
NAMES = tuple(first + second for first in "bdfgklmn" for second in "aeiou")


def write_uses(folder: Path) -> Path:
    """Write documents whose second line says again what the third one says; always the same."""
    draw = random.Random(20261128)
    folder.mkdir(parents=True)
    for index in range(DOCUMENTS):
        names = " ".join(draw.sample(NAMES, WORDS))
        (folder / f"{index:05d}.py").write_text(f"go\nuse {names}\nend {names}\n")
    return folder


def sparseray(*arguments: str) -> None:
    """Run one command of the product; its output is shown."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "sparseray", *arguments], cwd=ROOT, env=environment, check=True)


def prepared(folder: Path, rate: float) -> Path:
    """The data of a rate; both have one tokenizer, with the sentinels, and the same documents and splits."""
    first, text = folder / "data_0.5", folder / "text"
    out = folder / f"data_{rate:g}"
    if not text.exists():
        write_uses(text)
    for data, own_rate, tokenizer in ((first, 0.5, "bpe"), (out, rate, str(first))):
        if not data.exists():
            more = ["--fim_rate", f"{own_rate:g}", "--vocab_size", "512", "--tokenizer", tokenizer]
            sparseray("data", "prepare", "--source", str(text), *more, "--out", str(data))
    return out


def run(folder: Path, rate: float, seed: int, steps: int, samples: int) -> None:
    """Train and evaluate one model.

    Args:
        folder: of all results.
        rate: share of rearranged training documents.
        seed: of weights and data order.
        steps: of 2,048 tokens.
        samples: of each task.
    """
    name = f"rate{rate:g}_seed{seed}"
    out, run_dir = folder / f"{name}.json", folder / name
    if out.exists():
        return
    data = prepared(folder, rate)
    newest = run_dir / "checkpoints" / f"step_{steps}"
    if not newest.exists():
        keys = {
            "config": "configs/tiny.yaml",
            "data.path": data,
            "run_dir": run_dir,
            "train.steps": steps,
            "train.seed": seed,
            "train.checkpoint_every": 50,
            "train.keep_checkpoints": 1,
            "train.eval_every": 0,
            "cluster.colocated": "true",
        }
        sparseray("pretrain", *(f"--{key}={value}" for key, value in keys.items()))
    more = ["--context", "128", "--samples", str(samples), "--tasks", "loss", "infilling", "--out", str(out)]
    # All are asked about the same documents.
    sparseray("evaluate", "--checkpoint", str(newest), "--data", str(folder / "data_0.5"), *more)


def report(folder: Path) -> str:
    """Return the table of all that was run.

    Args:
        folder: of the results.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("rate*_seed*.json")):
        found.setdefault(path.stem.split("_")[0], []).append(json.loads(path.read_text())["figures"])
    lines = [
        "| | "
        + " | ".join(f"{rate.removeprefix('rate')} (seeds: {len(of)})" for rate, of in found.items())
        + " |"
    ]
    lines.append("|---" * (len(found) + 1) + "|")
    for name in next(iter(found.values()))[0]:
        cells = [_cell([figures[name] for figures in of]) for of in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(of: list[dict[str, Any]]) -> str:
    """Mean over seeds, and each one's value."""
    values = [one["value"] for one in of]
    scale, digits = (100.0, 2) if of[0]["interval"] == "wilson" else (1.0, 4)
    shown = ", ".join(f"{scale * value:.{digits}f}" for value in values)
    mean = scale * math.fsum(values) / len(values)
    spread = scale * statistics.stdev(values) if len(values) > 1 else 0.0
    unit = " %" if scale == 100.0 else ""
    return f"{mean:.{digits}f}{unit} ± {spread:.{digits}f} ({shown})"


def main() -> None:
    """Run one model, or report all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=300)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.what == "run":
        folder.mkdir(parents=True, exist_ok=True)
        run(folder, options.rate, options.seed, options.steps, options.samples)
    else:
        print(report(folder))


if __name__ == "__main__":
    main()
