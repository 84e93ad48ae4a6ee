"""Steps that a slot makes in company before it serves: they run what two slots of a run do, and leave nothing."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import train
from test_across_slots import slabs_run
from torch import Tensor

from sparseray.actors.installation import JobSpec
from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.peers.link import HostLink
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.kernels.held_ops import PlainHeldOps
from sparseray.model.config import MTPConfig
from sparseray.model.dse_layout import DSELayout
from sparseray.model.statistics import is_collecting
from sparseray.platform.config import RunConfig, load_yaml, to_dict
from sparseray.platform.fleet import company, warming
from sparseray.platform.fleet.company import Shares, distinct_shares, in_company, rehearse_in_company
from sparseray.platform.fleet.job import SlotJob
from sparseray.platform.fleet.weights_port import WeightsPort
from sparseray.platform.metrics.exporter import Metrics

CALLS = {
    HostLink: (
        "put",
        "put_all",
        "put_tokens",
        "give_rows",
        "give_sums",
        "signal_all",
        "signal",
        "wait",
        "start_read",
    ),
    PlainHeldOps: (
        "group_held",
        "held_forward",
        "held_backward",
        "combine_slots",
        "owners_of",
        "sum_of_owners",
    ),
}


ABOUT: dict[str, Callable[..., Any]] = {
    # Rows are sorted into groups by kernels for so many in powers of two, and summed by kernels for so many.
    "group_held": lambda _groups_TK, num_sets, num_held, _like: (num_sets * num_held).bit_length(),
    "combine_slots": lambda rows_TKH, _weights_TK: rows_TKH.shape[1],
    "sum_of_owners": lambda rows_TOH, _owners_T: rows_TOH.shape[1],
}


def kind(value: Any) -> Any:
    """Of an argument, what a kernel is compiled for: of tensors dtype and the rows' width, of others whether they are there."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape[-1] if value.dim() > 1 else 1
    return value is not None


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What was asked of links and operations, with the kinds of the first arguments."""
    found: set[Any] = set()

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(me: Any, *arguments: Any, **named: Any) -> Any:
            about = ABOUT[name](*arguments) if name in ABOUT else None
            found.add((name, *map(kind, arguments[:1]), len(arguments), about, *sorted(named.items())))
            return original(me, *arguments, **named)

        return call

    for owner, names in CALLS.items():
        for name in names:
            monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    return found


def job_of(run: Path) -> SlotJob:
    config, identity = load_yaml(run / "config.yaml"), run / "identity"
    layout = DSELayout.load(identity).sha256 if config.model.dse.layers else ""
    spec = JobSpec(
        config=json.dumps(to_dict(config)), layout=str(identity) if layout else "", layout_sha256=layout
    )
    return SlotJob(spec, Metrics({}), WeightsPort())


def slot_of(run: Path) -> tuple[SlotJob, DenseSlabs]:
    """A slot of a run that has begun, and its dense weights."""
    job = job_of(run)
    dense = job.holdings().spare()
    assert isinstance(dense, DenseSlabs)
    return job, dense


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("determinism", "replication", "changes"),
    [("fast", 2, {}), ("bitwise", 1, {}), ("bitwise", 2, {"mtp": MTPConfig(depth=1)}), ("bitwise", 1, {"recompute": True})],
)  # fmt: skip
def test_what_two_slots_run_was_run_before_and_nothing_stays(
    determinism: Any,
    replication: int,
    changes: dict[str, Any],
    corpus: Path,
    tmp_path: Path,
    called: set[Any],
) -> None:
    config = slabs_run(corpus, slots=2, replication=replication)
    config = replace(config, determinism=determinism)
    if "mtp" in changes:
        config = replace(config, model=replace(config.model, **changes))
    else:
        config = replace(config, train=replace(config.train, **changes))
    train(tmp_path / "run", config, stop_after=2)
    wanted = set(called)
    combined = "sum_of_owners" if determinism == "fast" else "combine_slots"
    assert {name for name, *_ in wanted} >= {
        "put",
        "put_all",
        "owners_of",
        "held_forward",
        "held_backward",
        combined,
    }
    called.clear()
    job, dense = slot_of(tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    rehearse_in_company(job, dense)
    assert wanted - called == set()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.model.state_dict().items())
    assert dense.sum.total is None and not list(dense.sum.nodes())


@pytest.mark.one_in(10)
@pytest.mark.parametrize("determinism", ["bitwise", "fast"])
@pytest.mark.parametrize(
    "roles",
    [
        {"expert_shards": 1},
        {"attention_workers": 1},
        {"slots": 3},
        {"slots": 3, "expert_shards": 2},
        {"slots": 3, "attention_workers": 1},
    ],
    ids=str,
)
def test_what_slots_run_that_come_one_after_another_was_run_before(
    roles: dict[str, int], determinism: Any, corpus: Path, tmp_path: Path, called: set[Any]
) -> None:
    """Roles come and go by commands of their own; then one slot has all experts, or all parts."""
    config = replace(slabs_run(corpus, **{"slots": 2, **roles}), determinism=determinism)
    train(tmp_path / "run", config, stop_after=1)
    wanted = set(called)
    called.clear()
    job, dense = slot_of(tmp_path / "run")
    rehearse_in_company(job, dense, 3)
    assert wanted - called == set()


def test_a_slot_has_run_what_evaluations_and_statistics_need(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first of them is compiled in mid-training: kernels without gradients are others."""
    train(tmp_path / "run", slabs_run(corpus), stop_after=1)
    job, dense = slot_of(tmp_path / "run")
    ways, loss = list[tuple[bool, bool]](), warming.cross_entropy_sum

    def noted(*arguments: Any) -> Tensor:
        ways.append((torch.is_grad_enabled(), is_collecting()))
        return loss(*arguments)

    monkeypatch.setattr(warming, "cross_entropy_sum", noted)
    warming.rehearse(job, dense)
    assert ways == [(True, False), (False, True)]
    assert all(parameter.grad is None for parameter in dense.parameters)


