"""How long a slot takes to get its state from another one of the same host: through its memory, and by message.

Two processes with a mailbox each, the source with all of a model's state and the puller with none; what is timed is what
a slot does when a plan gives it pieces that it lacks (`pull_missing`), into memory that nothing has touched. With
`--device cuda` each has a GPU, or they share one. Prints a line for each path, and the table as Markdown:

  PYTHONPATH=. python -m benchmarks.moves --out benchmarks/results/moves_cpu_DATE.md
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import psutil
import torch

from sparseray.actors.exchange import pulls
from sparseray.actors.exchange.answers import Answers
from sparseray.actors.exchange.by_message import Caller
from sparseray.actors.exchange.chunks import CHUNK_BYTES
from sparseray.actors.installation import InstallPlan, JobSpec, PullFrom, pull_missing
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import DENSE, Piece
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig
from sparseray.platform.config import ClusterConfig, RunConfig, TrainConfig
from sparseray.platform.fleet.job import SpecJobs
from sparseray.platform.fleet.transport import ZmqTransport
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.plain_values import to_dict

JOB, SOURCE, PULLER, DEADLINE_S = "moves", 0, 1, 120.0
GIGABYTE = 1e9


def config_of(experts: int, device: Literal["cpu", "cuda"]) -> RunConfig:
    """A model whose dense weights take 0.4 GB with their moments, and each expert of three layers 19 MB."""
    model = ModelConfig(
        vocab_size=32768,
        hidden=1024,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        ffn_dim=1024,
        attention=("full",) * 4,
        moe=MoEConfig(num_experts=experts, top_k=1, expert_dim=512),
        dse=DSEConfig(layers=()),
    )
    train = TrainConfig(dtype="bfloat16" if device == "cuda" else "float32")
    return replace(
        RunConfig(), model=model, train=train, cluster=ClusterConfig(device=device, colocated=True)
    )


def pieces_of(config: RunConfig) -> tuple[Piece, ...]:
    """Everything that there is of a model."""
    layers, experts = len(config.model.moe_layers), config.model.moe.num_experts
    return (DENSE, *(("expert", layer, expert) for layer in range(layers) for expert in range(experts)))


def spec_of(config: RunConfig) -> JobSpec:
    """The job of both slots."""
    return JobSpec(config=json.dumps(to_dict(config)))


@contextmanager
def mailbox_of(slot: int, folder: Path) -> Iterator[SlotMailbox]:
    """A slot's mailbox with its control thread, while the block runs.

    Args:
        slot: its id.
        folder: of sockets.
    """
    mailbox = SlotMailbox(ZmqTransport(f"slot{slot}", folder), slot, JOB)
    mailbox.adopt(1)
    control = threading.Thread(target=mailbox.read, args=(lambda: None,), daemon=True)
    control.start()
    try:
        yield mailbox
    finally:
        mailbox.close()
        control.join()


def give(config: RunConfig, folder: Path, line: Connection) -> None:
    """Answer what the puller asks until it closes its end of a line.

    Args:
        config: of the run.
        folder: of sockets.
        line: to the puller, for addresses.
    """
    torch.set_num_threads(1)
    holdings = SpecJobs(Metrics({}))(spec_of(config)).holdings()
    holdings.initialize(pieces_of(config))
    with mailbox_of(SOURCE, folder) as mailbox:
        line.send(mailbox.transport.address)
        mailbox.transport.connect({PULLER: line.recv()})
        answers = Answers(holdings, lambda *_, **__: None, with_optimizer=True)
        while not line.poll():
            message = mailbox.next(0.2)
            if message is not None:
                reply = answers(message.body, message.layer, message.part)
                mailbox.post(message.source, reply, step=message.step, reply_to=message.sequence)
                del message, reply


def apart() -> Any:
    """As if the puller were on another host, while a block runs."""
    return patch.object(pulls, "process_namespace", lambda: "")


def time_pull(call: Caller, holdings: Holdings, config: RunConfig) -> float:
    """Seconds until a slot has everything that it lacks.

    Args:
        call: asks the source.
        holdings: of the puller, empty.
        config: of the run.
    """
    pieces = pieces_of(config)
    holdings.spare()
    body = InstallPlan(
        plan=Plan(generation=1, addresses={}, part_owners=(), dense=(), experts=(), buckets=()),
        job=spec_of(config),
        scheduler="",
        step=0,
        pulls=(PullFrom(source=SOURCE, pieces=pieces),),
    )
    started = time.perf_counter()
    pull_missing(holdings, pieces, body, call, with_optimizer=True)
    if holdings.experts.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def processor_s(source: BaseProcess) -> float:
    """Processor time that both slots have taken so far.

    Args:
        source: the other slot's process.
    """
    theirs = psutil.Process(source.pid).cpu_times()
    return time.process_time() + theirs.user + theirs.system


def measure(config: RunConfig, repeats: int) -> list[tuple[float, float]]:
    """Seconds of each pull, and processor seconds of both slots in it.

    Args:
        config: of the run.
        repeats: how many.
    """
    mine, theirs = multiprocessing.Pipe()
    devices = max(1, torch.cuda.device_count())
    with tempfile.TemporaryDirectory(prefix="sr-", dir="/tmp") as folder:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(1 % devices)
        source = multiprocessing.get_context("spawn").Process(
            target=give, args=(config, Path(folder), theirs)
        )
        source.start()
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        with mailbox_of(PULLER, Path(folder)) as mailbox:
            mailbox.transport.connect({SOURCE: mine.recv()})
            mine.send(mailbox.transport.address)
            found = []
            for _ in range(repeats + 1):
                holdings = SpecJobs(Metrics({}))(spec_of(config)).holdings()
                answers = Answers(holdings, lambda *_, **__: None, with_optimizer=True)
                call = Caller(mailbox, answers, lambda _: None, DEADLINE_S)
                before = processor_s(source)
                seconds = time_pull(call, holdings, config)
                found.append((seconds, processor_s(source) - before))
            mine.send("")
            source.join()
    # The first one loads code and opens sockets.
    return found[1:]


def main() -> int:
    """Measure both paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--experts", type=int, default=10, help="of each of three layers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--paths", default="mapped,message")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = config_of(options.experts, options.device)
    held = SpecJobs(Metrics({}))(spec_of(config)).holdings()
    held.initialize(pieces_of(config))
    size = sum(tensor.nbytes for tensor in held.tensors(pieces_of(config)).values())
    del held
    rows = [
        f"| {size / GIGABYTE:.2f} GB by | median s | least, most | GB/s | processor s of both |",
        "|---|---|---|---|---|",
    ]
    for path in options.paths.split(","):
        with apart() if path == "message" else nullcontext():
            found = measure(config, options.repeats)
        seconds, processor = (statistics.median(of) for of in zip(*found))
        least, most = min(found)[0], max(found)[0]
        rows.append(
            f"| {path} | {seconds:.3f} | {least:.3f}, {most:.3f} | {size / GIGABYTE / seconds:.2f} | {processor:.2f} |"
        )
        print(rows[-1], flush=True)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPUs"
    head = f"{where}, torch {torch.__version__}, chunks of {CHUNK_BYTES >> 20} MiB, {options.repeats} pulls each."
    table = "\n".join(["# State that moves between two slots", "", head, "", *rows, ""])
    print(table, flush=True)
    if options.out:
        options.out.write_text(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
