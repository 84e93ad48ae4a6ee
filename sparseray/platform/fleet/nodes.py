"""What Ray says of the cluster's nodes: what is free there, and which are to be drained, by when.

`ray drain-node`, Ray's autoscaler, a spot notice that a cloud's agent passes on and a SIGTERM to `ray start --block`
all tell the GCS the same. From then on Ray places nothing on the node; what is there goes on, until somebody ends the
node or nothing is left on it. Ray has this in no public call: its own libraries ask its state, as this file alone does.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from ray._private.state import state


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """What is known of the nodes.

    Args:
        free: of each resource, on nodes that stay.
        draining: Unix time by which each node that is to be drained is gone; infinite where nobody says.
        num_staying: nodes that stay.
    """

    free: Mapping[str, float] = field(default_factory=dict)
    draining: Mapping[str, float] = field(default_factory=dict)
    num_staying: int = 0


def look() -> Nodes:
    """Ask Ray."""
    draining = {
        node: deadline_ms / 1e3 if deadline_ms else inf
        for node, deadline_ms in state.get_draining_nodes().items()
    }
    known = state.available_resources_per_node()
    staying = [resources for node, resources in known.items() if node not in draining]
    free: Counter[str] = Counter()
    for resources in staying:
        free.update(resources)
    return Nodes(free=free, draining=draining, num_staying=len(staying))
