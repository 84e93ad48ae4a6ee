"""Machines of a network, on one: namespaces of their own for network, processes and memory, joined by a cable; and a Ray."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from processes import environment, of_mark, resting, wait_until

APART = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
NEEDED = ("unshare", "nsenter", "ip")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
RAY = ["ray", "start", "--block", "--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats"]


def is_possible() -> bool:
    """Whether this user may make such machines."""
    return (
        all(map(shutil.which, NEEDED))
        and not subprocess.run([*APART, "true"], capture_output=True).returncode
    )


class Hosts:
    """Two machines.

    Args:
        folder: for what Ray prints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.keepers = [subprocess.Popen([*APART, "sleep", "600"]) for _ in ADDRESSES]
        wait_until(lambda: all(psutil.Process(k.pid).children() for k in self.keepers), "namespaces")
        self.pids = [psutil.Process(k.pid).children()[0].pid for k in self.keepers]
        # The parent's namespaces are there until the child has its own.
        wait_until(lambda: len({os.readlink(f"/proc/{pid}/ns/net") for pid in self.pids}) == 2, "networks")
        self.address = f"{ADDRESSES[0]}:6379"

    def connect(self) -> None:
        """Join them, and start a Ray on both."""
        ends = [f"sr{pid}" for pid in self.pids]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for index, (pid, end, address) in enumerate(zip(self.pids, ends, ADDRESSES)):
            subprocess.run(["ip", "link", "set", end, "netns", str(pid)], check=True)
            lines = [
                f"ip addr add {address}/24 dev {end}",
                f"ip link set {end} up",
                "ip link set lo up",
                "mkdir -p /tmp/ray",
                "mount -t tmpfs tmpfs /tmp/ray",
                "mount -t tmpfs tmpfs /dev/shm",
            ]
            subprocess.run([*self.inside(index), "sh", "-c", " && ".join(lines)], check=True)
        head = ["--head", "--port=6379", "--include-dashboard=false"]
        self._start(0, [*head, f"--node-ip-address={ADDRESSES[0]}"])
        said = self.folder / "ray0.txt"
        wait_until(lambda: "Ray runtime started" in said.read_text(), "the first machine's Ray")
        self._start(1, [f"--address={self.address}", f"--node-ip-address={ADDRESSES[1]}"])

    def _start(self, index: int, options: list[str]) -> None:
        with (self.folder / f"ray{index}.txt").open("wb") as out:
            subprocess.Popen(
                [*self.inside(index), *RAY, *options],
                # Slots load beside the run, each for itself, and a test waits for them.
                env=environment(SPARSERAY_TEST=self.mark, **resting(0.3)),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def inside(self, index: int) -> list[str]:
        """Words of a command that starts another one there.

        Args:
            index: of the machine.
        """
        return ["nsenter", "-t", str(self.pids[index]), "--net", "--pid", "--mount"]

    def slots(self, index: int) -> list[int]:
        """Processes of slots there, as this machine numbers them."""
        there = os.readlink(f"/proc/{self.pids[index]}/ns/pid")
        found = [p.pid for p in of_mark(self.mark) if "SlotActor" in " ".join(p.cmdline())]
        return sorted(pid for pid in found if os.readlink(f"/proc/{pid}/ns/pid") == there)

    def end(self) -> None:
        """End all that runs on them."""
        for pid in self.pids:
            psutil.Process(pid).kill()
        for keeper in self.keepers:
            keeper.wait(10.0)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two machines with a Ray, while the block runs."""
    hosts = Hosts(folder)
    try:
        hosts.connect()
        yield hosts
    finally:
        hosts.end()
