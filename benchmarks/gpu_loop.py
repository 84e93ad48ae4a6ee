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
from sparseray.actors.training.token_data import TokenDataset, batch
from sparseray.kernels.dense.adamw import adamw_step
from sparseray.kernels.dense.squared_norm import clip_scale, squared_norm
from sparseray.kernels.ops import ops_for
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer, cross_entropy_sum
from sparseray.platform.config import load_yaml
from sparseray.platform.planning.schedule import learning_rate

ROOT = Path(__file__).resolve().parent.parent


class Weight:
    """A parameter in bf16, or in fp32 where the product computes in it, with its fp32 master and moments."""

    def __init__(self, name: str, parameter: nn.Parameter, moments: torch.dtype) -> None:
        self.master = parameter.detach().float()
        if not computes_in_fp32(name):
            parameter.data = parameter.data.to(torch.bfloat16)
        self.parameter = parameter
        self.first, self.second = (torch.zeros_like(self.master, dtype=moments) for _ in range(2))
        self.decays = parameter.ndim >= 2


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
        self.weights = [Weight(name, parameter, torch.bfloat16) for name, parameter in named]

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
        gradients = [w.parameter.grad for w in self.weights]
        scale = clip_scale(squared_norm([g for g in gradients if g is not None]), optim.clip)
        for weight, gradient in zip(self.weights, gradients):
            if gradient is not None:
                adamw_step(
                    weight.master,
                    weight.first,
                    weight.second,
                    gradient.contiguous(),
                    copy=weight.parameter.data,
                    scale=scale,
                    lr=learning_rate(step, optim, self.config.train.steps),
                    betas=(optim.beta1, optim.beta2),
                    eps=optim.eps,
                    weight_decay=optim.weight_decay if weight.decays else 0.0,
                    step=step,
                )
            weight.parameter.grad = None
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
