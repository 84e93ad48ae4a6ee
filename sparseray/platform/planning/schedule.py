"""The learning rate of a step: pure functions of its number. Read by the training loop before every commit.

A run that goes on from a checkpoint's step has a schedule of its own, from its first step to its last.
"""

import math

from sparseray.platform.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, steps: int, begin: int = 0) -> float:
    """Linear warm-up, then what `optim.schedule` says, with `min_lr_ratio` of the peak as its floor.

    Args:
        step: from 1.
        optim: peak rate, warm-up, schedule and floor.
        steps: last one of the run.
        begin: step that the run goes on from.

    Source:
        cosine: Loshchilov and Hutter, arXiv 1608.03983; wsd (warm-up, stable, decay): Hu et al., arXiv 2404.06395.
    """
    step, steps = step - begin, steps - begin
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    floor = optim.lr * optim.min_lr_ratio
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        left = steps - step
        decay = optim.decay_steps or max(1, steps // 10)
        return floor + (optim.lr - floor) * min(1.0, max(0, left) / decay)
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return floor + (optim.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
