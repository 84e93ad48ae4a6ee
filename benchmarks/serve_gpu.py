"""Serving on one GPU: generation through HTTP against transformers, decoding at a long context, reading prompts.

Each side runs on the same GPU, one after another: `python -m sparseray serve` of a checkpoint with requests over
HTTP, transformers' generate of the same shape, and the engine alone (serve_gpu_engine.py). Prints Markdown:

  PYTHONPATH=. python -m benchmarks.serve_gpu --checkpoint runs/1b/checkpoints/step_1 --out benchmarks/results/FILE.md

With --data instead of --checkpoint, a checkpoint is made by one training step first. Without either, the engine and
transformers alone are compared.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import serve_gpu_engine as here
from benchmarks.processes import end
from sparseray.model.config import MLAConfig, MTPConfig

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW, BATCHES = 512, 128, (1, 64)
LONG = ("16x1", "4x1", "16x16", "4x16", "1x16")
"""Key/value heads and batch of what decodes at a long context."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "") + f":{ROOT}"}


def peers() -> dict[int, float]:
    """transformers' tokens per second by batch."""
    batches = ",".join(map(str, BATCHES))
    command = [sys.executable, "-m", "benchmarks.gpu_generate_peer", batches, str(PROMPT), str(NEW)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"transformers: exit code {done.returncode}\n{done.stderr[-3000:]}", flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["batch"]: line["rate"] for line in lines}


def make_checkpoint(data: Path, folder: Path) -> Path:
    """One training step of the benchmark's model."""
    command = [sys.executable, "-m", "sparseray", "pretrain", f"--config={ROOT / 'configs' / '1b_full.yaml'}"]
    command += [f"--data.path={data}", f"--run_dir={folder / 'run'}", "--train.steps=1"]
    command += ["--train.sequences_per_shard=1", "--cluster.device=cuda", "--optim.moments=bfloat16"]
    command += ["--train.dtype=bfloat16"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"pretrain: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    return folder / "run" / "checkpoints" / "step_1"


def connected(port: int, count: int) -> list[socket.socket]:
    """Connections that the server has taken and answers on: those of a client that asks again and again."""
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=120) for _ in range(count)]
    for one in sockets:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.sendall(b"GET /ping HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer_on(one)
    return sockets


def answer_on(one: socket.socket) -> bytes:
    """The body of the next answer on a connection."""
    head, body, length = b"", b"", 0
    while True:
        found = one.recv(1 << 16)
        if not found:
            raise SystemExit(f"serve closed a connection after {head + body!r:.300}")
        body += found
        if not head and b"\r\n\r\n" in body:
            head, _, body = body.partition(b"\r\n\r\n")
            length = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])  # type: ignore[index]
        if head and len(body) >= length:
            return body


