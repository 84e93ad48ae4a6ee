"""YaRN: the frequencies of the rotary encoding for sequences longer than a model was trained on.

Fast channels keep their frequency, slow ones are slowed down by the factor, those between are blended; queries and
keys grow a little with the factor. Source: arXiv 2309.00071 sections 3.2 and 3.4, with the constants and the two
magnitudes of DeepSeek-V2's and V3's released code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseray.model.config import RopeConfig


def frequencies(rope: RopeConfig, theta: float, width: int) -> Tensor:
    """Radians a position of every pair of channels, fp64 [width / 2].

    Args:
        rope: scaling of the model.
        theta: base.
        width: channels that are turned.
    """
    plain = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if rope.scaling == "none":
        return plain

    def pair_of(turns: float) -> float:
        """The pair of channels that turns so often within the trained length."""
        return width * math.log(rope.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(rope.beta_fast)), 0)
    high = min(math.ceil(pair_of(rope.beta_slow)), width - 1)
    # The released code keeps the ramp from dividing by zero in this way.
    span = high - low or 0.001
    slowed = ((torch.arange(width // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return plain * (1 - slowed) + plain / rope.factor * slowed


def magnitude(rope: RopeConfig, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1; 1 without scaling."""
    return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.scaling == "yarn" else 1.0


def rotary_scale(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied with."""
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope, rope.mscale) / magnitude(rope, rope.mscale_all_dim)
    return magnitude(rope, 1.0)


def score_scale(rope: RopeConfig) -> float:
    """What scores are multiplied with beside 1 / sqrt(D)."""
    return magnitude(rope, rope.mscale_all_dim) ** 2
