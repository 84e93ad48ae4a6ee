"""What there is to place of a model and a workload, and how many slots shall play each role; pure.

Made once from the configuration; plans, the policy and a user's requests are checked against it.
"""

from dataclasses import dataclass

from sparseray.actors.state.assignment import MOST_IN_ROUNDS
from sparseray.errors import ConfigError
from sparseray.model.config import ModelConfig
from sparseray.platform.config import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Wanted number of slots for each role, 0 where the model has none."""

    attention: int
    experts: int
    memory: int


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What there is to place.

    Args:
        parts: logical shards of the global batch, which attention workers share; 0 in serving, where each of
            them is an engine of its own.
        moe_layers, experts: layers with routed experts, and experts of each.
        dse_layers, buckets: layers with a memory table, and buckets of each.
        is_whole: every engine holds everything, and none asks another.
        in_slabs: pieces lie on devices and take long to read: after a loss those who are left go on with what they have.
    """

    parts: int
    moe_layers: int
    experts: int
    dse_layers: int
    buckets: int
    is_whole: bool = False
    in_slabs: bool = False

    @staticmethod
    def of(model: ModelConfig, *, parts: int, is_whole: bool = False, in_slabs: bool = False) -> "Inventory":
        """The pieces of a model.

        Args:
            model: its configuration.
            parts: logical shards of the global batch; 0 in serving.
            is_whole: every engine holds everything.
            in_slabs: they lie on devices, in serving.
        """
        return Inventory(
            parts=parts,
            moe_layers=len(model.moe_layers),
            experts=model.moe.num_experts,
            dse_layers=len(model.dse.layers),
            buckets=model.dse.num_buckets,
            is_whole=is_whole,
            in_slabs=in_slabs,
        )

    def roles(self, cluster: ClusterConfig) -> Roles:
        """The roles that a configuration asks for, without those that the model has no work for."""
        return self.shared(
            Roles(
                attention=cluster.attention_workers,
                experts=cluster.expert_shards if self.moe_layers else 0,
                memory=cluster.memory_shards if self.dse_layers else 0,
            )
        )

    def shared(self, roles: Roles) -> Roles:
        """What roles come to: where every engine holds everything, each has all of them."""
        if not self.is_whole:
            return roles
        count = roles.attention
        return Roles(
            attention=count,
            experts=count if self.moe_layers else 0,
            memory=count if self.dse_layers else 0,
        )

    def replicas(self, roles: Roles, replication: int) -> int:
        """Holders that every piece shall have.

        Args:
            roles: wanted slots of each role.
            replication: what the configuration says.
        """
        return roles.attention if self.is_whole else replication

    def parts_for(self, roles: Roles) -> int:
        """What attention workers share when these roles are played: an engine shares nothing."""
        return self.parts or roles.attention

    def check(self, roles: Roles) -> None:
        """Refuse roles that have nothing to do, or none where there is something.

        Raises:
            ConfigError: naming the setting, its value and its range.
        """
        if self.in_slabs and not self.is_whole and max(roles.attention, roles.experts) > MOST_IN_ROUNDS:
            raise ConfigError(
                f"{max(roles.attention, roles.experts)} slots are to share experts on devices, and {MOST_IN_ROUNDS} can; set"
                f" cluster.attention_workers={min(roles.attention, MOST_IN_ROUNDS)} and"
                f" cluster.expert_shards={min(roles.experts, MOST_IN_ROUNDS)}"
            )
        if not self.parts and roles.attention < 1:
            raise ConfigError(
                f"cluster.attention_workers={roles.attention}: each is an engine that answers requests; give it at least 1"
            )
        if self.parts:
            _check(
                "cluster.attention_workers",
                roles.attention,
                "logical shards (train.logical_shards)",
                self.parts,
            )
        if self.moe_layers:
            _check("cluster.expert_shards", roles.experts, "experts (model.moe.num_experts)", self.experts)
        if self.dse_layers:
            _check("cluster.memory_shards", roles.memory, "buckets (model.dse.num_buckets)", self.buckets)


def num_slots(roles: Roles, *, colocated: bool) -> int:
    """Slots that roles need.

    Args:
        roles: slots of each role.
        colocated: whether roles share slots.
    """
    counts = (roles.attention, roles.experts, roles.memory)
    return max(counts) if colocated else sum(counts)


def _check(key: str, value: int, what: str, limit: int) -> None:
    if not 1 <= value <= limit:
        raise ConfigError(f"{key}={value} does not fit {limit} {what}; give it a value from 1 to {limit}")
