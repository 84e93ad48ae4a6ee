"""Compiled dense operations on a CPU, fp32, for serving: products with weights, norms, rotary encoding, SwiGLU.

A row's bits depend on the row alone, whatever the number of rows: all run through the same four lanes of a block, and
the last block repeats a row instead of running shorter. The loops release the interpreter lock.

Shapes: R rows, I inputs, O outputs, H hidden, D channels of a head.
"""

from __future__ import annotations

import math

import numpy as np

from sparseray.kernels.attention.cpu import ZERO, compiled

ONE = np.float32(1.0)


@compiled
def linear(x_RI, w_OI, b_O, y_RO):
    """y = x @ w.T + b, where b may be empty."""
    R, num_in, O = x_RI.shape[0], x_RI.shape[1], w_OI.shape[0]
    for o in range(0, O, 4):
        o1, o2, o3 = min(o + 1, O - 1), min(o + 2, O - 1), min(o + 3, O - 1)
        for r in range(0, R, 4):
            r1, r2, r3 = min(r + 1, R - 1), min(r + 2, R - 1), min(r + 3, R - 1)
            s00, s01, s02, s03 = ZERO, ZERO, ZERO, ZERO
            s10, s11, s12, s13 = ZERO, ZERO, ZERO, ZERO
            s20, s21, s22, s23 = ZERO, ZERO, ZERO, ZERO
            s30, s31, s32, s33 = ZERO, ZERO, ZERO, ZERO
            for i in range(num_in):
                x0, x1, x2, x3 = x_RI[r, i], x_RI[r1, i], x_RI[r2, i], x_RI[r3, i]
                w0, w1, w2, w3 = w_OI[o, i], w_OI[o1, i], w_OI[o2, i], w_OI[o3, i]
                s00 += x0 * w0
                s01 += x0 * w1
                s02 += x0 * w2
                s03 += x0 * w3
                s10 += x1 * w0
                s11 += x1 * w1
                s12 += x1 * w2
                s13 += x1 * w3
                s20 += x2 * w0
                s21 += x2 * w1
                s22 += x2 * w2
                s23 += x2 * w3
                s30 += x3 * w0
                s31 += x3 * w1
                s32 += x3 * w2
                s33 += x3 * w3
            y_RO[r3, o3], y_RO[r3, o2], y_RO[r3, o1], y_RO[r3, o] = s33, s32, s31, s30
            y_RO[r2, o3], y_RO[r2, o2], y_RO[r2, o1], y_RO[r2, o] = s23, s22, s21, s20
            y_RO[r1, o3], y_RO[r1, o2], y_RO[r1, o1], y_RO[r1, o] = s13, s12, s11, s10
            y_RO[r, o3], y_RO[r, o2], y_RO[r, o1], y_RO[r, o] = s03, s02, s01, s00
    if b_O.shape[0]:
        for r in range(R):
            for o in range(O):
                y_RO[r, o] += b_O[o]


@compiled
def rms_norm(x_RH, weight_H, eps, y_RH):
    """y = x / sqrt(mean of x^2 + eps) * weight."""
    width = np.float32(x_RH.shape[1])
    for r in range(x_RH.shape[0]):
        total = ZERO
        for h in range(x_RH.shape[1]):
            total += x_RH[r, h] * x_RH[r, h]
        factor = ONE / np.sqrt(total / width + np.float32(eps))
        for h in range(x_RH.shape[1]):
            y_RH[r, h] = x_RH[r, h] * factor * weight_H[h]


@compiled
def rotate_heads(fused_RX, cos_RD, sin_RD, q_RQD, k_RGD):
    """The first heads of a fused projection; channel i turns with i + D / 2."""
    half, num_q = cos_RD.shape[1], q_RQD.shape[1]
    for r in range(q_RQD.shape[0]):
        for n in range(num_q + k_RGD.shape[1]):
            at, out_D = n * 2 * half, q_RQD[r, n] if n < num_q else k_RGD[r, n - num_q]
            for d in range(half):
                a, b = fused_RX[r, at + d], fused_RX[r, at + half + d]
                out_D[d] = a * cos_RD[r, d] - b * sin_RD[r, d]
                out_D[half + d] = b * cos_RD[r, d] + a * sin_RD[r, d]


@compiled
def swiglu(gate_up_RI, y_RI):
    """silu(first half) * second half."""
    inner = y_RI.shape[1]
    for r in range(y_RI.shape[0]):
        for i in range(inner):
            gate = gate_up_RI[r, i]
            y_RI[r, i] = gate / (ONE + math.exp(-gate)) * gate_up_RI[r, inner + i]


@compiled
def sigmoid(x_N, y_N):
    """1 / (1 + e^-x)."""
    for i in range(x_N.shape[0]):
        y_N[i] = ONE / (ONE + math.exp(-x_N[i]))
