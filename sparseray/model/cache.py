"""What inference keeps of one sequence: what each layer's attention keeps, and the memory's short histories.

A memory layer keeps the inputs that its convolution reaches back to; the token history of the n-grams is kept
once. Everything is allocated when the cache is made.
"""

from __future__ import annotations

import torch

from sparseray.errors import ConfigError
from sparseray.model.attention import LayerCache, attention_of
from sparseray.model.config import ModelConfig
from sparseray.model.dse_layout import NO_TOKEN


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
        self.layers: list[LayerCache] = [
            attention_of(config, layer).new_cache(config, max_len, dtype, device)
            for layer in range(config.num_layers)
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
