"""Several slots that compute in slabs, through each other's memory: as on several GPUs, here in bf16 on a CPU."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_transport import Killed
from local_cluster import MODEL, LocalFleet, Trained, tiny_run, train

from sparseray.actors.exchange.by_message import MessageExchange
from sparseray.actors.exchange.reduction import Reduction
from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.peers.dense_slices import DenseSlices
from sparseray.actors.peers.link import HostLink
from sparseray.actors.peers.regions import Sizes, room_for
from sparseray.actors.peers.token_exchange import TokenExchange
from sparseray.actors.state.shared_buffer import Buffer, open_buffer
from sparseray.errors import UserError
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig, MTPConfig
from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig
from sparseray.platform.planning.inventory import Roles

STEPS, KILLED, SHORT = 10, 6, 4
"""Of a run whose slots come and go, of one that loses a slot, and of one to which nothing happens."""


def slabs_run(data: Path, *, slots: int = 1, **cluster: Any) -> RunConfig:
    roles = dict.fromkeys(("attention_workers", "expert_shards", "memory_shards"), slots)
    config = tiny_run(data, steps=STEPS, **{"colocated": True, "deadline_s": 3.0, **roles, **cluster})
    return replace(config, train=replace(config.train, dtype="bfloat16", checkpoint_every=4))


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    """One slot that has everything, undisturbed, by the number of steps."""
    folder = tmp_path_factory.mktemp("one")
    return {
        steps: train(folder / str(steps), slabs_run(corpus), stop_after=steps)
        for steps in (STEPS, KILLED, SHORT)
    }


def check(found: Trained, one: dict[int, Trained], steps: int = STEPS) -> None:
    wanted = one[steps]
    assert [r["step"] for r in found.records] == list(range(1, steps + 1))
    assert found.curve == wanted.curve
    assert found.evaluations == wanted.evaluations
    assert found.digest == wanted.digest


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("slots", "replication"),
    [(2, 1), (4, 1), (2, 2), (4, 3), *(pytest.param(3, r, marks=pytest.mark.long) for r in (1, 2))],
)
def test_the_number_of_slots_changes_no_bit(
    slots: int, replication: int, corpus: Path, one: dict[int, Trained], tmp_path: Path
) -> None:
    config = slabs_run(corpus, slots=slots, replication=replication)
    check(train(tmp_path / "run", config, stop_after=SHORT), one, SHORT)


@pytest.mark.parametrize(("attention", "experts", "memory"), [(1, 2, 1), (3, 2, 1), (1, 1, 2), (2, 4, 3)])
def test_slots_with_some_of_the_roles_change_no_bit(
    attention: int, experts: int, memory: int, corpus: Path, one: dict[int, Trained], tmp_path: Path
) -> None:
    roles = {"attention_workers": attention, "expert_shards": experts, "memory_shards": memory}
    check(train(tmp_path / "run", slabs_run(corpus, **roles), stop_after=SHORT), one, SHORT)


@pytest.mark.parametrize(
    ("attention", "experts"), [(1, 1), (3, 1), pytest.param(2, 2, marks=pytest.mark.long)]
)
def test_roles_in_slots_of_their_own_change_no_bit(
    attention: int, experts: int, corpus: Path, one: dict[int, Trained], tmp_path: Path
) -> None:
    roles = {"attention_workers": attention, "expert_shards": experts, "colocated": False}
    check(train(tmp_path / "run", slabs_run(corpus, **roles), stop_after=SHORT), one, SHORT)


def test_experts_that_are_packed_by_load_change_no_bit(
    corpus: Path, one: dict[int, Trained], tmp_path: Path
) -> None:
    """Every layer waits for the slot with most tokens: in the first steps of a run that one has far more than others."""
    config = slabs_run(corpus, slots=4, rebalance_above=1.01, rebalance_every=2)
    found = train(tmp_path / "run", config, stop_after=SHORT)
    check(found, one, SHORT)
    assert "rebalanced" in found.events


def test_a_host_that_does_not_learn_the_counts_of_rows_changes_no_bit(
    corpus: Path, one: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU after the first step, where all rows have room."""

    def settle(me: TokenExchange, *_: int) -> None:
        me.counts_rows = False

    monkeypatch.setattr(TokenExchange, "settle", settle)
    check(train(tmp_path / "run", slabs_run(corpus, slots=3), stop_after=SHORT), one, SHORT)


