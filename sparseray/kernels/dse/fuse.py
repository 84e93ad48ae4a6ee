"""Compiled fusion of memory rows into the hidden state on a CPU, fp32, for serving: gate, norm, convolution.

Row after row of a sequence, after the history that its slot keeps; so a row's bits do not depend on where a prompt
was cut into chunks. Follows arXiv 2601.07372 eq. 4 and 5; the plain reference is its oracle.

Shapes: R rows, B sequences, H hidden, S slots, L history, K taps.
"""

from __future__ import annotations

import math

import numpy as np

from sparseray.kernels.attention.cpu import ZERO, compiled
from sparseray.kernels.dse.reference import SIGNED_SQRT_FLOOR

ONE, FLOOR = np.float32(1.0), np.float32(SIGNED_SQRT_FLOOR)


@compiled
def rms_factor(x_H, eps):
    """1 / sqrt(mean of x^2 + eps)."""
    total = ZERO
    for h in range(x_H.shape[0]):
        total += x_H[h] * x_H[h]
    return ONE / np.sqrt(total / np.float32(x_H.shape[0]) + np.float32(eps))


@compiled
def fuse_rows(
    h_RH,
    key_value_RH,
    norms,
    conv_HK,
    dilation,
    gate_eps,
    conv_eps,
    histories_SLH,
    slots_B,
    bounds_B,
    starts_R,
    out_RH,
):
    """SiLU(conv(norm(gate * value))) + gate * value; the histories move on by the rows.

    Args:
        key_value_RH: keys, then values.
        norms: weights of the norms of the hidden state, of the key and of the gated value.
        starts_R: documents' first tokens; may be empty.
    """
    H, taps, reach = h_RH.shape[1], conv_HK.shape[1], histories_SLH.shape[1]
    scale = np.float32(H**-0.5)
    gated_H, normed_H = np.empty(H, np.float32), np.empty(H, np.float32)
    for b in range(slots_B.shape[0]):
        history_LH = histories_SLH[slots_B[b]]
        for r in range(bounds_B[b], bounds_B[b + 1]):
            key_H, value_H = key_value_RH[r, :H], key_value_RH[r, H:]
            by_h, by_key = rms_factor(h_RH[r], gate_eps), rms_factor(key_H, gate_eps)
            score = ZERO
            for h in range(H):
                score += h_RH[r, h] * by_h * norms[0][h] * (key_H[h] * by_key * norms[1][h])
            score *= scale
            size = abs(score)
            size = FLOOR if size < FLOOR else size
            root = ZERO if score == ZERO else np.sqrt(size) if score > ZERO else -np.sqrt(size)
            gate = ONE / (ONE + math.exp(-root))
            for h in range(H):
                gated_H[h] = gate * value_H[h]
            factor = rms_factor(gated_H, conv_eps)
            if starts_R.shape[0] and starts_R[r]:
                history_LH[:] = ZERO
            for h in range(H):
                normed_H[h] = gated_H[h] * factor * norms[2][h]
                y = normed_H[h] * conv_HK[h, taps - 1]
                for j in range(1, taps):
                    y += history_LH[reach - j * dilation, h] * conv_HK[h, taps - 1 - j]
                out_RH[r, h] = y / (ONE + math.exp(-y)) + gated_H[h]
            for i in range(reach - 1):
                history_LH[i] = history_LH[i + 1]
            if reach:
                history_LH[reach - 1] = normed_H
