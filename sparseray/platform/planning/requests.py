"""What a user may ask of a running job; pure: a request is checked against model, replication and room."""

from dataclasses import replace

from sparseray.errors import ConfigError
from sparseray.platform.config import ClusterConfig
from sparseray.platform.planning.inventory import Inventory, Roles, num_slots

ROLES = ("attention", "experts", "memory")


def check_request(
    role: str,
    count: int,
    wanted: Roles,
    inventory: Inventory,
    cluster: ClusterConfig,
    *,
    slots: int,
    room: int,
) -> Roles:
    """Return the roles that a request for `count` slots of `role` comes to.

    Args:
        role, count: the request.
        wanted: what was wanted so far.
        inventory: what there is to place.
        cluster: replication and what a slot takes.
        slots: that live or are starting.
        room: for how many more the cluster has room.

    Raises:
        ConfigError: it cannot be, and why.
    """
    if role not in ROLES:
        raise ConfigError(f"there is no role {role!r}; give {', '.join(ROLES)}")
    limits = {
        "attention": ("logical shards (train.logical_shards)", inventory.parts),
        "experts": (
            "experts per layer (model.moe.num_experts)",
            inventory.experts if inventory.moe_layers else 0,
        ),
        "memory": ("buckets (model.dse.num_buckets)", inventory.buckets if inventory.dse_layers else 0),
    }
    what, most = limits[role]
    if role == "attention" and not inventory.parts:
        if count < 1:
            raise ConfigError(f"attention {count}: a server needs an engine; give a number from 1")
    elif not 1 <= count <= most:
        raise ConfigError(f"{role} {count}: this model has {most} {what}; give a number from 1 to {most}")
    if role != "attention" and inventory.is_whole:
        raise ConfigError(
            f"{role} {count}: every engine on a GPU holds all of it; ask for engines (attention)"
        )
    new = inventory.shared(replace(wanted, **{role: count}))
    if inventory.in_slabs:
        inventory.check(new)
    total = num_slots(new, colocated=cluster.colocated)
    if total < cluster.replication:
        raise ConfigError(
            f"{role} {count}: {total} slots cannot hold {cluster.replication} replicas (cluster.replication); "
            f"ask for at least {count + cluster.replication - total}"
        )
    if total - slots > room:
        raise ConfigError(
            f"{role} {count}: that takes {total - slots} more slots of {cluster.cpus_per_slot:g} CPU, and the cluster "
            f"has room for {room}; add a node, or scale another role down first"
        )
    return new
