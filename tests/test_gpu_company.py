"""Parts of one of two slots, of which nobody is the other, recorded and replayed on one GPU; on a CPU with a stand-in for graphs."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import train
from recorded_slots import record_slots
from test_company import job_of
from test_gpu_training import run_on
from test_gpu_waits import files_of, waits_of
from torch import Tensor

from sparseray.actors.exchange.protocol import Observe
from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.peers.link import word_of
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.training.worker import AttentionWorker
from sparseray.actors.wire.messages import PartDone
from sparseray.model.config import DSEConfig
from sparseray.platform.fleet.company import in_company
from sparseray.platform.fleet.job import SlotJob

STEPS = 4
"""Launched; launched once more, then recorded and replayed; replayed."""
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]


def company_of(job: SlotJob, observe: Observe) -> tuple[DenseSlabs, DeviceExchange]:
    """Dense weights, and the exchange, whose experts and other slot have something to give."""
    dense = job.holdings().spare()
    assert isinstance(dense, DenseSlabs)
    exchange = in_company(job, dense, observe)
    generator = torch.Generator(dense.device).manual_seed(3)
    for into in (*exchange.held.slabs[0].weights, exchange.table.regions[0].x_STH):
        into.normal_(generator=generator).mul_(0.1)
    exchange.table.regions[0].weights_STK.uniform_(generator=generator)
    exchange.held.slabs[0].refresh()
    return dense, exchange


def steps_of(job: SlotJob, *, is_graph: bool) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Sums of gradients and losses of each step, and what else there is to compare or to look at."""
    told: Counter[tuple[str, str]] = Counter()

    def observe(name: str, value: float, **labels: str) -> None:
        told[name, labels["phase"]] += value

    dense, exchange = company_of(job, observe)
    worker, parts, found = AttentionWorker(dense, exchange), exchange.plan.parts_of(0), []
    if not is_graph:
        worker.graph = None
    for step in range(1, STEPS + 1):
        exchange.expect(list(enumerate(exchange.plan.part_owners)), trains=True)
        done: dict[int, PartDone] = {}
        worker.run_step(step, parts, job.train_batches(), done.__setitem__)
        assert dense.sum.total is not None and exchange.held.sum.total is not None
        found.append(
            [
                torch.tensor([part.loss_sum for part in done.values()]),
                *(t.clone() for t in (*dense.sum.total, *exchange.held.sum.total)),
            ]
        )
        dense.discard()
        exchange.held.discard()
    said = int(exchange.table.regions[1].flags_S[0])
    assert word_of(1, exchange.across.count - 10) < said <= word_of(1, exchange.across.count)
    replayed = worker.graph is not None and worker.graph.is_recorded
    return found, {"told": told, "said": said, "count": exchange.across.count, "replayed": replayed}


def test_a_recording_holds_for_the_slots_of_a_round_and_where_the_experts_lie(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run", run_on("cpu", corpus, steps=2), stop_after=1)
    record_slots(monkeypatch)
    job = job_of(tmp_path / "run")
    _, exchange = company_of(job, lambda *_, **__: None)
    exchange.expect([(0, 0), (1, 1), (2, 0)], trains=True)
    exchange.begin(1, 0)
    assert exchange.built_in() is None, "the host counts rows"
    exchange.across.counts_rows = False
    with_both = exchange.built_in()
    assert with_both is not None and exchange.built_in() == with_both
    exchange.begin(1, 2)
    assert exchange.built_in() is None, "a round of fewer"
    exchange.expect([(0, 0), (2, 0)], trains=True)
    exchange.begin(2, 2)
    alone = exchange.built_in()
    assert alone not in (None, with_both) and exchange.launches_beside
    exchange._recomputes = True
    assert not exchange.launches_beside
    exchange.expect([(0, 0), (1, 1), (2, 0)], trains=True)
    assert exchange.launches_beside
    exchange.expect([(0, 0), (2, 0)], trains=True)
    exchange.begin(3, 2)
    before = exchange.held.slabs[0].compute
    exchange.held.slabs[0].keep(list(exchange.held.slabs[0].rows)[:-1])
    exchange.held.assign([], [])
    assert exchange.built_in() not in (None, alone) and before is not None


@pytest.mark.one_in(3)
@pytest.mark.parametrize("keys", [{}, {"recompute": True}, {"logical_shards": 2}], ids=str)
@pytest.mark.parametrize("determinism", ["bitwise", "fast"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_replayed_parts_in_company_leave_what_launched_ones_do(
    device: str,
    determinism: Any,
    keys: dict[str, Any],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(run_on(device, corpus, steps=2, **keys), determinism=determinism)
    train(tmp_path / "run", config, stop_after=1)
    if device == "cpu":
        record_slots(monkeypatch)
    job = job_of(tmp_path / "run")
    launched, by_hand = steps_of(job, is_graph=False)
    replayed, recorded = steps_of(job, is_graph=True)
    assert (by_hand.pop("replayed"), recorded.pop("replayed")) == (False, True)
    seconds = [info.pop("told") for info in (by_hand, recorded)]
    assert by_hand == recorded
    for one, other in zip(replayed, launched, strict=True):
        assert len(one) == len(other)
        if (device, determinism) == ("cuda", "fast"):  # cuDNN's order is another each time.
            assert all(float((a - b).norm()) <= 0.02 * float(b.norm()) for a, b in zip(one, other))
        else:
            assert all(map(torch.equal, one, other))
        assert all(float(tensor.float().abs().sum()) > 0 for tensor in one[:1] + one[-2:])
    for phase in ("dispatch", "combine"):
        bytes_of = [told["exchange_bytes_total", phase] for told in seconds]
        assert bytes_of[0] == bytes_of[1] > 0
        assert all(0 < told["exchange_seconds_total", phase] < 60 for told in seconds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.timeout(300)
def test_the_host_waits_for_losses_alone_where_parts_in_company_are_replayed(
    corpus: Path, tmp_path: Path
) -> None:
    """Norms come by an event that it looks at while it serves others."""
    config = run_on("cuda", corpus, steps=2)
    config = replace(config, model=replace(config.model, dse=DSEConfig(layers=())))
    train(tmp_path / "run", config, stop_after=1)
    job = job_of(tmp_path / "run")
    dense, exchange = company_of(job, lambda *_, **__: None)
    worker, parts, found = AttentionWorker(dense, exchange), exchange.plan.parts_of(0), []
    for step in range(1, STEPS + 1):
        exchange.expect(list(enumerate(exchange.plan.part_owners)), trains=True)
        found.append(waits_of(partial(worker.run_step, step, parts, job.train_batches(), lambda *_: None)))
        dense.discard()
        exchange.held.discard()
    assert worker.graph is not None and worker.graph.is_recorded
    assert files_of(found[-1]) == ["on_device.py"] * 2, found[-1]