def test_a_rehearsal_is_short() -> None:
    config = RunConfig()
    for determinism, most in (("fast", 8), ("bitwise", 9)):
        found = distinct_shares(replace(config, determinism=determinism), 8)
        assert found[0] == (2, 2) and len(found) <= most, found


@pytest.mark.one_in(2)
@pytest.mark.parametrize("at", ["held_backward", "held_forward"])
def test_a_rehearsal_that_fails_leaves_nothing(
    at: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot goes on without it, and a gradient that was left would be in its first step."""

    begun, all_of = list[Shares](), in_company

    def noted(job: Any, dense: Any, observe: Any, shares: Shares) -> DeviceExchange:
        begun.append(shares)
        return all_of(job, dense, observe, shares)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    train(tmp_path / "run", slabs_run(corpus), stop_after=1)
    job, dense = slot_of(tmp_path / "run")
    monkeypatch.setattr(company, "in_company", noted)
    monkeypatch.setattr(PlainHeldOps, at, full)
    rehearse_in_company(job, dense, 3)
    # Others may take less.
    assert begun == distinct_shares(job.config, 3) and len(begun) > 1
    assert dense.sum.total is None and not list(dense.sum.nodes())
    assert all(parameter.grad is None for parameter in dense.parameters)


def test_a_rehearsal_has_one_buffer_at_a_time_and_leaves_none(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several slots lay open to each other takes tens of gigabytes of a large model."""
    exchanges, all_of = list["weakref.ref[DeviceExchange]"](), in_company

    def noted(job: Any, dense: Any, observe: Any, shares: Shares) -> DeviceExchange:
        assert all(of() is None for of in exchanges)
        found = all_of(job, dense, observe, shares)
        exchanges.append(weakref.ref(found))
        return found

    train(tmp_path / "run", slabs_run(corpus), stop_after=1)
    job, dense = slot_of(tmp_path / "run")
    monkeypatch.setattr(company, "in_company", noted)
    rehearse_in_company(job, dense, 3)
    assert len(exchanges) > 1 and all(of() is None for of in exchanges)
