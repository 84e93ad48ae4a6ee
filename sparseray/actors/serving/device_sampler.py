"""The sampler on the model's device: the same choices as sampler.py, for many requests at once.

A row's token follows from its own logits, request, seed and position: rows that cut their tail are sorted, the
others are not, whatever else is in the batch. The random numbers are those of `sampler.uniform`, computed for all
rows together while the device is busy with the logits. Grammars, lists of allowed tokens, forbidden words and log
probabilities stay with the sampler on the host.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.paged import NO_TOKEN
from sparseray.kernels.paged_ops import PagedOps
from sparseray.kernels.philox import philox

FAILED = NO_TOKEN


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """`sampler.uniform` of many seeds and positions: the first output of Philox4x64-10 (Salmon et al. 2011).

    Args:
        seeds: of the requests, 64 bits each.
        positions: index of the drawn token in its answer, one for each seed.
    """
    mask = 2**64 - 1
    keys_N2 = np.array([(s & mask, p & mask) for s, p in zip(seeds, positions)], dtype=np.uint64)
    found: NDArray[np.float64] = philox(keys_N2.reshape(-1, 2))
    return found


def fits(request: GenerationRequest) -> bool:
    """Whether a request can be sampled here."""
    return not (
        request.grammar
        or request.allowed_token_ids
        or request.bad_words
        or request.logprobs is not None
        or request.prompt_logprobs is not None
        or request.max_tokens == 0
    )


def is_adjusted(request: GenerationRequest, tokens: Sequence[int]) -> bool:
    """Whether a request's logits are changed by what was added so far, or by its biases.

    Args:
        request: whose penalties and biases count.
        tokens: of its prompt and answer so far.
    """
    is_penalised = request.repetition_penalty != 1.0 or request.frequency_penalty or request.presence_penalty
    few = len(tokens) - len(request.prompt_tokens) < request.min_tokens
    return bool(is_penalised or request.logit_bias or (few and request.stop_token_ids))


def _changes(
    request: GenerationRequest, tokens: Sequence[int], vocab: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that a request's settings change, and for each (added, divisor, subtracted)."""
    added = np.array(tokens[len(request.prompt_tokens) :], dtype=np.int64)
    table = np.zeros((3, vocab))
    table[1] = 1.0
    touched = [added] if request.frequency_penalty or request.presence_penalty else []
    if added.size < request.min_tokens:
        table[0, list(request.stop_token_ids)] = -np.inf
        touched.append(np.array(request.stop_token_ids, dtype=np.int64))
    for token, bias in request.logit_bias:
        table[0, token] += bias
        touched.append(np.array([token]))
    if request.repetition_penalty != 1.0:
        seen = np.array(tokens, dtype=np.int64)
        table[1, seen] = request.repetition_penalty
        touched.append(seen)
    if touched and (request.frequency_penalty or request.presence_penalty):
        used, counts = np.unique(added, return_counts=True)
        table[2, used] = request.frequency_penalty * counts + request.presence_penalty
    at = np.unique(np.concatenate(touched))
    return at, table[:, at]


def _adjust(
    scores_RV: Tensor, requests: Sequence[GenerationRequest], tokens: Sequence[Sequence[int]]
) -> None:
    """Apply biases and penalties in place, in the order of `sampler.adjusted`."""
    rows, at, values = [], [], []
    for row, (request, known) in enumerate(zip(requests, tokens)):
        if is_adjusted(request, known):
            found, changes = _changes(request, known, scores_RV.shape[1])
            rows.append(np.full(found.size, row))
            at.append(found)
            values.append(changes)
    if not rows:
        return
    device = scores_RV.device
    row_N, at_N = (torch.from_numpy(np.concatenate(x)).to(device, non_blocking=True) for x in (rows, at))
    changes_3N = torch.from_numpy(np.concatenate(values, 1)).to(device, non_blocking=True)
    bias_N, divisor_N, less_N = changes_3N
    score_N = scores_RV[row_N, at_N] + bias_N
    score_N = torch.where(score_N > 0, score_N / divisor_N, score_N * divisor_N) - less_N
    scores_RV[row_N, at_N] = score_N


def sample_rows(
    logits_RV: Tensor,
    requests: Sequence[GenerationRequest],
    tokens: Sequence[Sequence[int]],
    positions: Sequence[int],
    ops: PagedOps = REFERENCE,
) -> Tensor:
    """Choose the next token of every row, without waiting for the device.

    Args:
        logits_RV: of the model.
        requests: that `fits`.
        tokens: of each request, its prompt and what was added.
        positions: of the new tokens in their sequences, prompts included.
        ops: finds the most probable tokens.

    Returns:
        int64 [R] on the device; `FAILED` where the logits are not finite.
    """
    if all(r.temperature == 0.0 and not is_adjusted(r, t) for r, t in zip(requests, tokens)):
        return ops.most_probable(logits_RV)
    scores_RV = logits_RV.double()
    is_finite_R = scores_RV.isfinite().all(-1)
    _adjust(scores_RV, requests, tokens)
    best_R, token_R = scores_RV.max(-1)
    drawn = [row for row, request in enumerate(requests) if request.temperature > 0.0]
    cut = [row for row in drawn if requests[row].top_p < 1.0 or 0 < requests[row].top_k < scores_RV.shape[1]]
    for rows, is_cut in ((cut, True), (sorted(set(drawn) - set(cut)), False)):
        if rows:
            at_R = torch.tensor(rows).to(scores_RV.device, non_blocking=True)
            chosen = [requests[row] for row in rows]
            numbers = uniforms([r.seed for r in chosen], [positions[row] for row in rows])
            token_R[at_R] = _draw(scores_RV[at_R], best_R[at_R, None], chosen, numbers, is_cut=is_cut)
    return torch.where(is_finite_R, token_R, FAILED)


def _draw(
    scores_RV: Tensor,
    best_R1: Tensor,
    requests: Sequence[GenerationRequest],
    numbers_R: NDArray[np.float64],
    *,
    is_cut: bool,
) -> Tensor:
    """Draw a token for every row by its number in [0, 1), as `sampler.sample` does."""
    V = scores_RV.shape[1]
    settings = [[r.temperature for r in requests], [r.min_p for r in requests]]
    settings += [[r.top_p for r in requests], [float(r.top_k or V) for r in requests], numbers_R.tolist()]
    values = torch.tensor(settings, dtype=torch.float64).to(scores_RV.device, non_blocking=True)
    temperature, min_p, top_p, top_k, number = values[:, :, None]
    weights_RV = torch.exp((scores_RV - best_R1) / temperature)
    weights_RV = weights_RV.masked_fill(weights_RV < min_p, 0.0)
    order_RV = None
    if is_cut:
        weights_RV, order_RV = weights_RV.sort(dim=-1, descending=True, stable=True)
        weights_RV = weights_RV.masked_fill(torch.arange(V, device=values.device) >= top_k, 0.0)
    total_RV = weights_RV.cumsum(-1)
    last_R1 = total_RV[:, -1:]
    if is_cut:
        kept_R1 = torch.searchsorted(total_RV, top_p * last_R1).clamp(max=V - 1)
        last_R1 = total_RV.gather(1, kept_R1)
    drawn_R1 = torch.searchsorted(total_RV, number * last_R1, right=True).clamp(max=V - 1)
    return (drawn_R1 if order_RV is None else order_RV.gather(1, drawn_R1))[:, 0]
