"""Decoding with the model's own drafts against decoding without, as the product serves on a CPU; and what is accepted.

Two servers of one checkpoint, each one colocated slot that is a thread of this process, answer the same prompts in turn,
one request at a time. Prompts are the beginnings of windows of the validation split. Prints Markdown:

    python -m sparseray data prepare --source stdlib --out data/stdlib
    python -m sparseray pretrain --config configs/mtp.yaml --data.path data/stdlib --run_dir runs/mtp
    PYTHONPATH=. python -m benchmarks.speculative --checkpoint runs/mtp/checkpoints/step_1200 --data data/stdlib
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.speculative_engine import SpeculativeEngine
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.training.token_data import TokenDataset
from sparseray.kernels.compiled_ops import COMPILED
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer
from sparseray.platform.config import ClusterConfig, ServeConfig
from sparseray.platform.opening import open_serving
from sparseray.platform.run import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from local_server import LocalServer  # type: ignore[import-not-found]  # noqa: E402

PROMPT, TOKENS = 96, 160
TEMPERATURES = (0.0, 0.6, 1.0)
ONE = ClusterConfig(colocated=True, device="cpu")


@dataclass
class Decoding:
    """Steps that read no prompt: their seconds and tokens, and the drafts that they judged."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    accepted: int = 0
    rejected: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / sum(self.seconds)


@contextmanager
def timed(engines: tuple[type[PagedEngine], ...]) -> Iterator[Decoding]:
    """Note the decoding steps of all engines of these kinds, one kind at a time."""
    found, plain = Decoding(), {kind: kind.step for kind in engines}

    def step(engine: PagedEngine) -> list[TokenEvent]:
        is_reading = bool(engine._waiting) or any(s.in_prompt for s in engine._running)
        started = time.perf_counter()
        events = plain[type(engine)](engine)
        if not is_reading:
            found.seconds.append(time.perf_counter() - started)
            found.tokens += sum(event.token_id is not None for event in events)
            found.accepted += sum(event.accepted for event in events)
            found.rejected += sum(event.rejected for event in events)
        return events

    for kind in engines:
        kind.step = step  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        for kind, method in plain.items():
            kind.step = method  # type: ignore[method-assign]


def prompts(data: Path, count: int) -> list[tuple[int, ...]]:
    """Beginnings of windows of the validation split, evenly spread."""
    dataset = TokenDataset(data, "validation", verify=False)
    last = dataset.num_windows(PROMPT + TOKENS)
    picked = np.linspace(0, last - 1, count).astype(int)
    return [tuple(dataset.sequence(int(i), PROMPT + TOKENS)[0][:PROMPT].tolist()) for i in picked]


def measure(
    servers: dict[str, LocalServer], asked: list[tuple[int, ...]], temperature: float
) -> tuple[dict[str, Decoding], list[tuple[int, ...]]]:
    """Answer all prompts on both servers in turn; what each took, and the texts, which must be equal.

    Args:
        servers: by name.
        asked: prompts.
        temperature: of all requests.
    """
    total = {name: Decoding() for name in servers}
    texts = []
    for number, prompt in enumerate(asked):
        request = GenerationRequest(
            request_id=f"{temperature}.{number}",
            prompt_tokens=prompt,
            max_tokens=TOKENS,
            temperature=temperature,
            seed=number,
        )
        heard = {}
        for name, server in servers.items():
            with timed((PagedEngine, SpeculativeEngine)) as found:
                (answer,) = server.ask([request])
            heard[name] = answer.tokens
            own = total[name]
            own.seconds += found.seconds
            own.tokens += found.tokens
            own.accepted += found.accepted
            own.rejected += found.rejected
        first, *others = heard.values()
        assert all(text == first for text in others), "drafts changed a text"
        texts.append((*prompt, *first))
    return total, texts


@torch.no_grad()
def rules(directory: Path, texts: list[tuple[int, ...]]) -> dict[str, float]:
    """Chance that the first draft is accepted at temperature 1, by rule, from the distributions at every place of the texts.

    Args:
        directory: of the checkpoint.
        texts: prompts with their answers.
    """
    config = open_serving(directory, ServeConfig(speculate="mtp"), ONE).model
    model, experts = Transformer(config, None, ops=COMPILED), LocalExperts(config)
    own = model.state_dict() | experts.tensors()
    for name, tensor in checkpoint.read_tensors(str(directory), list(own)).items():
        own[name].copy_(tensor.view_as(own[name]))
    found: dict[str, list[float]] = {"rejection sampling": [], "same number": [], "most probable draft": []}
    for text in texts:
        tokens = torch.tensor([text])
        main = model(tokens, experts=experts, memory=None).hidden_BTH
        first = next(iter(model.predictions(tokens, main, experts))).hidden_BTH
        p = model.logits(main[0, PROMPT:-1]).double().softmax(-1)
        q = model.logits(first[0, PROMPT - 1 : -1]).double().softmax(-1)[: len(p)]
        found["rejection sampling"] += torch.minimum(p, q).sum(-1).tolist()
        found["most probable draft"] += p.gather(-1, q.argmax(-1, keepdim=True))[:, 0].tolist()
        # Both draw by the same number: the parts of [0, 1) that stand for the same token in both.
        ends = torch.minimum(p.cumsum(-1), q.cumsum(-1))
        starts = torch.maximum(p.cumsum(-1) - p, q.cumsum(-1) - q)
        found["same number"] += (ends - starts).clamp(min=0).sum(-1).tolist()
    return {name: statistics.mean(values) for name, values in found.items()}


def main() -> None:
    """Measure one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    print(
        f"{processor.partition(':')[2].strip()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}\n"
    )
    asked = prompts(options.data, options.prompts)
    with tempfile.TemporaryDirectory() as folder:
        servers = {
            name: LocalServer(
                Path(folder) / name,
                options.checkpoint.absolute(),
                ONE,
                serve=ServeConfig(speculate="mtp" if name == "with" else "none"),
            )
            for name in ("without", "with")
        }
        try:
            measure(servers, asked[:1], 0.0)
            print(
                "| temperature | first draft accepted | tokens a step | without, tok/s | with, tok/s | ratio |"
            )
            print("|---|---|---|---|---|---|")
            for temperature in TEMPERATURES:
                found, texts = measure(servers, asked, temperature)
                own, plain = found["with"], found["without"]
                share = own.accepted / (own.accepted + own.rejected)
                print(
                    f"| {temperature} | {share:.1%} | {own.tokens / len(own.seconds):.2f} | {plain.rate:.0f} |"
                    f" {own.rate:.0f} | {own.rate / plain.rate:.2f} |"
                )
        finally:
            for server in servers.values():
                server.close()
    print("\nChance of the first draft at temperature 1, on the same texts, by rule:\n")
    for name, share in rules(options.checkpoint, texts).items():
        print(f"- {name}: {share:.1%}")


if __name__ == "__main__":
    main()
