"""The number of actors changes no bit: losses, gradient norms and checkpoints equal those of one actor."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faulty_transport import Faults, Sent
from local_cluster import MODEL, LocalFleet, Trained, tiny_run, train

from sparseray.actors.exchange.answers import Answers
from sparseray.actors.exchange.by_message import MessageExchange
from sparseray.actors.exchange.protocol import FetchedRows
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.training.token_data import TokenDataset, batch
from sparseray.actors.training.worker import AttentionWorker
from sparseray.actors.wire.envelope import Body
from sparseray.actors.wire.messages import FetchRows
from sparseray.model.buckets import bucket_bounds
from sparseray.model.dse import LocalMemory
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer, cross_entropy_sum
from sparseray.platform.checks import check_cluster
from sparseray.platform.opening import build_layout, training_inventory

STEPS, SOME, SHORT = 12, 7, 3
PLACEMENTS = list(itertools.product((1, 2, 4), (1, 2, 3), (1, 2), (1, 2)))
# The largest goes through the schedule's end. Every pair of values of two of the four numbers occurs among those that go
# through the warm-up's; the rest stop before.
LARGEST = PLACEMENTS[-1]
LONG = [
    (1, 2, 1, 2), (1, 3, 2, 1), (1, 1, 2, 2), (2, 1, 2, 1), (2, 2, 2, 2), (2, 3, 1, 2),
    (2, 2, 1, 1), (4, 1, 1, 2), (4, 2, 2, 1), (4, 3, 2, 2), (4, 3, 1, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    """One actor of each role, by the number of steps."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        steps: train(folder / str(steps), tiny_run(corpus, steps=STEPS), stop_after=steps)
        for steps in (SHORT, SOME, STEPS)
    }


def check(found: Trained, reference: Trained) -> None:
    assert found.curve == reference.curve
    assert found.evaluations == reference.evaluations
    assert found.digest == reference.digest


def test_the_loss_falls_and_the_short_run_is_the_start_of_the_long_one(reference: dict[int, Trained]) -> None:
    curve = reference[STEPS].curve
    assert len(curve) == STEPS
    assert curve[-1][0] < curve[0][0] - 0.5
    assert reference[SHORT].curve == curve[:SHORT]
    assert reference[SHORT].digest != reference[STEPS].digest


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("attention", "experts", "memory", "replication"), PLACEMENTS)
def test_placement_changes_no_bit(
    attention: int,
    experts: int,
    memory: int,
    replication: int,
    corpus: Path,
    reference: dict[int, Trained],
    tmp_path: Path,
) -> None:
    placement = attention, experts, memory, replication
    steps = STEPS if placement == LARGEST else SOME if placement in LONG else SHORT
    config = tiny_run(
        corpus,
        steps=STEPS,
        attention_workers=attention,
        expert_shards=experts,
        memory_shards=memory,
        replication=replication,
    )
    check(train(tmp_path / "run", config, stop_after=steps), reference[steps])


@pytest.mark.parametrize(
    ("attention", "experts", "memory", "replication"),
    [(1, 1, 1, 1), (2, 2, 2, 1), (4, 3, 2, 2), (1, 3, 2, 3), (2, 1, 1, 2)],
)
def test_colocated_roles_change_no_bit(
    attention: int,
    experts: int,
    memory: int,
    replication: int,
    corpus: Path,
    reference: dict[int, Trained],
    tmp_path: Path,
) -> None:
    config = tiny_run(
        corpus,
        steps=STEPS,
        attention_workers=attention,
        expert_shards=experts,
        memory_shards=memory,
        replication=replication,
        colocated=True,
    )
    check(train(tmp_path / "run", config, stop_after=SHORT), reference[SHORT])


