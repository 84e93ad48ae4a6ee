"""The learning rate of a step: pure functions of its number. Read by the training loop before every commit."""

import math

from sparseray.platform.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """Linear warm-up, then a cosine to `min_lr_ratio`; `step` counts from 1.

    Args:
        step: from 1.
        optim: peak rate, warm-up and floor.
        steps: of the whole run.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
