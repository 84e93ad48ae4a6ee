"""From the logits of one position to one token: temperature, top-p, log probabilities.

The last part of a request's step. Pure functions of a request's own logits, seed and position: the random
number is drawn from a counter-based generator (Philox, Salmon et al. 2011) keyed by seed and position, so no
state is kept, no order of requests matters, and another engine can go on where one was lost.

Shapes: V vocabulary. Everything is float64 on the host, so sums do not depend on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseray.actors.serving.text_request import TokenLogprobs

Float64 = NDArray[np.float64]
_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of a seed and a position.

    Args:
        seed: any integer, taken modulo 2**64.
        position: of the token in its sequence, prompt included.
    """
    key = np.array([seed & _MASK, position & _MASK], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def log_probabilities(logits_V: NDArray[Any]) -> Float64:
    """Return the log softmax of logits [V] as float64.

    Raises:
        FloatingPointError: a logit is NaN or infinite.
    """
    shifted_V = np.asarray(logits_V, dtype=np.float64)
    if not np.isfinite(shifted_V).all():
        raise FloatingPointError("the model's logits are not finite; its weights or rows are damaged")
    shifted_V = shifted_V - shifted_V.max()
    return np.asarray(shifted_V - np.log(np.exp(shifted_V).sum()), dtype=np.float64)


def sample(logprobs_V: Float64, *, temperature: float, top_p: float, seed: int, position: int) -> int:
    """Return the next token.

    Args:
        logprobs_V: from `log_probabilities`.
        temperature: at least 0; 0 takes the most probable token, the lowest id on ties.
        top_p: in (0, 1].
        seed, position: of the random number.
    """
    best = int(logprobs_V.argmax())
    if temperature == 0.0:
        return best
    with np.errstate(under="ignore", over="ignore"):
        weights_V = np.exp((logprobs_V - logprobs_V[best]) / temperature)
    if top_p < 1.0:
        order_V = np.argsort(-weights_V, kind="stable")
        total_V = weights_V[order_V].cumsum()
        kept = int(np.searchsorted(total_V, top_p * total_V[-1])) + 1
        order_V, total_V = order_V[:kept], total_V[:kept]
    else:
        order_V, total_V = np.arange(weights_V.size), weights_V.cumsum()
    drawn = int(np.searchsorted(total_V, uniform(seed, position) * total_V[-1], side="right"))
    return int(order_V[min(drawn, order_V.size - 1)])


def token_logprobs(logprobs_V: Float64, token_id: int, top: int) -> TokenLogprobs:
    """Return the log probabilities of a token and of the `top` best tokens (lowest id first on ties)."""
    top = min(top, logprobs_V.size)
    best: list[int] = []
    if top:
        threshold = np.partition(logprobs_V, -top)[-top]
        candidates = np.flatnonzero(logprobs_V >= threshold)
        best = candidates[np.argsort(-logprobs_V[candidates], kind="stable")][:top].tolist()
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(logprobs_V[token_id]),
        top=tuple((token, float(logprobs_V[token])) for token in best),
    )
