"""The sampler on the model's device: the same choices as sampler.py, for many requests at once.

A row's token follows from its own logits, request, seed and position: rows that cut their tail are sorted, the
others are drawn by one operation, whatever else is in the batch. The random numbers are those of `sampler.uniform`,
computed for all rows together while the device is busy with the logits. Grammars, lists of allowed tokens, forbidden words and log
probabilities stay with the sampler on the host.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.paged import NO_TOKEN, Draws
from sparseray.kernels.paged_ops import PagedOps
from sparseray.kernels.philox import philox
from sparseray.model.transformer import Transformer

FAILED = NO_TOKEN
WAYS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"presence_penalty": 1.0})
"""Requests that between them choose tokens in all ways that there are."""


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


def is_sorted(request: GenerationRequest, vocab: int) -> bool:
    """Whether the tail of a request's distribution is cut, which needs its tokens in order of their probability.

    Args:
        request: whose top_p and top_k count.
        vocab: tokens of the model.
    """
    return request.temperature > 0.0 and (request.top_p < 1.0 or 0 < request.top_k < vocab)


def numbers_of(requests: Sequence[GenerationRequest], positions: Sequence[int]) -> Tensor:
    """The random numbers of some places, float64 [R] on the host; 0 where nothing is drawn.

    Args:
        requests: one for each place.
        positions: of the new tokens in their sequences, prompts included.
    """
    found = np.zeros(len(requests))
    drawn = [row for row, request in enumerate(requests) if request.temperature > 0.0]
    if drawn:
        found[drawn] = uniforms([requests[row].seed for row in drawn], [positions[row] for row in drawn])
    return torch.from_numpy(found)


def sample_rows(
    logits_RV: Tensor,
    requests: Sequence[GenerationRequest],
    tokens: Sequence[Sequence[int]],
    numbers_R: Tensor,
    ops: PagedOps = REFERENCE,
) -> Tensor:
    """Choose the next token of every row, without waiting for the device.

    Args:
        logits_RV: of the model.
        requests: that `fits`.
        tokens: of each request, its prompt and what was added.
        numbers_R: float64, of `numbers_of`; on the host or on the device.
        ops: finds the most probable tokens, and draws.

    Returns:
        int64 [R] on the device; `FAILED` where the logits are not finite.
    """
    vocab, device = logits_RV.shape[1], logits_RV.device
    is_changed = [is_adjusted(request, known) for request, known in zip(requests, tokens)]
    if all(r.temperature == 0.0 for r in requests) and not any(is_changed):
        return ops.most_probable(logits_RV)
    settings = torch.tensor(
        [[r.temperature for r in requests], [r.min_p for r in requests]], dtype=torch.float64
    )
    temperature_R, min_p_R = settings.to(device, non_blocking=True)
    draws = Draws(
        temperature_R=temperature_R, min_p_R=min_p_R, number_R=numbers_R.to(device, non_blocking=True)
    )
    others = [row for row, r in enumerate(requests) if is_changed[row] or is_sorted(r, vocab)]
    if not others:
        return ops.draw(logits_RV, draws)
    if len(others) == len(requests):
        return _sample_others(logits_RV.to(torch.float64, copy=True), requests, tokens, draws)
    at_N = torch.tensor(others).to(device, non_blocking=True)
    chosen, known = [requests[row] for row in others], [tokens[row] for row in others]
    found_N = _sample_others(logits_RV[at_N].double(), chosen, known, _of_rows(draws, at_N))
    return ops.draw(logits_RV, draws).index_copy(0, at_N, found_N)


def _of_rows(draws: Draws, at_N: Tensor) -> Draws:
    return Draws(
        temperature_R=draws.temperature_R[at_N], min_p_R=draws.min_p_R[at_N], number_R=draws.number_R[at_N]
    )


@torch.no_grad()
def sample_all_ways(model: Transformer) -> None:
    """Choose tokens of nobody: no request shall wait for what is compiled or loaded at the first of its kind.

    Args:
        model: whose sizes and operations count.
    """
    logits_RV = model.logits(model.embedding[:1])
    for way in WAYS:
        request = GenerationRequest(request_id="", prompt_tokens=(0,), max_tokens=1, **way)
        sample_rows(logits_RV, [request], [[0]], numbers_of([request], [1]), model.ops)


def _sample_others(
    scores_RV: Tensor,
    requests: Sequence[GenerationRequest],
    tokens: Sequence[Sequence[int]],
    draws: Draws,
) -> Tensor:
    """Tokens of rows whose logits are changed first, or whose tail is cut."""
    is_finite_R = scores_RV.isfinite().all(-1)
    _adjust(scores_RV, requests, tokens)
    cut = [row for row, request in enumerate(requests) if is_sorted(request, scores_RV.shape[1])]
    if len(cut) == len(requests):
        token_R = _draw_sorted(scores_RV, requests, draws)
    else:
        # What is barred is minus infinity now, which `draw` takes for damage.
        token_R = REFERENCE.draw(scores_RV.clamp_min(torch.finfo(torch.float64).min), draws)
        if cut:
            at_N = torch.tensor(cut).to(scores_RV.device, non_blocking=True)
            chosen = [requests[row] for row in cut]
            found_N = _draw_sorted(scores_RV[at_N], chosen, _of_rows(draws, at_N))
            token_R = token_R.index_copy(0, at_N, found_N)
    return torch.where(is_finite_R, token_R, FAILED)


def _draw_sorted(scores_RV: Tensor, requests: Sequence[GenerationRequest], draws: Draws) -> Tensor:
    """Draw a token for every row from those that top_k and top_p leave, the most probable ones first."""
    V = scores_RV.shape[1]
    settings = torch.tensor(
        [[r.top_p for r in requests], [float(r.top_k or V) for r in requests]], dtype=torch.float64
    )
    top_p, top_k = settings.to(scores_RV.device, non_blocking=True)[:, :, None]
    best_R1 = scores_RV.max(-1, keepdim=True).values
    weights_RV = torch.exp((scores_RV - best_R1) / draws.temperature_R[:, None])
    weights_RV = weights_RV.masked_fill(weights_RV < draws.min_p_R[:, None], 0.0)
    weights_RV, order_RV = weights_RV.sort(dim=-1, descending=True, stable=True)
    weights_RV = weights_RV.masked_fill(torch.arange(V, device=scores_RV.device) >= top_k, 0.0)
    total_RV = weights_RV.cumsum(-1)
    kept_R1 = torch.searchsorted(total_RV, top_p * total_RV[:, -1:]).clamp(max=V - 1)
    wanted_R1 = draws.number_R[:, None] * total_RV.gather(1, kept_R1)
    drawn_R1 = torch.searchsorted(total_RV, wanted_R1, right=True).clamp(max=V - 1)
    return order_RV.gather(1, drawn_R1)[:, 0]
