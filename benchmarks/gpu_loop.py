"""The loop that one would write around the model without a platform: bf16 weights, fp32 masters, our operations.

  python -m benchmarks.gpu_loop CONFIG DATA STEPS WARMUP [--profile]

With --profile the share of a step by kernel and the largest ones follow on stderr.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseray.actors.state.dense_slab import computes_in_fp32
from sparseray.actors.state.flat_tensors import FlatTensors
from sparseray.actors.training.token_data import TokenDataset, batch
from sparseray.kernels.dense.adamw import adamw_step
from sparseray.kernels.dense.squared_norm import clip_scale, squared_norm
from sparseray.kernels.ops import ops_for
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer, cross_entropy_sum
from sparseray.platform.config import OptimConfig, load_yaml
from sparseray.platform.planning.schedule import learning_rate

ROOT = Path(__file__).resolve().parent.parent


class Weights:
    """Parameters in bf16, or in fp32 where the product computes in it, with fp32 masters and bf16 moments, all in slabs.

    Args:
        named: parameters by name, on the GPU.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.parameters = [parameter for _, parameter in named]
        in_fp32 = [computes_in_fp32(name) for name, _ in named]
        kinds = [(parameter.ndim >= 2, whole) for parameter, whole in zip(self.parameters, in_fp32)]
        self.flat = FlatTensors([parameter.shape for parameter in self.parameters], kinds)
        device, dtype = self.parameters[0].device, torch.bfloat16
        self.master, self.copy = self.flat.slab(torch.float32, device), self.flat.slab(dtype, device)
        self.first, self.second = self.flat.slab(dtype, device), self.flat.slab(dtype, device)
        views = zip(self.parameters, self.flat.views(self.master), self.flat.views(self.copy), in_fp32)
        for parameter, master, copy, whole in views:
            master.copy_(parameter.detach())
            copy.copy_(master)
            parameter.data = master if whole else copy
        self.kinds = kinds

    def update(self, scale: Tensor, lr: float, optim: OptimConfig, step: int) -> None:
        """AdamW on every run of tensors; forgets the gradients."""
        gradients = [
            p.grad.contiguous() if p.grad is not None else torch.zeros_like(p) for p in self.parameters
        ]
        for run in self.flat.runs:
            decays, whole = self.kinds[run.members[0]]
            adamw_step(
                run.of(self.master),
                run.of(self.first),
                run.of(self.second),
                self.flat.gather(run, gradients),
                copy=None if whole else run.of(self.copy),
                scale=scale,
                lr=lr,
                betas=(optim.beta1, optim.beta2),
                eps=optim.eps,
                weight_decay=optim.weight_decay if decays else 0.0,
                step=step,
            )
        for parameter in self.parameters:
            parameter.grad = None


class PlainLoop:
    """The whole step in one process, on one GPU."""

    def __init__(self, name: str, data: Path) -> None:
        self.config = load_yaml(ROOT / "configs" / f"{name}.yaml")
        self.data = TokenDataset(data, "train")
        device, model = torch.device("cuda"), self.config.model
        ops = ops_for("triton", device)
        self.model = Transformer(model, None, seed=0, ops=ops)
        self.experts = LocalExperts(model, seed=0, ops=ops)
        self.model.to(device)
        self.experts.to(device)
        named = [*self.model.named_parameters(), *self.experts.named_parameters()]
        self.weights = Weights(named)

    def tokens(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch of a step, on the GPU."""
        t = self.config.train
        found = batch(
            self.data,
            seed=0,
            step=step,
            part=0,
            num_parts=1,
            sequences_per_part=t.sequences_per_shard,
            seq_len=t.seq_len,
        )
        return found.tokens_BT.cuda(non_blocking=True), found.targets_BT.cuda(non_blocking=True)

    def step(self, step: int) -> Tensor:
        """Forward, backward, clip, update."""
        tokens_BT, targets_BT = self.tokens(step)
        out = self.model(tokens_BT, experts=self.experts, memory=None)
        weights = torch.full(targets_BT.shape, 1.0 / targets_BT.numel(), device=targets_BT.device)
        loss = cross_entropy_sum(self.model, out.hidden_BTH, targets_BT, weights)
        (loss + out.aux_loss).backward()
        optim = self.config.optim
        gradients = [p.grad for p in self.weights.parameters if p.grad is not None]
        scale = clip_scale(squared_norm(gradients), optim.clip)
        self.weights.update(scale, learning_rate(step, optim, self.config.train.steps), optim, step)
        self.model.update_router_bias(out.expert_counts_LE)
        return loss.detach()


def profile(loop: PlainLoop, step: int) -> None:
    """Print where the time of three steps goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for more in range(3):
            loop.step(step + more)
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70)
    print(table, file=sys.stderr)


def main() -> int:
    """Train and print one line of JSON."""
    name, data, steps, warmup = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    loop, seconds, loss = PlainLoop(name, data), [], torch.zeros(())
    loop.config = replace(loop.config, train=replace(loop.config.train, steps=steps))
    for step in range(1, steps + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = loop.step(step)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if "--profile" in sys.argv:
        profile(loop, steps + 1)
    t = loop.config.train
    print(
        json.dumps(
            {
                "tokens": t.sequences_per_shard * t.seq_len,
                "seconds": seconds[warmup:],
                "gib": torch.cuda.max_memory_reserved() / 2**30,
                "loss": float(loss),
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