def test_a_slot_answers_others_while_it_waits_for_gradients_of_rows(
    corpus: Path, one: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go by message: on a GPU their gradients come when others have, who may have to be answered first."""
    calls: dict[int, list[str]] = {}

    def noted(of: type, name: str) -> None:
        method = getattr(of, name)

        def call(me: Any, *arguments: Any) -> Any:
            calls.setdefault(me.mailbox.slot, []).append(name)
            return method(me, *arguments)

        monkeypatch.setattr(of, name, call)

    for of, name in ((HostLink, "start_read"), (HostLink, "wait"), (Reduction, "send_rows")):
        noted(of, name)
    check(train(tmp_path / "run", slabs_run(corpus, slots=2), stop_after=SHORT), one, SHORT)
    for names in calls.values():
        before = [names[index - 1] for index, name in enumerate(names) if name == "send_rows"]
        assert len(before) == 2 * SHORT and set(before) == {"start_read"}


def test_nobody_begins_before_all_have_their_rows(
    corpus: Path, one: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has launched what waits for another may answer nobody: on a GPU, an evaluation stood still for a minute."""
    fetched: dict[int, int] = {}
    fetch, send = MessageExchange.prefetch, TokenExchange.send

    def fetch_late(me: MessageExchange, rows: Any) -> Any:
        slot = me.call.mailbox.slot
        time.sleep(0.05 * slot)
        found = fetch(me, rows)
        fetched[slot] = fetched.get(slot, 0) + 1
        return found

    def send_then(me: TokenExchange, *arguments: Any) -> None:
        # In the evaluation at the end the first one runs all.
        assert fetched.get(1) in (fetched[0], SHORT), fetched
        send(me, *arguments)

    monkeypatch.setattr(MessageExchange, "prefetch", fetch_late)
    monkeypatch.setattr(TokenExchange, "send", send_then)
    check(train(tmp_path / "run", slabs_run(corpus, slots=2), stop_after=SHORT), one, SHORT)
    assert fetched == {0: SHORT + 1, 1: SHORT}


def test_recomputed_layers_change_no_bit(corpus: Path, one: dict[int, Trained], tmp_path: Path) -> None:
    config = slabs_run(corpus, slots=3)
    config = replace(config, train=replace(config.train, recompute=True))
    check(train(tmp_path / "run", config, stop_after=SHORT), one, SHORT)


@pytest.mark.parametrize(
    "model",
    [
        # Modules that predict further tokens see fewer of them than the layers before.
        replace(MODEL, mtp=MTPConfig(depth=2)),
        replace(MODEL, moe=MoEConfig(router="dense"), dse=DSEConfig(layers=())),
    ],
    ids=["further tokens", "no experts"],
)
def test_models_with_other_layers_change_no_bit(model: ModelConfig, corpus: Path, tmp_path: Path) -> None:
    found = []
    for slots in (1, 3):
        config = replace(slabs_run(corpus, slots=slots), model=model)
        found.append(train(tmp_path / str(slots), config, stop_after=SHORT))
    assert found[0].curve == found[1].curve and found[0].digest == found[1].digest


def test_the_fast_order_of_parts_differs_by_rounding(
    corpus: Path, one: dict[int, Trained], tmp_path: Path
) -> None:
    found = train(
        tmp_path / "run", replace(slabs_run(corpus, slots=3), determinism="fast"), stop_after=KILLED
    )
    assert found.digest != one[KILLED].digest
    for a, b in zip(found.curve, one[KILLED].curve, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-3)


def test_replicas_follow_in_the_fast_order_too(corpus: Path, tmp_path: Path) -> None:
    """The sums of a step of one round stay in bf16, and replicas report the digests of what they were given."""
    found = []
    for replication in (1, 2):
        config = replace(slabs_run(corpus, slots=2, replication=replication), determinism="fast")
        config = replace(config, train=replace(config.train, logical_shards=2))
        found.append(train(tmp_path / str(replication), config, stop_after=SHORT))
    assert found[0].curve == found[1].curve and found[0].digest == found[1].digest


def resize_at(slots: dict[int, int]) -> Callable[[int, Run, LocalFleet], None]:
    """Want so many slots of every role after some steps."""

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        if step in slots:
            count = slots[step]
            run.generations.ask(roles=Roles(attention=count, experts=count, memory=count))

    return at_step


@pytest.mark.one_in(2)
@pytest.mark.parametrize("replication", [1, 2])
def test_slots_come_and_go_while_training_goes_on(
    replication: int, corpus: Path, one: dict[int, Trained], tmp_path: Path
) -> None:
    changes = resize_at({1: 2, 3: 4, 5: 3, 7: 2} | ({9: 1} if replication == 1 else {}))
    config = slabs_run(corpus, slots=replication, replication=replication)
    found = train(tmp_path / "run", config, at_step=changes)
    check(found, one)
    assert found.events.count("resized") >= 3 and "restored" not in found.events


class Dies:
    """Ends a slot as SIGKILL does, in its n-th call of a method from a step on.

    Args:
        of, method: whose call.
        slot, step, call: in which.
    """

    def __init__(self, of: type, method: str, *, slot: int, step: int, call: int) -> None:
        self.of, self.method, self.slot, self.step, self.call = of, method, slot, step, call
        self.fleet: LocalFleet | None = None
        self.now, self.calls, self.done = 0, 0, False

    def at_step(self, step: int, run: Run, fleet: LocalFleet) -> None:
        self.fleet, self.now = fleet, step + 1

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(self.of, self.method)

        def call(me: Any, *args: Any, **named: Any) -> Any:
            slot = me.mailbox.slot if hasattr(me, "mailbox") else me.me
            if self.now >= self.step and slot == self.slot and not self.done:
                self.calls += 1
                if self.calls == self.call:
                    self.done = True
                    assert self.fleet is not None
                    self.fleet.kill(slot)
                    raise Killed
            return original(me, *args, **named)

        monkeypatch.setattr(self.of, self.method, call)


def survives(
    fault: Dies, config: RunConfig, one: dict[int, Trained], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train while a slot dies: another one takes over from a replica, and no bit changes."""
    fault.patch(monkeypatch)
    found = train(folder, config, at_step=fault.at_step, stop_after=KILLED)
    assert fault.done
    check(found, one, KILLED)
    assert "recovered" in found.events and "restored" not in found.events


MOMENTS = {
    "forward": (DeviceExchange, "_forward", 2),
    "forward, rows half given": (TokenExchange, "_give_back", 2),
    "between put and signal": (HostLink, "signal", 3),
    "backward": (DeviceExchange, "_backward", 2),
    "dense sum": (DenseSlices, "_add_up", 1),
    "before prepared": (DeviceExchange, "_post", 1),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("slot", [0, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("moment", MOMENTS)
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
    config = slabs_run(corpus, slots=3, replication=2, standby=slot % 2)
    survives(fault, config, one, tmp_path / "run", monkeypatch)


@pytest.mark.long
def test_without_replicas_a_kill_goes_back_to_the_checkpoint_and_comes_to_the_same_bits(
    corpus: Path, one: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Dies(DeviceExchange, "_backward", slot=1, step=7, call=3)
    fault.patch(monkeypatch)
    found = train(tmp_path / "run", slabs_run(corpus, slots=2), at_step=fault.at_step)
    check(found, one)
    assert fault.done and "restored" in found.events


def test_a_slot_that_was_given_up_and_lives_writes_to_nobodys_memory(
    corpus: Path, one: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still in the middle of giving rows back, and goes on while the others are in the next generation."""
    give_back, seen = TokenExchange._give_back, dict.fromkeys(("step", "given"), 0)
    found: dict[str, LocalFleet] = {}

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        found["fleet"], seen["step"] = fleet, step + 1

    def stands_still(me: TokenExchange, *args: Any, **named: Any) -> None:
        if me.me == 1 and seen["step"] == 5 and not seen["given"]:
            seen["given"] = 1
            found["fleet"].partition(1)
            while seen["step"] < 8:
                time.sleep(0.01)
            seen["given"] = seen["step"]
        give_back(me, *args, **named)

    monkeypatch.setattr(TokenExchange, "_give_back", stands_still)
    config = slabs_run(corpus, slots=3, replication=2)
    check(train(tmp_path / "run", config, at_step=at_step), one)
    assert seen["given"] >= 8


def test_a_buffer_of_another_host_is_refused_with_a_cure() -> None:
    handle = replace(Buffer(64, torch.device("cpu")).handle, namespace="elsewhere")
    with pytest.raises(
        UserError, match=r"slot 3 is on another host.*set cluster.exchange=auto, or cluster.attention_workers"
    ):
        open_buffer(handle, torch.device("cpu"), 3)


def test_a_buffer_whose_owner_is_gone_is_no_other_one() -> None:
    gone = Buffer(64, torch.device("cpu"))
    handle = gone.handle
    opened = open_buffer(handle, torch.device("cpu"), 0)
    opened[5] = 7
    assert int(gone.bytes[5]) == 7 and not int(opened[6])
    with pytest.raises(OSError, match="another buffer"):
        open_buffer(replace(handle, token=handle.token + 1), torch.device("cpu"), 0)


@pytest.mark.parametrize("tokens", [1, 7, 12, 15])
def test_what_each_source_writes_begins_where_kernels_store_many_numbers_at_once(tokens: int) -> None:
    """With modules of further tokens a layer has fewer tokens than a part, and an odd number of them."""
    few = {"nodes": 1, "dense": 1, "dense_slice": 1, "shares": 1, "dtype": torch.bfloat16}
    sizes = Sizes(slots=3, tokens=room_for(15), top_k=6, hidden=16, **few)
    regions = sizes.cut(torch.zeros(sizes.num_bytes, dtype=torch.uint8))
    for name in ("x_STH", "ids_STK", "weights_STK"):
        every = regions.of_sources(name, tokens)
        assert every.shape == (3, tokens, getattr(regions, name).shape[2])
        assert all(source.is_contiguous() for source in every)
        assert all((source.data_ptr() - every.data_ptr()) % 16 == 0 for source in every)
        assert len({source.data_ptr() for source in every}) == 3
