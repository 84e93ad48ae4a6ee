"""Compiled counter-based random numbers: Philox4x64-10 (Salmon et al. 2011), whose first output numpy draws too."""

from __future__ import annotations

import numba
import numpy as np

_LOW, _HALF, _EIGHTH = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(11)
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_WEYL = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_ONE, _ZERO = np.uint64(1), np.uint64(0)


@numba.njit(cache=True, nogil=True)
def _multiply(a, b):
    """(high, low) 64 bits of the product."""
    a0, a1, b0, b1 = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a1 * b0 + ((a0 * b0) >> _HALF)
    other = (middle & _LOW) + a0 * b1
    return a1 * b1 + (middle >> _HALF) + (other >> _HALF), a * b


@numba.njit(cache=True, nogil=True)
def philox(keys_N2):
    """Numbers in [0, 1), float64 [N], of uint64 pairs of a seed and a position."""
    found = np.empty(keys_N2.shape[0], np.float64)
    for n in range(keys_N2.shape[0]):
        key0, key1 = keys_N2[n, 0], keys_N2[n, 1]
        # numpy counts from 1.
        c0, c1, c2, c3 = _ONE, _ZERO, _ZERO, _ZERO
        for _ in range(10):
            high0, low0 = _multiply(_MULTIPLIERS[0], c0)
            high1, low1 = _multiply(_MULTIPLIERS[1], c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
            key0, key1 = key0 + _WEYL[0], key1 + _WEYL[1]
        found[n] = (c0 >> _EIGHTH) * 2.0**-53
    return found
