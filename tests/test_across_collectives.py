"""Several slots that compute in slabs, by collectives of a group: as on GPUs of several hosts, here by gloo on a CPU."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_transport import Killed
from local_cluster import LocalFleet, Trained, train
from test_across_slots import KILLED, SHORT, Dies, check, one, resize_at, slabs_run, survives
from used_memory import hand_out_used_memory

from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.peers.collective_link import CollectiveLink
from sparseray.actors.peers.dense_slices import DenseSlices
from sparseray.actors.peers.group import Group, host_of
from sparseray.actors.peers.peers import Peers
from sparseray.actors.peers.token_exchange import TokenExchange
from sparseray.actors.roles import Roles
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.gradient_sum import Determinism
from sparseray.errors import SupersededError
from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig


def by_collectives(data: Path, **cluster: Any) -> RunConfig:
    return slabs_run(data, **{"exchange": "collective", **cluster})


assert one  # A fixture of most tests here.


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Group]]:
    """All groups that are made."""
    found: list[Group] = []
    make = Group.__init__

    def noted(me: Group, *args: Any, **named: Any) -> None:
        found.append(me)
        make(me, *args, **named)

    monkeypatch.setattr(Group, "__init__", noted)
    yield found
    for group in found:
        group.abort()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("slots", "replication"), [(2, 1), (4, 1), (3, 2)])
def test_the_number_of_slots_changes_no_bit(
    slots: int, replication: int, corpus: Path, one: dict[int, Trained], tmp_path: Path, groups: list[Group]
) -> None:
    # Nobody is lost here, and the first one of a process compiles its loops, for seconds on a busy machine.
    config = by_collectives(corpus, slots=slots, replication=replication, deadline_s=30.0)
    check(train(tmp_path / "run", config, stop_after=SHORT), one, SHORT)
    assert [group.size for group in groups] == [slots] * slots


@pytest.mark.long
@pytest.mark.parametrize(("attention", "experts", "memory"), [(1, 2, 1), (3, 1, 2)])
def test_slots_with_some_of_the_roles_change_no_bit(
    attention: int, experts: int, memory: int, corpus: Path, one: dict[int, Trained], tmp_path: Path
) -> None:
    roles = {"attention_workers": attention, "expert_shards": experts, "memory_shards": memory}
    for colocated in (True, False):
        config = by_collectives(corpus, colocated=colocated, **roles)
        check(train(tmp_path / str(colocated), config, stop_after=SHORT), one, SHORT)


@pytest.mark.long
def test_recomputed_layers_change_no_bit(corpus: Path, one: dict[int, Trained], tmp_path: Path) -> None:
    config = by_collectives(corpus, slots=3)
    config = replace(config, train=replace(config.train, recompute=True))
    check(train(tmp_path / "run", config, stop_after=SHORT), one, SHORT)


@pytest.mark.long
def test_the_fast_order_has_the_bits_of_slots_that_share_memory(corpus: Path, tmp_path: Path) -> None:
    found = []
    for exchange in ("peers", "collective"):
        config = slabs_run(corpus, slots=3, replication=2, exchange=exchange)
        found.append(train(tmp_path / exchange, replace(config, determinism="fast"), stop_after=SHORT))
    assert found[0].curve == found[1].curve and found[0].digest == found[1].digest


@pytest.mark.one_in(6)
@pytest.mark.parametrize("exchange", ["peers", "collective"])
@pytest.mark.parametrize("determinism", ["bitwise", "fast"])
def test_what_lay_in_memory_before_changes_no_bit(
    exchange: str, determinism: Determinism, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = slabs_run(corpus, slots=3, replication=2, exchange=exchange)
    config = replace(config, determinism=determinism)
    fresh = train(tmp_path / "fresh", config, stop_after=SHORT)
    hand_out_used_memory(monkeypatch)
    found = train(tmp_path / "used", config, stop_after=SHORT)
    assert found.curve == fresh.curve and found.digest == fresh.digest


def test_slots_of_several_hosts_meet_as_a_group_and_those_of_one_do_not(
    corpus: Path, one: dict[int, Trained], tmp_path: Path, groups: list[Group]
) -> None:
    config = slabs_run(corpus, slots=2, transport="tcp")
    for other in ("a", "b"):
        assert not groups
        nodes = {0: "a", 1: other}
        check(train(tmp_path / other, config, tcp=True, nodes=nodes, stop_after=SHORT), one, SHORT)
    assert {group.host for group in groups} == {"127.0.0.1"} and len(groups) == 2


@pytest.mark.long
@pytest.mark.parametrize("replication", [1, 2])
def test_slots_come_and_go_while_training_goes_on(
    replication: int, corpus: Path, one: dict[int, Trained], tmp_path: Path, groups: list[Group]
) -> None:
    changes = resize_at({1: 2, 3: 4, 5: 3, 7: 2} | ({9: 1} if replication == 1 else {}))
    config = by_collectives(corpus, slots=replication, replication=replication)
    found = train(tmp_path / "run", config, at_step=changes)
    check(found, one)
    assert found.events.count("resized") >= 3 and "restored" not in found.events
    assert {group.size for group in groups} == {2, 3, 4}


MOMENTS = {
    "forward": (DeviceExchange, "_forward", 2),
    "forward, rows half given": (TokenExchange, "_give_back", 2),
    "before a collective": (CollectiveLink, "_all", 3),
    "after telling how much there is": (CollectiveLink, "_all", 8),
    "backward": (DeviceExchange, "_backward", 2),
    "dense sum": (DenseSlices, "_add_up", 1),
    "before prepared": (DeviceExchange, "_post", 1),
    "commit": (Roles, "_apply", 1),
}


# At these the survivors are in a collective or about to be, as at others, which test_across_slots.py has without one.
IN_COLLECTIVES = ["forward", "before a collective", "after telling how much there is", "commit"]


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    ("moment", "slot"),
    [
        *((moment, 0) for moment in IN_COLLECTIVES),
        *(
            pytest.param(moment, 0, marks=pytest.mark.long)
            for moment in MOMENTS
            if moment not in IN_COLLECTIVES
        ),
        *(pytest.param(moment, 2, marks=pytest.mark.long) for moment in MOMENTS),
    ],
)
def test_a_kill_at_any_moment_changes_no_bit_and_loses_no_step(
    moment: str,
    slot: int,
    corpus: Path,
    one: dict[int, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, method, call = MOMENTS[moment]
    fault = Dies(of, method, slot=slot, step=3, call=call)
    config = by_collectives(corpus, slots=3, replication=2, standby=slot % 2)
    survives(fault, config, one, tmp_path / "run", monkeypatch)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("slot", [0, 1])
def test_a_kill_while_a_group_forms_changes_no_bit(
    slot: int, corpus: Path, one: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first slot is the one that the others look for."""
    meet, done = Peers.meet, list[int]()
    found: dict[str, LocalFleet] = {}

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        found["fleet"] = fleet
        resize_at({3: 3})(step, run, fleet)

    def dies(me: Peers, plan: Plan, *args: Any) -> None:
        if me.me == slot and plan.generation == 2:
            done.append(slot)
            found["fleet"].kill(slot)
            raise Killed
        meet(me, plan, *args)

    monkeypatch.setattr(Peers, "meet", dies)
    config = by_collectives(corpus, slots=2, replication=2)
    trained = train(tmp_path / "run", config, at_step=at_step, stop_after=KILLED)
    assert done == [slot] and "restored" not in trained.events
    check(trained, one, KILLED)


