"""Pure parts of the platform, without Ray and without processes."""

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseray.actors.state.adamw import AdamW
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.tree import TreeSum
from sparseray.actors.wire.codec import from_plain, to_plain
from sparseray.errors import ConfigError
from sparseray.model.presets import preset
from sparseray.platform.config import OptimConfig, RunConfig, from_dict, load_yaml, parse, save_yaml, to_dict
from sparseray.platform.fleet.priority import NICENESS, gently
from sparseray.platform.planning.inventory import Inventory, Roles, num_slots
from sparseray.platform.planning.replan import make_plan
from sparseray.platform.planning.schedule import learning_rate
from sparseray.platform.run.journal import Journal

ROOT = Path(__file__).resolve().parent.parent

# -- sums ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 13), st.integers(1, 4), st.randoms(use_true_random=False))
def test_sum_depends_neither_on_the_order_of_leaves_nor_on_who_adds_them(
    leaves: int, workers: int, random: Any
) -> None:
    generator = torch.Generator().manual_seed(leaves)
    values = [torch.randn(5, generator=generator) * 10.0 ** (3 * (i % 3)) for i in range(leaves)]

    def add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right

    alone = TreeSum(leaves, add)
    for index, value in enumerate(values):
        alone.add(0, index, value)
    trees = [TreeSum(leaves, add) for _ in range(workers)]
    order = list(range(leaves))
    random.shuffle(order)
    for index in order:
        trees[random.randrange(workers)].add(0, index, values[index])
    for tree in trees[1:]:
        for level, index, value in tree.nodes():
            trees[0].add(level, index, value)
    assert alone.root is not None
    assert trees[0].root is not None
    assert torch.equal(trees[0].root, alone.root)
    torch.testing.assert_close(alone.root, torch.stack(values).sum(0), rtol=1e-4, atol=1e-2)


def test_sum_is_not_there_before_its_last_leaf() -> None:
    tree = TreeSum[int](5, lambda left, right: left + right)
    for index in (4, 0, 3, 1):
        tree.add(0, index, 1)
        assert tree.root is None
    tree.add(0, 2, 1)
    assert tree.root == 5


# -- placement -------------------------------------------------------------------------------------


