"""An expert shard: routed experts that compute rows for whoever asks, and train in place.

Forward and backward run per (step, logical shard, moe layer) on rows in a fixed order, one expert
after another, so no bit depends on which shard holds an expert. DeepSeekMoE, arXiv 2401.06066.
"""

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.state.adamw import AdamW
from sparseray.actors.state.tree import TreeSum
from sparseray.kernels.moe.reference import swiglu_backward, swiglu_forward
from sparseray.model.config import ModelConfig
from sparseray.model.init import EXPERT_PARTS, expert_name, expert_shape, initial_expert

Key = tuple[int, int]


class ExpertShard:
    """The experts that one slot holds.

    A replica comes by `initialize` or `load`; `assign` says which replicas count and which compute.
    What is held but no longer assigned stays readable until `trim`, so that a peer can still copy it.

    Args:
        config: the model.
        seed, num_shards, betas, eps, weight_decay: as in `DenseState`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int,
        num_shards: int,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.config, self.seed = config, seed
        self.shapes = [expert_shape(config, part) for part in EXPERT_PARTS]
        self.size = sum(rows * columns for rows, columns in self.shapes)
        self.num_shards = num_shards
        self.owned: list[Key] = []
        self.primary: list[Key] = []
        self.computed: dict[Key, int] = {}
        self.weights: dict[Key, list[Tensor]] = {}
        self.adamw = AdamW(betas=betas, eps=eps, weight_decay=weight_decay)
        self.discard()

    def names(self, key: Key) -> list[str]:
        """Logical names of an expert's weights."""
        layer = self.config.moe_layers[key[0]]
        return [expert_name(layer, key[1], part) for part in EXPERT_PARTS]

    def initialize(self, keys: Sequence[Key]) -> None:
        """Draw the first weights of `keys` from the seed."""
        for key in keys:
            layer = self.config.moe_layers[key[0]]
            self.weights[key] = list(initial_expert(self.config, layer, key[1], seed=self.seed).values())

    def assign(
        self, owned: Sequence[Key], primary: Sequence[Key], computed: Sequence[Key] | None = None
    ) -> None:
        """Say which of the held replicas follow the updates.

        Args:
            owned: those that do.
            primary: those of them whose gradient is summed here.
            computed: those that compute for some logical shard; None for `primary`.
        """
        self.owned, self.primary = list(owned), list(primary)
        self.computed = {key: row for row, key in enumerate(primary if computed is None else computed)}
        self.discard()

    def trim(self) -> None:
        """Forget replicas that are held and not assigned."""
        for key in set(self.weights) - set(self.owned):
            for weight in self.weights.pop(key):
                self.adamw.forget(weight)

    def discard(self) -> None:
        """Forget saved activations and gradients of the step; the weights stay."""
        self.reduced: dict[Key, Tensor] = {}
        self.tree: TreeSum[Tensor] = TreeSum(self.num_shards, lambda left, right: left.add_(right))
        self._saved: dict[tuple[int, int], list[tuple[Key, Tensor, Tensor, tuple[Tensor, Tensor]]]] = {}
        self._gradients: dict[int, Tensor] = {}

    def forward(
        self,
        layer: int,
        shard: int,
        x_UH: Tensor,
        rows_R: Tensor,
        experts: Sequence[int],
        counts: Sequence[int],
        keep: bool,
    ) -> Tensor:
        """Run rows through their experts.

        Args:
            layer: moe layer index.
            shard: logical shard, the key under which activations are kept.
            x_UH: fp32, tokens that any of this shard's experts needs, once each.
            rows_R: int64, the token of each row, sorted by expert.
            experts, counts: experts asked for and how many rows each has, in row order.
            keep: keep what backward needs.

        Returns:
            y_RH fp32, one row per (token, expert), unweighted.
        """
        y_RH = torch.empty(len(rows_R), x_UH.shape[1])
        saved = []
        start = 0
        for expert, count in zip(experts, counts):
            if not count:
                continue
            rows = rows_R[start : start + count]
            x = x_UH[rows]
            y, activations = swiglu_forward(x, *self.weights[(layer, expert)])
            y_RH[start : start + count] = y
            if keep:
                saved.append(((layer, expert), rows, x, activations))
            start += count
        if keep:
            self._saved[(layer, shard)] = saved
        return y_RH

    def backward(self, layer: int, shard: int, dout_UH: Tensor, weights_R: Tensor) -> Tensor:
        """Propagate the gradient of the weighted outputs and add up the experts' own gradients.

        Args:
            layer, shard: as in `forward`.
            dout_UH: fp32, gradient of the layer's output for the tokens that were sent.
            weights_R: fp32, routing weight of each row.

        Returns:
            dx_RH fp32, gradient of each row's input.
        """
        gradients = self._of_shard(shard)
        dx_RH = torch.empty(len(weights_R), dout_UH.shape[1])
        start = 0
        for key, rows, x, activations in self._saved.pop((layer, shard)):
            stop = start + len(rows)
            dy = dout_UH[rows] * weights_R[start:stop, None]
            dx, *parts = swiglu_backward(dy, x, activations, *self.weights[key])
            dx_RH[start:stop] = dx
            torch.cat([part.reshape(-1) for part in parts], out=gradients[self.computed[key]])
            start = stop
        return dx_RH

    def part(self, shard: int, keys: Sequence[Key]) -> np.ndarray:
        """Gradients of one shard for experts whose primary is another slot, fp32 [len(keys), 3*H*I]."""
        gradient = self._of_shard(shard)
        return gradient[[self.computed[key] for key in keys]].numpy()

    def take_part(self, shard: int, keys: Sequence[Key], packed: np.ndarray) -> None:
        """Take over the gradients of one shard that another holder computed."""
        rows = [self.computed[key] for key in keys]
        self._of_shard(shard)[rows] = torch.tensor(packed)

    def _of_shard(self, shard: int) -> Tensor:
        # A shard that sent no token here has a gradient of zero.
        if shard not in self._gradients:
            self._gradients[shard] = torch.zeros(len(self.computed), self.size)
        return self._gradients[shard]

    def finish_shard(self, shard: int) -> bool:
        """Add a logical shard's gradients, all of which are here, to the sum; True once all shards are in."""
        gradient = self._of_shard(shard)
        del self._gradients[shard]
        if len(self.primary) < len(self.computed):
            gradient = gradient[[self.computed[key] for key in self.primary]]
        self.tree.add(0, shard, gradient)
        root = self.tree.root
        if root is None:
            return False
        self.reduced |= {key: root[row] for row, key in enumerate(self.primary)}
        return True

    @property
    def is_reduced(self) -> bool:
        """Whether every replica held here has its reduced gradient."""
        return len(self.reduced) == len(self.owned)

    def norms(self) -> dict[str, float]:
        """Squared norm of the reduced gradient of every expert computed here."""
        return {
            f"expert.{k[0]}.{k[1]}": float(torch.linalg.vector_norm(self.reduced[k])) ** 2
            for k in self.primary
        }

    def digests(self, keys: Sequence[Key]) -> dict[str, int]:
        """CRC-32 of the reduced gradients of `keys`, to compare replicas."""
        return {f"expert.{k[0]}.{k[1]}": crc32(self.reduced[k].numpy().data) for k in keys}

    def pack(self, keys: Sequence[Key]) -> np.ndarray:
        """Return the reduced gradients of `keys`, fp32 [len(keys), 3*H*I], for a backup."""
        return torch.stack([self.reduced[key] for key in keys]).numpy()

    def unpack(self, keys: Sequence[Key], packed: np.ndarray) -> None:
        """Take over what a primary packed."""
        self.reduced |= {key: torch.tensor(packed[row]) for row, key in enumerate(keys)}

    def apply(self, *, lr: float, scale: float) -> None:
        """Update every replica held here once; forgets the gradients."""
        weights, gradients = [], []
        for key in self.owned:
            parts = torch.split(self.reduced[key].mul_(scale), [a * b for a, b in self.shapes])
            weights += self.weights[key]
            gradients += [part.view(shape) for part, shape in zip(parts, self.shapes)]
        self.adamw.step(weights, gradients, lr=lr)
        self.discard()

    def tensors(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """Weights and moments of replicas held here, by logical name."""
        names = [name for key in keys for name in self.names(key)]
        weights = [weight for key in keys for weight in self.weights[key]]
        return dict(zip(names, weights)) | self.adamw.tensors(names, weights)

    def load(self, keys: Sequence[Key], tensors: dict[str, Tensor], step: int) -> None:
        """Take over replicas of `keys` as they are at optimizer step `step`."""
        for key in keys:
            self.weights[key] = [tensors[name].clone() for name in self.names(key)]
            self.adamw.load(self.names(key), self.weights[key], tensors, step)
