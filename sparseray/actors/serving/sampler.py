"""From the logits of one position to one token: masks, penalties, temperature, cuts of the tail, log probabilities.

The last part of a request's step. Pure functions of a request's own logits, seed and position: the random
number is drawn from a counter-based generator (Philox, Salmon et al. 2011) keyed by seed and position, so no
state is kept, no order of requests matters, and another engine can go on where one was lost.

Shapes: V vocabulary. Everything is float64 on the host, so sums do not depend on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseray.actors.serving.text_request import GenerationRequest, TokenLogprobs

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


def check_finite(logits_V: Float64) -> None:
    """Raise FloatingPointError if a logit is NaN or infinite."""
    if not np.isfinite(logits_V).all():
        raise FloatingPointError("the model's logits are not finite; its weights or rows are damaged")


def log_probabilities(logits_V: NDArray[Any]) -> Float64:
    """Return the log softmax of logits [V] as float64.

    Raises:
        FloatingPointError: a logit is NaN or infinite.
    """
    shifted_V = np.asarray(logits_V, dtype=np.float64)
    check_finite(shifted_V)
    shifted_V = shifted_V - shifted_V.max()
    return np.asarray(shifted_V - np.log(np.exp(shifted_V).sum()), dtype=np.float64)


def adjusted(
    logits_V: NDArray[Any],
    request: GenerationRequest,
    tokens: Sequence[int],
    mask_V: NDArray[np.bool_] | None,
) -> Float64:
    """Return the logits [V] after a request's masks, biases and penalties, in the order in which vLLM does them.

    Args:
        logits_V: of the model.
        request: whose continuation it is.
        tokens: its prompt and what was added so far.
        mask_V: tokens that its grammar allows; None without one.

    Raises:
        FloatingPointError: a logit is NaN or infinite.
    """
    scores_V = np.array(logits_V, dtype=np.float64)
    check_finite(scores_V)
    added = np.array(tokens[len(request.prompt_tokens) :], dtype=np.int64)
    if mask_V is not None:
        scores_V[~mask_V] = -np.inf
    if request.allowed_token_ids:
        is_barred_V = np.ones(scores_V.size, dtype=np.bool_)
        is_barred_V[list(request.allowed_token_ids)] = False
        scores_V[is_barred_V] = -np.inf
    for word in request.bad_words:
        start = len(word) - 1
        if start <= added.size and tuple(added[added.size - start :].tolist()) == word[:-1]:
            scores_V[word[-1]] = -np.inf
    if added.size < request.min_tokens:
        scores_V[list(request.stop_token_ids)] = -np.inf
    for token, bias in request.logit_bias:
        scores_V[token] += bias
    if request.repetition_penalty != 1.0:
        seen = np.unique(np.array(tokens, dtype=np.int64))
        values = scores_V[seen]
        penalty = request.repetition_penalty
        scores_V[seen] = np.where(values > 0, values / penalty, values * penalty)
    if added.size and (request.frequency_penalty or request.presence_penalty):
        used, counts = np.unique(added, return_counts=True)
        scores_V[used] -= request.frequency_penalty * counts + request.presence_penalty
    return scores_V


def sample(scores_V: Float64, request: GenerationRequest, *, position: int) -> int | None:
    """Return the next token; None where every token is barred.

    Args:
        scores_V: logits, from `adjusted`.
        request: its temperature (0 takes the best token, the lowest id on ties), min_p, top_k, top_p and seed.
        position: of the token in its sequence, prompt included.
    """
    best = int(scores_V.argmax())
    if scores_V[best] == -np.inf:
        return None
    if request.temperature == 0.0:
        return best
    with np.errstate(under="ignore", over="ignore"):
        weights_V = np.exp((scores_V - scores_V[best]) / request.temperature)
    weights_V[weights_V < request.min_p] = 0.0
    if request.top_p < 1.0 or 0 < request.top_k < weights_V.size:
        order_V = np.argsort(-weights_V, kind="stable")[: request.top_k or weights_V.size]
        total_V = weights_V[order_V].cumsum()
        kept = int(np.searchsorted(total_V, request.top_p * total_V[-1])) + 1
        order_V, total_V = order_V[:kept], total_V[:kept]
    else:
        order_V, total_V = np.arange(weights_V.size), weights_V.cumsum()
    drawn = int(np.searchsorted(total_V, uniform(request.seed, position) * total_V[-1], side="right"))
    return int(order_V[min(drawn, order_V.size - 1)])


def token_logprobs(logprobs_V: Float64, token_id: int, top: int) -> TokenLogprobs:
    """Return the log probabilities of a token and of the `top` best tokens (lowest id first on ties).

    Args:
        logprobs_V: float64, natural logarithms.
        token_id: that was drawn.
        top: how many.
    """
    top = min(top, logprobs_V.size)
    best: list[int] = []
    if top:
        threshold = np.partition(logprobs_V, -top)[-top]
        candidates = np.flatnonzero(logprobs_V >= threshold)
        best = candidates[np.argsort(-logprobs_V[candidates], kind="stable")][:top].tolist()
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(logprobs_V[token_id]),
        rank=int((logprobs_V >= logprobs_V[token_id]).sum()),
        top=tuple((token, float(logprobs_V[token])) for token in best),
    )