def plan_of(attention: int, experts: int, memory: int, replication: int, *, colocated: bool) -> Plan:
    roles = Roles(attention=attention, experts=experts, memory=memory)
    slots = num_slots(roles, colocated=colocated)
    return make_plan(
        generation=1,
        addresses={slot: f"ipc://{slot}" for slot in range(slots)},
        inventory=Inventory(parts=8, moe_layers=2, experts=16, dse_layers=2, buckets=9),
        roles=roles,
        replication=replication,
        colocated=colocated,
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_plan_gives_everything_its_number_of_distinct_holders(
    attention: int, experts: int, memory: int, replication: int, colocated: bool
) -> None:
    slots = num_slots(Roles(attention=attention, experts=experts, memory=memory), colocated=colocated)
    if replication > slots:
        with pytest.raises(ConfigError, match="replication"):
            plan_of(attention, experts, memory, replication, colocated=colocated)
        return
    plan = plan_of(attention, experts, memory, replication, colocated=colocated)
    for holders in [h for table in (plan.experts, plan.buckets) for row in table for h in row]:
        assert len(set(holders)) == len(holders) == replication
    assert len(set(plan.dense)) == len(plan.dense) == max(attention, replication)
    assert plan.dense[: len(plan.attention)] == plan.attention
    assert (len(plan.attention), len(plan.expert_primaries)) == (attention, experts)
    assert len(plan.memory_primaries) == memory
    sizes = [len(plan.parts_of(slot)) for slot in plan.attention]
    assert max(sizes) - min(sizes) <= 1
    assert from_plain(Plan, json.loads(json.dumps(to_plain(plan)))) == plan
    if not colocated:
        assert not set(plan.attention) & set(plan.expert_primaries)
        assert not set(plan.expert_primaries) & set(plan.memory_primaries)


# -- journal, configuration, schedule --------------------------------------------------------------


def test_journal_keeps_decisions_across_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.lead()
    for step in range(3):
        journal.append("commit", generation=1, step=step, norm=step / 3)
    journal.append("plan", generation=2, step=3)
    # Not closed: a killed scheduler does not close its journal either.
    again = Journal(tmp_path / "journal.sqlite")
    last = again.last("commit")
    assert last is not None
    assert (last["step"], last["norm"], last["generation"]) == (2, 2 / 3, 1)
    assert [d["kind"] for d in again.read(limit=2)] == ["plan", "commit"]
    assert again.last("nothing") is None
    again.close()
    journal.close()


@pytest.mark.parametrize("name", ["tiny", "small", "1b"])
def test_configuration_survives_yaml(tmp_path: Path, name: str) -> None:
    config = RunConfig(model=preset(name), optim=OptimConfig(lr=1.0 / 3.0))
    save_yaml(config, tmp_path / "a.yaml")
    assert load_yaml(tmp_path / "a.yaml") == config
    assert from_dict(RunConfig, to_dict(config)) == config
    assert parse(["--config", str(tmp_path / "a.yaml")], prog="x", description="") == config


def test_tiny_configuration_is_the_tiny_preset() -> None:
    config = parse(["--config", str(ROOT / "configs" / "tiny.yaml")], prog="x", description="")
    assert config.model == preset("tiny")
    assert load_yaml(ROOT / "configs" / "tiny.yaml") == config


def test_option_after_the_file_wins() -> None:
    file = ["--config", str(ROOT / "configs" / "tiny.yaml")]
    options = [
        "--train.steps",
        "7",
        "--model.moe.top_k=2",
        "--model.attention",
        '["full","full","nsa","nsa"]',
    ]
    config = parse([*file, *options], prog="x", description="")
    assert config.train.steps == 7
    assert config.model.moe.top_k == 2
    assert config.model.attention == ("full", "full", "nsa", "nsa")
    assert config.model.dse.layers == (1, 2)


def test_learning_rate_rises_linearly_and_falls_to_its_floor() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, optim, 110) for step in range(1, 111)]
    assert rates[:10] == [step / 10 for step in range(1, 11)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert math.isclose(rates[59], 0.55)
    assert math.isclose(rates[-1], 0.1)
    assert math.isclose(learning_rate(500, optim, 110), 0.1)
    assert learning_rate(1, OptimConfig(lr=1.0, warmup_steps=0), 5) <= 1.0
    assert learning_rate(1, OptimConfig(lr=1.0, warmup_steps=20), 5) == 0.05


# -- what a slot is made of --------------------------------------------------------------------------


def test_adamw_is_torchs_to_the_bit_also_after_a_move() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    ours, names = [p.clone() for p in theirs], ["matrix", "vector"]
    optim: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, fused=True, **optim)
    adamw = AdamW(weight_decay=0.1, **optim)
    for step in range(1, 7):
        gradients = [torch.randn(p.shape, generator=generator) for p in theirs]
        for parameter, gradient in zip(theirs, gradients):
            parameter.grad = gradient.clone()
        for group in peer.param_groups:
            group["lr"] = 0.01 / step
        peer.step()
        adamw.step(ours, gradients, lr=0.01 / step)
        if step == 3:
            moved, adamw = adamw.tensors(names, ours), AdamW(weight_decay=0.1, **optim)
            adamw.begin_load(ours, step)
            for name, moment in adamw.tensors(names, ours).items():
                moment.copy_(moved[name])
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_gentle_work_has_a_low_priority_and_leaves_the_callers_as_it_is() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    assert gently(niceness) == max(NICENESS, before)
    assert niceness() == before
    with pytest.raises(ZeroDivisionError):
        gently(lambda: 1 // 0)


def test_a_slots_state_is_built_without_torchs_compiler() -> None:
    # It would cost every slot that starts beside a running job 1.3 s of processor time.
    program = (
        "import sys; from dataclasses import replace; from sparseray.actors.state.dense import DenseState; from sparseray.model.config import DSEConfig; from sparseray.model.presets import preset;"
        "config = replace(preset('tiny'), dse=DSEConfig());"
        "state = DenseState(config, None, seed=0, num_parts=1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1);"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "False"
