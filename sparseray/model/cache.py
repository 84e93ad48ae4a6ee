"""What inference keeps of one sequence: keys and values of every branch, and the memory's short histories.

A full-attention layer keeps all keys and values. An NSA layer keeps compressed keys and values (one in
`stride`), selection keys and values, a ring of the window's, and the raw keys and values that the next
compressed token still needs. A memory layer keeps the inputs that its convolution reaches back to; the token
history of the n-grams is kept once. Everything is allocated when the cache is made.

Shapes: S positions, C compressed tokens, W window, L raw tail, G key/value heads, D and V head sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.nsa.reference import num_compressed
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import NO_TOKEN


class FullCache:
    """Keys and values of a full-attention layer, [S, G, D] and [S, G, V]."""

    def __init__(self, config: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = config.num_kv_heads
        self.k_SGD = torch.zeros(max_len, heads, config.head_dim, dtype=dtype, device=device)
        self.v_SGV = torch.zeros(max_len, heads, config.value_dim, dtype=dtype, device=device)

    def append(self, length: int, k_TGD: Tensor, v_TGV: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk that starts at position `length`; return all keys and values so far."""
        end = length + k_TGD.shape[0]
        self.k_SGD[length:end] = k_TGD
        self.v_SGV[length:end] = v_TGV
        return self.k_SGD[:end], self.v_SGV[:end]

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.k_SGD, self.v_SGV]


class NSACache:
    """Keys and values of the three branches of an NSA layer."""

    def __init__(self, config: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        nsa, heads = config.nsa, config.num_kv_heads
        self.window, self.block, self.stride = nsa.window, nsa.block, nsa.stride
        compressed = num_compressed(max_len, nsa.block, nsa.stride)

        def pair(length: int) -> tuple[Tensor, Tensor]:
            return (
                torch.zeros(length, heads, config.head_dim, dtype=dtype, device=device),
                torch.zeros(length, heads, config.value_dim, dtype=dtype, device=device),
            )

        self.k_cmp_CGD, self.v_cmp_CGV = pair(compressed)
        self.k_slc_SGD, self.v_slc_SGV = pair(max_len)
        self.k_win_WGD, self.v_win_WGV = pair(min(nsa.window, max_len))
        self.k_raw_LGD, self.v_raw_LGV = pair(nsa.block)

    def tail(self, length: int, k_TGD: Tensor, v_TGV: Tensor) -> tuple[Tensor, Tensor, int]:
        """Join the kept raw keys and values with a chunk's and keep what the next blocks need.

        Returns:
            (keys, values, index of the compressed token that starts at the first of them).
        """
        first = num_compressed(length, self.block, self.stride)
        kept = length - first * self.stride
        k = torch.cat([self.k_raw_LGD[:kept], k_TGD])
        v = torch.cat([self.v_raw_LGV[:kept], v_TGV])
        end = length + k_TGD.shape[0]
        left = end - num_compressed(end, self.block, self.stride) * self.stride
        self.k_raw_LGD[:left] = k[k.shape[0] - left :]
        self.v_raw_LGV[:left] = v[v.shape[0] - left :]
        return k, v, first

    def append_compressed(self, first: int, k_CGD: Tensor, v_CGV: Tensor) -> tuple[Tensor, Tensor]:
        """Store compressed tokens from index `first`; return all so far."""
        end = first + k_CGD.shape[0]
        self.k_cmp_CGD[first:end] = k_CGD
        self.v_cmp_CGV[first:end] = v_CGV
        return self.k_cmp_CGD[:end], self.v_cmp_CGV[:end]

    def append_selection(self, length: int, k_TGD: Tensor, v_TGV: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk of the selection branch; return all keys and values so far."""
        end = length + k_TGD.shape[0]
        self.k_slc_SGD[length:end] = k_TGD
        self.v_slc_SGV[length:end] = v_TGV
        return self.k_slc_SGD[:end], self.v_slc_SGV[:end]

    def append_window(self, length: int, k_TGD: Tensor, v_TGV: Tensor) -> tuple[Tensor, Tensor, int]:
        """Join the ring's keys and values with a chunk's and store the chunk's last ones in the ring.

        Returns:
            (keys, values, absolute position of the first).
        """
        size, device = self.k_win_WGD.shape[0], k_TGD.device
        start = max(0, length - self.window + 1)
        old = torch.arange(start, length, device=device) % size
        k = torch.cat([self.k_win_WGD[old], k_TGD])
        v = torch.cat([self.v_win_WGV[old], v_TGV])
        end = length + k_TGD.shape[0]
        kept = min(size, k_TGD.shape[0])
        new = torch.arange(end - kept, end, device=device) % size
        self.k_win_WGD[new] = k_TGD[k_TGD.shape[0] - kept :]
        self.v_win_WGV[new] = v_TGV[v_TGV.shape[0] - kept :]
        return k, v, start

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [
            self.k_cmp_CGD,
            self.v_cmp_CGV,
            self.k_slc_SGD,
            self.v_slc_SGV,
            self.k_win_WGD,
            self.v_win_WGV,
            self.k_raw_LGD,
            self.v_raw_LGV,
        ]


class Cache:
    """The cache of ONE sequence.

    Args:
        config: of the model.
        max_len: positions that it can hold, at most `config.max_seq_len`.
        dtype, device: of the keys and values.

    Attributes:
        length: tokens stored so far.

    Raises:
        ConfigError: max_len is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= max_len <= config.max_seq_len:
            raise ConfigError(
                f"cache length {max_len} is outside 1..model.max_seq_len={config.max_seq_len}; shorten the"
                " request or raise max_seq_len"
            )
        device = torch.device(device)
        self.config, self.max_len, self.length = config, max_len, 0
        self.layers: list[FullCache | NSACache] = [
            (NSACache if kind == "nsa" else FullCache)(config, max_len, dtype, device)
            for kind in config.attention
        ]
        dse = config.dse
        look_back = max(dse.orders) - 1
        reach = (dse.kernel_size - 1) * max(dse.orders)
        self.tokens_L = torch.full((look_back,), NO_TOKEN, dtype=torch.int64, device=device)
        self.conv = {
            layer: torch.zeros(reach, config.hidden, dtype=torch.float32, device=device)
            for layer in dse.layers
        }
        self.last_token = NO_TOKEN

    def room(self, tokens: int) -> None:
        """Check that a chunk fits.

        Raises:
            ConfigError: it does not.
        """
        if self.length + tokens > self.max_len:
            raise ConfigError(
                f"a chunk of {tokens} tokens does not fit a cache of {self.max_len} that holds {self.length};"
                " make the cache longer"
            )

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        stored = [t for layer in self.layers for t in layer.tensors()]
        stored += [self.tokens_L, *self.conv.values()]
        return sum(t.numel() * t.element_size() for t in stored)
