"""The jobs of the elastic benchmarks' peers: data-parallel training with Ray Train v2, torchft, and torchrun.

Runs in a Python of its own that needs torch, ray[train] and torchft, and nothing of this project. All train
the same plain network of so many parameters; a step waits until it is as long as asked for, so that the peers'
own work is all that costs more. Every worker writes a JSON line per finished step.
"""

import argparse
import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROWS = 16
CHECKPOINT_EVERY = 10
FIRST_WORKERS = 3


def network(parameters: int, device: str = "cpu") -> tuple[nn.Module, torch.Tensor]:
    """Four square layers with about that many parameters, and a batch for them.

    Args:
        parameters: of all layers.
        device: where they are.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = max(8, round((parameters / 4) ** 0.5))
    with torch.device(device):
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*layers), torch.randn(ROWS, width)


def place(device: str, rank: int) -> str:
    """A worker's own device; on GPUs it is the current one from then on.

    Args:
        device: cpu or cuda.
        rank: of the worker.
    """
    if device == "cpu":
        return device
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def finish(device: str) -> None:
    """Wait until what was launched is done: only then a step is finished."""
    if device != "cpu":
        torch.cuda.synchronize()


class Lines:
    """One worker's file: a line per finished step.

    Args:
        folder: of all workers' files.
        rank: of this one.
    """

    def __init__(self, folder: str, rank: int) -> None:
        self._path, self._rank = Path(folder) / f"worker-{os.getpid()}.jsonl", rank

    def add(self, step: int, began: float, workers: int) -> None:
        """Note a finished step; `workers` took part in it."""
        line = {"step": step, "began": began, "time": time.time(), "pid": os.getpid(), "rank": self._rank}
        with self._path.open("a") as file:
            file.write(json.dumps({**line, "workers": workers}) + "\n")


def _wait(began: float, step_s: float) -> None:
    time.sleep(max(0.0, began + step_s - time.time()))


# -- Ray Train v2 ------------------------------------------------------------------------------------


def ray_train_loop(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs: resumes from the newest checkpoint that it is given."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    plain, x_RD = network(config["parameters"])
    model = ray.train.torch.prepare_model(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, lines = 0, Lines(config["folder"], context.get_world_rank())
    found = ray.train.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while True:
        began = time.time()
        optimizer.zero_grad()
        loss = model(x_RD).square().mean()
        _wait(began, config["step_s"])
        loss.backward()
        optimizer.step()
        step += 1
        lines.add(step, began, context.get_world_size())
        if step % CHECKPOINT_EVERY:
            continue
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if context.get_world_rank() == 0:
                state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, Path(folder) / "state.pt")
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=checkpoint)


def ray_train(options: argparse.Namespace) -> None:
    """Run an elastic TorchTrainer until it is killed."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    import ray
    import ray.train
    import ray.train.torch

    ray.init(num_cpus=FIRST_WORKERS + 1, include_dashboard=False, _node_ip_address="127.0.0.1")
    trainer = ray.train.torch.TorchTrainer(
        ray_train_loop,
        train_loop_config={
            "folder": options.folder,
            "parameters": options.parameters,
            "step_s": options.step_s,
        },
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(1, FIRST_WORKERS), elastic_resize_monitor_interval_s=5.0
        ),
        run_config=ray.train.RunConfig(
            storage_path=str(Path(options.folder) / "storage"),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


# -- torchrun ----------------------------------------------------------------------------------------


def ddp(options: argparse.Namespace) -> None:
    """What every worker of torchrun runs: DistributedDataParallel, from the newest checkpoint on."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    device = place(options.device, rank)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    plain, x_RD = network(options.parameters, device)
    model = nn.parallel.DistributedDataParallel(plain, device_ids=None if device == "cpu" else [rank])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, lines, newest = 0, Lines(options.folder, rank), Path(options.folder) / "state.pt"
    if newest.exists():
        state = torch.load(newest, map_location=device)
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while True:
        began = time.time()
        optimizer.zero_grad()
        loss = model(x_RD).square().mean()
        _wait(began, options.step_s)
        loss.backward()
        optimizer.step()
        finish(device)
        step += 1
        lines.add(step, began, dist.get_world_size())
        if step % options.checkpoint_every == 0 and rank == 0:
            temporary = newest.with_suffix(".tmp")
            state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, temporary)
            temporary.rename(newest)


# -- torchft -----------------------------------------------------------------------------------------


def lighthouse(options: argparse.Namespace) -> None:
    """Run torchft's lighthouse until it is killed; its address goes into a file."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=1,
        join_timeout_ms=options.join_timeout_ms,
        heartbeat_timeout_ms=options.heartbeat_ms,
    )
    temporary = Path(options.folder) / "lighthouse.tmp"
    temporary.write_text(server.address())
    temporary.rename(temporary.with_name("lighthouse"))
    while True:
        time.sleep(60.0)


def torchft(options: argparse.Namespace) -> None:
    """Run one replica group of one worker until it is killed."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torchft import Manager, Optimizer, ProcessGroupGloo, ProcessGroupNCCL

    device = place(options.device, options.rank)
    plain, x_RD = network(options.parameters, device)
    inner = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    def load(state: dict[str, Any]) -> None:
        plain.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    limit = timedelta(seconds=options.collective_s)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=(ProcessGroupGloo if device == "cpu" else ProcessGroupNCCL)(timeout=limit),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": plain.state_dict(), "optimizer": inner.state_dict()},
        replica_id=f"replica_{options.rank}_",
        timeout=timedelta(seconds=10),
        quorum_timeout=timedelta(seconds=30),
        connect_timeout=timedelta(seconds=10),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=options.lighthouse,
        hostname="127.0.0.1",
    )
    optimizer = Optimizer(manager, inner)
    lines = Lines(options.folder, options.rank)
    while True:
        began, before = time.time(), manager.current_step()
        optimizer.zero_grad()
        plain(x_RD).square().mean().backward()
        _wait(began, options.step_s)
        # By hand: the hook of torchft's own DistributedDataParallel fails an assertion when a peer dies in it.
        gradients = [parameter.grad for parameter in plain.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        manager.allreduce(flat).wait()
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))
        optimizer.step()
        finish(device)
        if manager.current_step() > before:
            lines.add(manager.current_step(), began, manager.num_participants())


def main() -> None:
    """Run one job."""
    jobs = {"ray_train": ray_train, "lighthouse": lighthouse, "torchft": torchft, "ddp": ddp}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--step_s", type=float, default=0.15)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--lighthouse", default="")
    parser.add_argument("--join_timeout_ms", type=int, default=1000)
    parser.add_argument(
        "--heartbeat_ms", type=int, default=5000, help="after which torchft's lighthouse gives one up"
    )
    parser.add_argument("--collective_s", type=float, default=5.0, help="after which torchft gives a sum up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--checkpoint_every", type=int, default=CHECKPOINT_EVERY, help="steps, of torchrun's workers"
    )
    options = parser.parse_args()
    jobs[options.job](options)


if __name__ == "__main__":
    main()
