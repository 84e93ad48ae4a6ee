"""Choosing the next token: pure functions of logits, settings, seed and position.

The generator is counter-based (Philox, keyed by seed and position), so a draw depends neither on
earlier draws nor on what else is in the batch, and a request that moves to another worker goes on
with the tokens it would have had.
"""

import numpy as np

from sparseray.actors.generation import TokenLogprobs


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """Log-probabilities in fp64, [V]."""
    shifted = logits_V.astype(np.float64) - float(logits_V.max())
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result


def sample(logits_V: np.ndarray, *, temperature: float, top_p: float, seed: int, position: int) -> int:
    """Choose a token.

    Args:
        logits_V: fp32.
        temperature: 0 takes the most probable token, the lowest id among equals.
        top_p: in (0, 1]; the token that crosses it is still in.
        seed, position: key of the draw.
    """
    if temperature == 0.0:
        return int(logits_V.argmax())
    probabilities = np.exp(log_softmax(logits_V / np.float32(temperature)))
    # Stable, so equal probabilities keep the order of their ids.
    order = np.argsort(-probabilities, kind="stable")
    mass = np.cumsum(probabilities[order])
    kept = len(mass) if top_p >= 1.0 else int(np.searchsorted(mass, top_p)) + 1
    kept = min(kept, len(mass))
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, position], dtype=np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key)).random() * mass[kept - 1]
    return int(order[min(int(np.searchsorted(mass[:kept], draw, side="right")), kept - 1)])


def token_logprobs(logits_V: np.ndarray, token: int, num: int) -> TokenLogprobs:
    """Log-probability of a token and of the `num` most probable ones, at temperature 1."""
    logprobs = log_softmax(logits_V)
    best = np.argsort(-logprobs, kind="stable")[:num]
    return TokenLogprobs(
        token=token, logprob=float(logprobs[token]), top=tuple((int(t), float(logprobs[t])) for t in best)
    )