@pytest.mark.parametrize("abreast", [2, 3])
def test_parts_side_by_side_in_one_slot_change_no_bit(
    abreast: int, corpus: Path, reference: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    run = AttentionWorker._run
    monkeypatch.setattr(torch, "get_num_threads", lambda: abreast)
    monkeypatch.setattr(
        AttentionWorker, "_run", lambda self, calls: (at_once.append(len(calls)), run(self, calls))[1]
    )
    config = tiny_run(corpus, steps=STEPS, colocated=True)
    check(train(tmp_path / "run", config, stop_after=SHORT), reference[SHORT])
    assert max(at_once) == abreast and sum(at_once) == SHORT * config.train.logical_shards


def test_tcp_changes_no_bit(corpus: Path, reference: dict[int, Trained], tmp_path: Path) -> None:
    config = tiny_run(corpus, steps=STEPS, attention_workers=2, expert_shards=2, memory_shards=2)
    check(train(tmp_path / "run", config, tcp=True, stop_after=SHORT), reference[SHORT])


class Differentiable:
    """Rows of an exchange, as the leaves of a graph."""

    def __init__(self, exchange: MessageExchange) -> None:
        self.exchange = exchange

    def prefetch(self, rows: dict[int, torch.Tensor]) -> FetchedRows:
        return self.exchange.prefetch(rows).differentiable()


class Direct:
    """Asks the holders of the state themselves: no mailbox, no frames."""

    step, part = 1, 0
    mailbox = SimpleNamespace(slot=0)

    def __init__(self, answers_at: dict[int, Answers]) -> None:
        self.answers_at = answers_at
        self.asked: list[int] = []

    def __call__(self, requests: list[tuple[int, Body]], reply: type, layer: int = -1) -> list[Body]:
        self.asked += [slot for slot, body in requests if isinstance(body, FetchRows)]
        return [self.answers_at[slot](body, layer, self.part) for slot, body in requests]


def check_rows_of_neighbours(exchange: MessageExchange, asked: list[int], rows: torch.Tensor) -> None:
    """A shard on this host is asked once in a generation, and again while its rows are of another step."""
    first, addresses = list(asked), {1: rows.flatten(0, 1)}
    assert first == list(exchange.plan.memory_primaries), "each was asked once"
    exchange.call.step = 2
    expected = exchange.prefetch(addresses).values[1]
    assert asked == 2 * first, "the commit of step 1 is still to be applied"
    exchange.call.step = 1
    exchange.take_fetches()
    torch.testing.assert_close(exchange.prefetch(addresses).values[1], expected, rtol=0.0, atol=0.0)
    assert asked == 2 * first
    (fetch,) = exchange.take_fetches()
    assert fetch.rows_by_tier == {"local": 0, "shared": len(addresses[1].unique()), "remote": 0}


def test_rows_of_shards_on_the_same_host_are_read_without_asking(
    corpus: Path, reference: dict[int, Trained], tmp_path: Path
) -> None:
    asked: list[tuple[int, int]] = []

    def count(sent: Sent, fleet: LocalFleet) -> None:
        if sent.kind == "fetch_rows":
            asked.append((sent.source, sent.to))

    config = tiny_run(corpus, steps=STEPS, attention_workers=2, memory_shards=2)
    check(train(tmp_path / "run", config, stop_after=STEPS, faults=Faults(on_send=count)), reference[STEPS])
    assert len(set(asked)) == 4, "each worker has asked each shard where its tables are"
    # Besides, a shard that has not applied a commit yet is asked to answer once it has.
    assert len(asked) < 4 * STEPS / 2


@pytest.mark.parametrize("experts", [1, 3])
def test_remote_exchange_equals_the_plain_modules(experts: int, corpus: Path) -> None:
    """One part through the holders of experts and rows, and through LocalExperts and LocalMemory."""
    config = tiny_run(corpus, expert_shards=experts, memory_shards=2)
    data = TokenDataset(corpus, "train", verify=False)
    layout = build_layout(MODEL, data)
    assert layout is not None
    one = batch(data, seed=0, step=1, part=0, num_parts=4, sequences_per_part=2, seq_len=32)
    plan = check_cluster(config.cluster, training_inventory(config))
    common = {"seed": 0, "num_parts": 1, "betas": (0.9, 0.95), "eps": 1e-8}
    table = [layout.num_rows(1)]
    experts_at: dict[int, ExpertShard] = {}
    answers_at: dict[int, Answers] = {}
    for slot in plan.addresses:
        experts = ExpertShard(MODEL, weight_decay=0.0, **common)
        memory = MemoryShard(MODEL, table, **common)
        owned, buckets = plan.experts_of(slot), plan.buckets_of(slot)
        experts.initialize(owned)
        experts.assign(owned, owned)
        memory.initialize(buckets)
        memory.assign(buckets, buckets, generation=plan.generation)
        holdings = Holdings(lambda: None, experts, memory)
        answers_at[slot] = Answers(holdings, lambda *_, **__: None, with_optimizer=True)
        if owned:
            experts_at[slot] = experts

    def run(model: Transformer, expert_side: object, memory_side: object) -> tuple[float, dict]:
        out = model(
            one.tokens_BT,
            experts=expert_side,
            memory=memory_side,
            document_starts_BT=one.document_starts_BT,
        )
        loss = cross_entropy_sum(model, out.hidden_BTH, one.targets_BT)
        (loss + out.aux_loss).backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}

    local_experts, local_memory = LocalExperts(MODEL, seed=0), LocalMemory(MODEL, layout, seed=0)
    plain_loss, plain = run(Transformer(MODEL, layout, seed=0), local_experts, local_memory)
    call = Direct(answers_at)
    exchange = MessageExchange(
        plan, call, None, moe_layers=MODEL.moe_layers, memory_layers=(1,),
        bounds=[bucket_bounds(table[0], MODEL.dse.num_buckets)],
    )  # fmt: skip
    loss, gradients = run(Transformer(MODEL, layout, seed=0), exchange.experts, Differentiable(exchange))
    assert loss == plain_loss
    check_rows_of_neighbours(
        exchange, call.asked, layout.rows(1, one.tokens_BT, None, one.document_starts_BT)
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    for holder in experts_at.values():
        assert holder.finish_part(0)
        for key, reduced in holder.reduced.items():
            expected = [local_experts.gradients()[name].reshape(-1) for name in holder.names(key)]
            torch.testing.assert_close(reduced, torch.cat(expected), rtol=1e-5, atol=1e-6)
