"""What can be known of a configuration before anything is started, for every command alike.

The settings' own ranges are checked where they are read (config.py); here they meet the model, the machine
and the file system. Nothing is written, and nothing takes longer than a moment.
"""

import errno
import os
import socket
import tempfile
from pathlib import Path

from sparseray.actors.state.assignment import Plan
from sparseray.errors import ConfigError
from sparseray.platform.cluster_config import OF_NODE
from sparseray.platform.config import ClusterConfig
from sparseray.platform.planning.inventory import Inventory, num_slots
from sparseray.platform.planning.replan import make_plan
from sparseray.platform.reachable import why_silent

ANSWER_S = 8.0


def check_cluster(cluster: ClusterConfig, inventory: Inventory) -> Plan:
    """Return the first plan of a configuration, with slots 0, 1, ..., if roles, replication and slots fit.

    Args:
        cluster: wanted roles, replication and slots.
        inventory: what there is to place.

    Raises:
        ConfigError: they do not.
    """
    roles = inventory.roles(cluster)
    count = num_slots(roles, colocated=cluster.colocated)
    plan = make_plan(
        generation=1,
        addresses=dict.fromkeys(range(count), ""),
        inventory=inventory,
        roles=roles,
        replication=inventory.replicas(roles, cluster.replication),
        colocated=cluster.colocated,
    )
    if cluster.max_slots and cluster.max_slots < count + cluster.standby:
        raise ConfigError(
            f"cluster.max_slots={cluster.max_slots} is less than the {count} slots of this placement and its "
            f"{cluster.standby} standby ones; give it at least {count + cluster.standby}, or 0 for no limit"
        )
    return plan


def check_start(cluster: ClusterConfig) -> None:
    """See that slots can listen where they shall, or that the cluster they shall join answers.

    Raises:
        ConfigError: the address is not this machine's, or nobody answers there.
    """
    host, _, port = cluster.address.rpartition(":")
    if host and port.isdigit() and "/" not in host and (reason := why_silent(cluster.address, ANSWER_S)):
        raise ConfigError(
            f"cluster.address={cluster.address} does not answer ({reason}); give the address of a running Ray head, "
            'such as HOST:6379 or "auto" on its machine, or leave it out for a Ray of the run\'s own'
        )
    if not cluster.address and cluster.bind_host != OF_NODE:
        check_address(cluster.bind_host, 0, f"cluster.bind_host={cluster.bind_host}")


def check_address(host: str, port: int, option: str) -> None:
    """See that something can listen at an address.

    Args:
        host, port: the address; port 0 for any.
        option: what the user gave, for the message.

    Raises:
        ConfigError: nothing can.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            cure = (
                "choose another --port, or stop who uses it"
                if error.errno in (errno.EADDRINUSE, errno.EACCES)
                else "give an address of this machine, such as 127.0.0.1"
            )
            raise ConfigError(
                f"{option}: cannot listen on {host}:{port} ({error.strerror}); {cure}"
            ) from None


def check_folder(path: Path, option: str) -> None:
    """See that a folder is there or can be made, and that files can be written in it; leaves no trace.

    Args:
        path: the folder.
        option: name of the setting, for the message.

    Raises:
        ConfigError: it cannot be used.
    """
    there = path.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option}={path} cannot be written ({error.strerror}); give a folder that can be made and written"
        ) from None
