"""An expert shard: routed experts that compute rows for whoever asks, and train in place.

Forward and backward run per (step, logical part, moe layer) on rows in a fixed order, one expert
after another, so no bit depends on which shard holds an expert. DeepSeekMoE, arXiv 2401.06066.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import torch
from torch import Tensor

from sparseray.actors.state.adamw import adamw_
from sparseray.actors.state.pieces import Key, following
from sparseray.actors.state.slab import MOMENTS, ExpertSlab
from sparseray.actors.state.tree import TreeSum
from sparseray.kernels.moe import grouped
from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.config import ModelConfig
from sparseray.model.init import EXPERT_PARTS, draw_each, expert_name, expert_shape, initial_tensor, room_for


@dataclass(frozen=True)
class _Saved:
    """What the backward pass of one layer and part needs."""

    keys: list[Key]
    matrices: list[grouped.Matrices]
    rows: grouped.Rows
    rows_R: Tensor
    x_PH: Tensor
    activations: tuple[Tensor, Tensor]


class ExpertShard:
    """The experts that one slot holds, a slab for each layer.

    A replica comes by `initialize` or `load`; `assign` says which replicas count and which compute.
    What is held but no longer assigned stays readable until `trim`, so that a peer can still copy it.
    All replicas have seen the same number of updates. Gradients are fp32 rows [gate | up | down] of 3*H*I.

    Args:
        config: the model.
        seed, num_parts, betas, eps, weight_decay: as in `DenseState`.
        device: where weights, moments and gradients live.
        compute_dtype: dtype that forward and backward compute in; None for fp32, from the masters themselves.
        moments: dtype of both moments.
        ops: computes what nobody differentiates.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int,
        num_parts: int,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        moments: torch.dtype = torch.float32,
        ops: Ops = REFERENCE,
    ) -> None:
        self.ops = ops
        self.config, self.seed, self.num_parts = config, seed, num_parts
        self._layers = config.moe_layers
        self.device = torch.device(device)
        self.shapes = [expert_shape(config, part) for part in EXPERT_PARTS]
        self.size = sum(rows * columns for rows, columns in self.shapes)
        self.slabs = [
            ExpertSlab(
                config.moe.expert_dim,
                config.hidden,
                device=self.device,
                compute_dtype=compute_dtype,
                moments=moments,
            )
            for _ in self._layers
        ]
        self.owned: list[Key] = []
        self.primary: list[Key] = []
        self.computed: dict[Key, int] = {}
        self.updates = 0
        self._arriving: set[Key] = set()
        self._update = partial(adamw_, betas=betas, eps=eps, weight_decay=weight_decay)
        self.discard()

    @property
    def held(self) -> list[Key]:
        """Experts that can be read here, assigned or not."""
        every = ((layer, expert) for layer, slab in enumerate(self.slabs) for expert in slab.rows)
        return [key for key in every if key not in self._arriving]

    @property
    def num_bytes(self) -> int:
        """Bytes of weights, moments and compute copies held here."""
        return sum(slab.num_bytes for slab in self.slabs)

    def names(self, key: Key) -> list[str]:
        """Logical names of an expert's weights."""
        layer = self._layers[key[0]]
        return [expert_name(layer, key[1], part) for part in EXPERT_PARTS]

    def initialize(self, keys: Sequence[Key], step: int = 0) -> None:
        """Draw the first weights of experts from the seed.

        Args:
            keys: which.
            step: that they shall count as of.
        """
        self._take(keys, step)

        def draw(key: Key) -> None:
            slab = self.slabs[key[0]]
            for name, matrix in zip(self.names(key), slab.matrices(slab.weights, key[1])):
                room, std = room_for(matrix), self.config.init_std
                matrix.copy_(initial_tensor(name, matrix.shape, seed=self.seed, std=std, room=room))

        draw_each(draw, keys)
        self._refresh()

    def _take(self, keys: Sequence[Key], updates: int) -> None:
        """Make room for replicas that have seen so many updates."""
        assert not self.held or self.updates == updates, "replicas of different steps"
        self.updates = updates
        for layer, slab in enumerate(self.slabs):
            slab.take(expert for of, expert in keys if of == layer)

    def _refresh(self) -> None:
        for slab in self.slabs:
            slab.refresh()

    def assign(
        self, owned: Sequence[Key], primary: Sequence[Key], computed: Sequence[Key] | None = None
    ) -> None:
        """Say which of the held replicas follow the updates.

        Args:
            owned: those that do.
            primary: those of them whose gradient is summed here.
            computed: those that compute for some logical part; None for `primary`.
        """
        self.owned, self.primary = list(owned), list(primary)
        self.computed = {key: row for row, key in enumerate(primary if computed is None else computed)}
        self.discard()

    def trim(self) -> None:
        """Forget replicas that are held and not assigned, and give their memory back."""
        kept: list[list[int]] = [[] for _ in self.slabs]
        for layer, expert in self.owned:
            kept[layer].append(expert)
        for slab, experts in zip(self.slabs, kept):
            slab.keep(experts)

    def discard(self) -> None:
        """Forget saved activations and gradients of the step; the weights stay."""
        self.reduced: dict[Key, Tensor] = {}
        self.tree: TreeSum[Tensor] = TreeSum(self.num_parts, lambda left, right: left.add_(right))
        self._saved: dict[tuple[int, int], _Saved] = {}
        self._gradients: dict[int, Tensor] = {}

    def forward(
        self,
        layer: int,
        part: int,
        x_UH: Tensor,
        rows_R: Tensor,
        experts: Sequence[int],
        counts: Sequence[int],
        keep: bool,
    ) -> Tensor:
        """Run rows through their experts.

        Args:
            layer: moe layer index.
            part: logical part of the batch, under which activations are kept.
            x_UH: fp32, tokens that any of this slot's experts needs, once each.
            rows_R: int64, the token of each row, sorted by expert.
            experts, counts: experts asked for and how many rows each has, in row order.
            keep: keep what backward needs.

        Returns:
            y_RH fp32, one row per (token, expert), unweighted.
        """
        slab = self.slabs[layer]
        if not keep:
            held = [(slab.rows[expert], count) for expert, count in zip(experts, counts) if count]
            # Who asks by message has its own thread's setting, and no bit may depend on who asks.
            with torch.no_grad():
                return self.ops.expert_rows(x_UH, rows_R, held, *slab.compute)
        asked = [(expert, count) for expert, count in zip(experts, counts) if count]
        if not asked:
            return torch.empty(0, x_UH.shape[1], device=self.device)
        matrices = [slab.matrices(slab.compute, expert) for expert, _ in asked]
        rows = grouped.Rows.of([count for _, count in asked], self.device)
        x_PH = rows.gather(x_UH, rows_R).to(matrices[0][0].dtype)
        y_PH, activations = grouped.forward(x_PH, rows, matrices)
        keys = [(layer, expert) for expert, _ in asked]
        self._saved[(layer, part)] = _Saved(keys, matrices, rows, rows_R, x_PH, activations)
        return y_PH.index_select(0, rows.places_R).float()

    def backward(self, layer: int, part: int, dout_UH: Tensor, weights_R: Tensor) -> Tensor:
        """Propagate the gradient of the weighted outputs and add up the experts' own gradients.

        Args:
            layer, part: as in `forward`.
            dout_UH: fp32, gradient of the layer's output for the tokens that were sent.
            weights_R: fp32, routing weight of each row.

        Returns:
            dx_RH fp32, gradient of each row's input.
        """
        saved, gradients = self._saved.pop((layer, part), None), self._of_part(part)
        if saved is None:
            return torch.empty(0, dout_UH.shape[1], device=self.device)
        rows = saved.rows
        dy_PH = rows.gather(dout_UH, saved.rows_R).mul_(rows.spread(weights_R, 0.0)[:, None])
        into = [self._matrices(gradients[self.computed[key]]) for key in saved.keys]
        dy_PH = dy_PH.to(saved.x_PH.dtype)
        dx_PH = grouped.backward(dy_PH, saved.x_PH, saved.activations, rows, saved.matrices, into)
        return dx_PH.index_select(0, rows.places_R).float()

    def _matrices(self, row: Tensor) -> grouped.Matrices:
        """gate, up and down in a row of 3*H*I, as views."""
        parts = torch.split(row, [rows * columns for rows, columns in self.shapes])
        gate, up, down = (part.view(shape) for part, shape in zip(parts, self.shapes))
        return gate, up, down

    def part(self, part: int, keys: Sequence[Key]) -> Tensor:
        """Gradients of one part for experts whose primary is another slot.

        Args:
            part: logical part of the batch.
            keys: experts that are computed here.

        Returns:
            fp32 [len(keys), 3*H*I].
        """
        return self._of_part(part)[[self.computed[key] for key in keys]]

    def take_part(self, part: int, keys: Sequence[Key], packed: Tensor) -> None:
        """Take over the gradients of one part that another holder computed.

        Args:
            part, keys: as for `part`.
            packed: what it gave.
        """
        self._of_part(part)[[self.computed[key] for key in keys]] = packed.to(self.device)

    def _of_part(self, part: int) -> Tensor:
        # A part that sent no token here has a gradient of zero.
        if part not in self._gradients:
            self._gradients[part] = torch.zeros(len(self.computed), self.size, device=self.device)
        return self._gradients[part]

    def finish_part(self, part: int) -> bool:
        """Add a part's gradients, all of which are here, to the sum; True once all parts are in."""
        gradient = self._of_part(part)
        del self._gradients[part]
        if len(self.primary) < len(self.computed):
            gradient = gradient[[self.computed[key] for key in self.primary]]
        self.tree.add(0, part, gradient)
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
        return {f"expert.{k[0]}.{k[1]}": crc32(self.reduced[k].cpu().numpy().data) for k in keys}

    def pack(self, keys: Sequence[Key]) -> Tensor:
        """Return the reduced gradients of `keys`, fp32 [len(keys), 3*H*I], for a backup."""
        return torch.stack([self.reduced[key] for key in keys])

    def unpack(self, keys: Sequence[Key], packed: Tensor) -> None:
        """Take over what a primary packed.

        Args:
            keys: experts of which a replica is assigned here.
            packed: fp32 [len(keys), 3*H*I]; it is copied.
        """
        copied = packed.to(self.device, copy=True)
        self.reduced |= {key: copied[row] for row, key in enumerate(keys)}

    def apply(self, *, lr: float, scale: float) -> None:
        """Update every replica held here once; forgets the gradients, and what is not assigned.

        Args:
            lr: learning rate of this step.
            scale: factor on the gradient (global-norm clipping).
        """
        self.trim()
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        first: list[Tensor] = []
        second: list[Tensor] = []
        for layer, expert in self.owned:
            slab = self.slabs[layer]
            gradients += self._matrices(self.reduced[(layer, expert)].mul_(scale))
            for found, pair in zip((weights, first, second), (slab.weights, *slab.moments())):
                found += slab.matrices(pair, expert)
        if self.owned:
            # One call over views: torch counts each tensor's updates apart.
            counts = torch.full((len(weights),), float(self.updates), device=self.device).unbind()
            self._update(weights, gradients, first, second, counts, lr=lr)
        self.updates += 1
        self._refresh()
        self.discard()

    def pass_over(self) -> None:
        """Count a step whose gradients are dropped."""
        self.updates += 1
        self.discard()

    def tensor_names(self, keys: Sequence[Key], *, with_optimizer: bool = True) -> list[str]:
        """Logical names of everything that `tensors` gives.

        Args:
            keys: experts, held or not.
            with_optimizer: the moments' names too.
        """
        suffixes = ("", *MOMENTS) if with_optimizer else ("",)
        return [name + suffix for key in keys for name in self.names(key) for suffix in suffixes]

    def tensors(self, keys: Sequence[Key], *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Weights and moments of replicas held here, by logical name, as views.

        Args:
            keys: experts that are held.
            with_optimizer: the moments too.
        """
        found = {}
        for key in keys:
            slab = self.slabs[key[0]]
            for suffix, pair in slab.fields(with_optimizer=with_optimizer).items():
                for name, matrix in zip(self.names(key), slab.matrices(pair, key[1])):
                    found[name + suffix] = matrix
        return found

    def runs(self, *sources: Sequence[Key], with_optimizer: bool = True) -> dict[str, Tensor]:
        """What `tensors` has, of experts that follow each other in a layer as one: it lies together wherever they are held.

        Args:
            sources, with_optimizer: experts that are held, those of each by themselves; and their moments too.
        """
        return {
            f"experts.{layer}.{first}+{count}.{field}": tensor
            for keys in sources
            for layer, first, count in following(keys)
            for field, tensor in self.slabs[layer].run(first, count, with_optimizer=with_optimizer).items()
        }

    def begin_load(
        self,
        keys: Sequence[Key],
        step: int,
        *,
        with_optimizer: bool = True,
        runs_of: Sequence[Sequence[Key]] | None = None,
    ) -> dict[str, Tensor]:
        """Tensors of replicas to fill, as `tensors` gives them; they are held from `end_load` on.

        Args:
            keys, step: experts, and the optimizer step that they will be from.
            with_optimizer: the moments too.
            runs_of: the same experts by where they come from, to be filled as `runs` gives each.
        """
        self._take(keys, step)
        self._arriving = set(keys)
        if runs_of is None:
            return self.tensors(keys, with_optimizer=with_optimizer)
        return self.runs(*runs_of, with_optimizer=with_optimizer)

    def end_load(self) -> None:
        """Hold what has been filled."""
        self._arriving = set()
        self._refresh()

    def drop_load(self) -> None:
        """Forget what was to be filled."""
        held, self._arriving = set(self.held), set()
        for layer, slab in enumerate(self.slabs):
            slab.keep(expert for expert in slab.rows if (layer, expert) in held)
