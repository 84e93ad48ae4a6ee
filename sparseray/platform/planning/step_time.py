"""How long a training step takes on GPUs of one host, for each way of giving them the roles; pure.

From counts of the model and constants that were measured (docs/gpus.md), so a placement can be chosen before anything is
started. All slots run a part at the same time, layer by layer: attention, tokens to the experts, experts, rows back.
Where roles are apart, one kind of slot waits while the other computes.
"""

from dataclasses import dataclass

from sparseray.model.config import ModelConfig
from sparseray.model.counts import count_parameters, flops_per_token
from sparseray.platform.config import RunConfig

DENSE_FLOPS, EXPERT_FLOPS = 600e12, 480e12
"""Operations per second of matrix products and attention, and of the experts' products, in bf16 on one H100 or H200."""
ELEMENT_S = 9e-11
"""Seconds of everything else, for each number of the hidden state and layer, forward and backward."""
LINK_BYTES, MEMORY_BYTES = 370e9, 2.9e12
"""Bytes per second to other GPUs, and in one's own memory."""
EXCHANGE_S = 40e-6
"""Seconds of signals and small kernels in one exchange of one layer."""
UPDATE_BYTES = 22
"""Read and written of each parameter in an update: master, two bf16 moments, gradient, copy."""
IMBALANCE = 1.05
"""Rows of the busiest expert slot over the mean."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Slots with a GPU each.

    Args:
        attention, experts: slots of each role.
        shared: whether the roles share slots.
    """

    attention: int
    experts: int
    shared: bool

    @property
    def gpus(self) -> int:
        """How many it takes."""
        return max(self.attention, self.experts) if self.shared else self.attention + self.experts

    def __str__(self) -> str:
        return f"{self.attention} shared" if self.shared else f"{self.attention} + {self.experts}"


def placements(gpus: int, parts: int) -> list[Placement]:
    """The ways of giving so many GPUs both roles.

    Args:
        gpus: how many.
        parts: of a step; more attention slots have nothing to do.
    """
    together = [Placement(attention=gpus, experts=gpus, shared=True)]
    return together + [
        Placement(attention=attention, experts=gpus - attention, shared=False)
        for attention in range(1, min(gpus - 1, parts) + 1)
    ]


def step_seconds(config: RunConfig, placed: Placement) -> float:
    """Seconds of a step.

    Args:
        config: of the run; its cluster section counts for replication alone.
        placed: which slots do what.
    """
    train, model, counts = config.train, config.model, count_parameters(config.model)
    tokens, parts = train.sequences_per_shard * train.seq_len, train.logical_shards
    rounds = -(-parts // placed.attention)
    sources = -(-parts // rounds)
    flops = flops_per_token(model, train.seq_len)
    # Forward, twice as much backward, and forward again where it is not kept.
    passes = 4 if train.recompute else 3
    dense = passes * (flops["linear"] + flops["attention"]) / DENSE_FLOPS
    dense += passes / 3 * model.hidden * model.num_layers * ELEMENT_S
    of_experts = passes * flops["experts"] / EXPERT_FLOPS
    busiest = IMBALANCE if placed.experts > 1 else 1.0
    each_round = tokens * (dense + of_experts * sources / placed.experts * busiest)
    directions = 3 if train.recompute else 2
    each_round += directions * _exchange_seconds(model, config.determinism, placed, tokens, sources)
    holders = placed.attention
    sums = 2 * 4 * counts["dense"] * (holders - 1) / holders / LINK_BYTES
    held = counts["dense"] + counts["experts"] * min(1.0, config.cluster.replication / placed.experts)
    return rounds * each_round + sums + held * UPDATE_BYTES / MEMORY_BYTES


def _exchange_seconds(
    model: ModelConfig, determinism: str, placed: Placement, tokens: int, sources: int
) -> float:
    """Of one pass over all MoE layers: tokens, or gradients, out, and as many rows back."""
    if placed.gpus == 1:
        return 0.0
    others = placed.experts - 1 if placed.shared else placed.experts
    of_sources = sources - 1 if placed.shared else sources
    rows = 1.0 if determinism == "fast" else model.moe.top_k / placed.experts
    num_bytes = 2 * tokens * model.hidden * (others + of_sources * rows)
    return len(model.moe_layers) * (num_bytes / LINK_BYTES + EXCHANGE_S)