def test_a_slot_that_was_given_up_and_lives_reaches_nobody(
    corpus: Path, one: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still before a collective, and goes on while the others are in the next generation."""
    wait, seen = CollectiveLink.wait, dict.fromkeys(("step", "given"), 0)
    found: dict[str, LocalFleet] = {}

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        found["fleet"], seen["step"] = fleet, step + 1

    def stands_still(me: CollectiveLink, *args: Any) -> None:
        if me.mailbox.slot == 1 and seen["step"] == 5 and not seen["given"]:
            seen["given"] = 1
            found["fleet"].partition(1)
            while seen["step"] < 8:
                time.sleep(0.01)
            seen["given"] = seen["step"]
        wait(me, *args)

    monkeypatch.setattr(CollectiveLink, "wait", stands_still)
    config = by_collectives(corpus, slots=3, replication=2)
    check(train(tmp_path / "run", config, at_step=at_step), one)
    assert seen["given"] >= 8


def pair(timeout_s: float) -> list[Group]:
    """Two members of a group."""
    device = torch.device("cpu")
    first = Group(0, 2, device, "127.0.0.1", meeting="", timeout_s=timeout_s)
    return [first, Group(1, 2, device, "127.0.0.1", meeting=first.meeting, timeout_s=timeout_s)]


def test_an_aborted_group_lets_go_at_once_and_leaves_no_thread() -> None:
    before = threading.active_count()
    one, other = pair(0.5)
    while not (one.is_formed and other.is_formed):
        time.sleep(0.001)
    sent = torch.zeros(2, dtype=torch.uint8)
    work = one.start(sent, torch.empty_like(sent), [], [])
    started = time.monotonic()
    one.abort()
    assert time.monotonic() - started < 0.2 and not work.is_completed()
    with pytest.raises(SupersededError):
        one.start(sent, torch.empty_like(sent), [], [])
    other.abort()
    while threading.active_count() > before:
        assert time.monotonic() - started < 5.0
        time.sleep(0.01)
    assert time.monotonic() - started < 2.0


ENDS_MEANWHILE = """
import time
import test_across_collectives

class Slow:
    def __del__(self):
        time.sleep(1.0)

one, other = test_across_collectives.pair(0.5)
while not (one.is_formed and other.is_formed):
    time.sleep(0.001)
sent = test_across_collectives.torch.zeros(2, dtype=test_across_collectives.torch.uint8)
one.start(sent, sent.clone(), [], [])
one.abort()
slow = Slow()
"""


@pytest.mark.long
def test_a_process_that_ends_while_its_group_does_ends_in_order() -> None:
    """The collective's own end comes while Python is torn down, which takes a process with a GPU as long."""
    assert subprocess.run([sys.executable, "-c", ENDS_MEANWHILE], cwd=Path(__file__).parent).returncode == 0


def test_a_group_listens_at_its_own_address_alone() -> None:
    group = Group(0, 2, torch.device("cpu"), "127.0.0.2", meeting="", timeout_s=1.0)
    host, _, port = group.meeting.rpartition(":")
    assert host == "127.0.0.2"
    socket.create_connection((host, int(port)), 5.0).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)), 5.0)


@pytest.mark.parametrize(
    ("address", "host"),
    [("ipc:///tmp/sr/slot1-77", "127.0.0.1"), ("tcp://10.0.0.7:4242", "10.0.0.7"), ("tcp://[::1]:42", "::1")],
)
def test_a_group_binds_to_the_host_in_its_slots_address(address: str, host: str) -> None:
    assert host_of(address) == host