def rate_of(sockets: list[socket.socket], first: int) -> float:
    """Tokens per second of completions that are asked for together, one on each connection.

    A request is sent in one piece, and an answer read as bytes until it is whole: what a client in C would do.
    """
    requests = []
    for index in range(first, first + len(sockets)):
        prompt = here.request_of(index, PROMPT, NEW).prompt_tokens
        body = json.dumps({"prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True})
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    started = time.perf_counter()
    for one, request in zip(sockets, requests):
        one.sendall(request)
    answers = [answer_on(one) for one in sockets]
    seconds = time.perf_counter() - started
    found = [json.loads(answer) for answer in answers]
    if wrong := [answer for answer in found if "usage" not in answer]:
        raise SystemExit(f"serve answered {wrong[0]}")
    return float(sum(answer["usage"]["completion_tokens"] for answer in found) / seconds)


def served(checkpoint: Path) -> dict[int, float]:
    """Tokens per second through HTTP by batch."""
    command = [sys.executable, "-m", "sparseray", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    command += [
        "--cluster.device",
        "cuda",
        "--cluster.colocated",
        "true",
        "--serve.max_batch",
        str(BATCHES[-1]),
    ]
    command += ["--serve.max_model_len", "2048"]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        started, port = time.perf_counter(), 0
        assert process.stdout is not None
        for line in process.stdout:
            print(line.rstrip(), flush=True)
            if address := re.search(r" at http://[\d.]+:(\d+)", line):
                port = int(address[1])
                break
        if not port:
            raise SystemExit("serve ended")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        print(f"serve was ready after {time.perf_counter() - started:.0f} s", flush=True)
        rates: dict[int, float] = {}
        for batch in BATCHES:
            sockets = connected(port, batch)
            found = [rate_of(sockets, 1000 * batch + 100 * turn) for turn in range(8)]
            print(f"batch {batch}: {', '.join(f'{rate:.0f}' for rate in found)} tok/s", flush=True)
            rates[batch] = statistics.median(found)
            for one in sockets:
                one.close()
        return rates
    finally:
        end(process)


def generation(checkpoint: Path | None) -> list[str]:
    """The table of generation, and of reading prompts."""
    theirs = peers()
    ours = {} if checkpoint is None else served(checkpoint)
    engine = here.engine_of(here.model_of("1b_full", max_seq_len=16384), max_batch=64, max_model_len=9216)
    lines = [
        f"prompt {PROMPT}, {NEW} new tokens, greedy, 1.24 B parameters, prompts included:",
        "",
        "| batch | transformers tok/s | through HTTP tok/s | ratio | engine alone tok/s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for batch in BATCHES:
        alone = max(
            here.generate_rate(engine, batch, PROMPT, NEW, 10000 * batch + 100 * turn) for turn in range(3)
        )
        peer, through = theirs.get(batch, float("nan")), ours.get(batch, float("nan"))
        lines.append(
            f"| {batch} | {peer:.0f} | {through:.0f} | {through / peer:.1f} | {alone:.0f} | {alone / peer:.1f} |"
        )
    here.prompt_seconds(engine, 1, 8192, 5)
    short = min(here.prompt_seconds(engine, 1, PROMPT, 400000 + turn) for turn in range(5))
    first = min(here.prompt_seconds(engine, 1, 8192, 10 + turn) for turn in range(3))
    many = min(here.prompt_seconds(engine, 32, 512, 100 * turn + 300000) for turn in range(3))
    forward = here.forward_rate(engine, 8192, 8192)
    lines += [
        "",
        f"- first token of a prompt of 8,192 tokens: {first * 1e3:.1f} ms, {8192 / first:,.0f} tokens/s,"
        f" {8192 / first / forward:.2f} of the forward pass of training on the same sequence ({forward:,.0f} tokens/s)",
        f"- first token of a prompt of {PROMPT} tokens: {short * 1e3:.1f} ms",
        f"- 32 prompts of 512 tokens: {32 * 512 / many:,.0f} tokens/s",
        "",
    ]
    for index in range(16):
        engine.add(here.request_of(600000 + index, PROMPT, 1))
    lines += ["reading 16 prompts:", "", *[f"    {line}" for line in here.profile(engine, 1)], ""]
    here.finish(engine)
    for batch in BATCHES:
        for index in range(batch):
            engine.add(here.request_of(700000 + 1000 * batch + index, PROMPT, NEW))
        for _ in range(40):
            engine.step()
        lines += [f"decoding, batch {batch}:", "", *[f"    {line}" for line in here.profile(engine)], ""]
        here.finish(engine)
    return lines


def long_context(which: Sequence[tuple[int, int]], context: int = 65000) -> list[str]:
    """The table of decoding at a long context.

    Args:
        which: key/value heads and batch of each line.
        context: tokens of each request.
    """
    lines = [
        f"decoding at {context:,} tokens of context, a step of the engine, the same model with both attentions:",
        "",
        "| key/value heads | batch | full ms | NSA ms | ratio |",
        "|---|---|---|---|---|",
    ]
    profiles: list[str] = []
    for kv_heads, batch in which:
        found = dict[str, float]()
        for kind in ("full", "nsa"):
            # The blocks of the paper; those of a model that names none are for short texts.
            config = here.model_of(
                "1b_full",
                attention=(kind,) * 12,
                num_kv_heads=kv_heads,
                max_seq_len=1 << 17,
                nsa=here.model_of("1b").nsa,
            )
            found[kind], shares = here.decode_ms(config, batch, context)
            profiles += [f"{kind}, {kv_heads} key/value heads, batch {batch}:", ""]
            profiles += [*[f"    {line}" for line in shares], ""]
            torch.cuda.empty_cache()
        full, nsa = found["full"], found["nsa"]
        lines.append(f"| {kv_heads} | {batch} | {full:.2f} | {nsa:.2f} | {full / nsa:.2f} |")
        print(lines[-1], flush=True)
    return [*lines, "", *profiles]


def drafts() -> list[str]:
    """The table of decoding with a module's drafts."""
    shape = MLAConfig(
        q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    )
    lines = [
        f"decoding with the drafts of one module, 1.24 B parameters, prompt {PROMPT}, 256 new tokens, tokens/s; random"
        " weights, so drafts come from a table; the ratio at another acceptance lies between in proportion:",
        "",
        "| attention | batch | drawn | without | no draft accepted | with rests | all accepted | ratio at 0 % | 30 % | 50 % |"
        " 70 % | 85 % | 100 % | texts |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    drawn: dict[str, float] = {"temperature": 0.8}
    for kind, batch, draws in (
        ("full", 1, {}), ("mla", 1, {}), ("full", 8, {}), ("mla", 8, {}), ("full", 1, drawn), ("mla", 1, drawn),
        ("full", 8, drawn), ("full", 1, {**drawn, "top_p": 0.95}), ("full", 8, {**drawn, "top_p": 0.95}),
    ):  # fmt: skip
        config = here.model_of("1b_full", attention=(kind,) * 12, mla=shape, mtp=MTPConfig(depth=1))
        found = here.drafting(config, batch, PROMPT, 256, **draws)
        plain, none, whole = found["without"], found["none"], found["all"]
        ratios = [((1 - share) * none + share * whole) / plain for share in (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)]
        differ = sum(int(v) for name, v in found.items() if name.startswith("texts"))
        how = ", ".join(f"{name} {value}" for name, value in draws.items()) or "greedy"
        lines.append(
            f"| {kind} | {batch} | {how} | {plain:.0f} | {none:.0f} | {found['rests']:.0f} | {whole:.0f} | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + f" | {differ} of {12 * batch} differ |"
        )
        print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> int:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path, help="make the checkpoint from these tokens")
    parser.add_argument("--parts", default="generation,long", help="which to run, drafts among them")
    parser.add_argument(
        "--long", nargs="+", default=LONG, help="key/value heads and batch of each line of part long"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    name = torch.cuda.get_device_name()
    lines = [f"# Serving on one GPU: {name}, torch {torch.__version__}", ""]
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        checkpoint = options.checkpoint
        if checkpoint is None and options.data is not None:
            checkpoint = make_checkpoint(options.data, Path(folder))
        if "generation" in options.parts:
            lines += generation(checkpoint)
    if "long" in options.parts:
        lines += long_context(
            [(int(heads), int(batch)) for heads, batch in (row.split("x") for row in options.long)]
        )
    if "drafts" in options.parts:
        lines += drafts()
    lines.append(f"{time.perf_counter() - started:.0f} s in all")
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
