"""Modules that predict further tokens, in training: their loss and counts, and that neither placement nor a kill changes a bit."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faulty_transport import Faults, Sent
from local_cluster import MODEL, LocalFleet, Trained, tiny_run, train

from sparseray.actors.training.objective import next_token
from sparseray.actors.training.token_data import Batch
from sparseray.errors import ConfigError
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig, MTPConfig
from sparseray.model.counts import count_parameters, flops_per_token
from sparseray.model.moe import LocalExperts
from sparseray.model.presets import preset
from sparseray.model.transformer import Transformer
from sparseray.platform.config import RunConfig, load_yaml

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
TWO = MTPConfig(depth=2, loss_weight=0.3, later_loss_weight=0.1, later_from=5)
PLAIN = replace(MODEL, dse=DSEConfig(layers=()), mtp=TWO)


def run_of(corpus: Path, mtp: MTPConfig = TWO, **cluster: Any) -> RunConfig:
    found = tiny_run(corpus, steps=STEPS, **cluster)
    train_config = replace(found.train, eval_every=4)
    return replace(found, model=replace(found.model, mtp=mtp), train=train_config)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("reference") / "run", run_of(corpus))


def check(found: Trained, reference: Trained) -> None:
    assert found.curve == reference.curve
    assert [r["losses"] for r in found.records] == [r["losses"] for r in reference.records]
    assert found.evaluations == reference.evaluations
    assert found.digest == reference.digest


@pytest.mark.long
@pytest.mark.parametrize(
    ("attention", "experts", "memory", "replication", "colocated"),
    [(2, 2, 1, 1, False), (4, 3, 2, 2, False), (2, 1, 2, 1, True), (1, 1, 1, 1, True)],
)
def test_placement_changes_no_bit(
    attention: int,
    experts: int,
    memory: int,
    replication: int,
    colocated: bool,
    corpus: Path,
    reference: Trained,
    tmp_path: Path,
) -> None:
    config = run_of(
        corpus,
        attention_workers=attention,
        expert_shards=experts,
        memory_shards=memory,
        replication=replication,
        colocated=colocated,
    )
    check(train(tmp_path / "run", config), reference)


@pytest.mark.long
def test_parts_side_by_side_change_no_bit(
    corpus: Path, reference: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check(train(tmp_path / "run", run_of(corpus, colocated=True)), reference)


@pytest.mark.long
def test_a_killed_expert_shard_changes_no_bit(corpus: Path, reference: Trained, tmp_path: Path) -> None:
    done = []

    def kill(sent: Sent, fleet: LocalFleet) -> None:
        if not done and sent.source == 2 and sent.kind == "expert_rows" and sent.step >= 5:
            done.append(sent)
            fleet.kill(2)

    config = run_of(
        corpus, attention_workers=2, expert_shards=2, memory_shards=2, replication=2, deadline_s=3.0
    )
    found = train(tmp_path / "run", config, faults=Faults(on_send=kill))
    assert done
    check(found, reference)


def test_the_losses_of_the_modules_fall_and_are_in_the_record_of_their_step(reference: Trained) -> None:
    first, last = reference.records[0]["losses"], reference.records[-1]["losses"]
    assert set(first) == {"mtp_1", "mtp_2"}
    assert all(last[name] < first[name] - 0.1 for name in first)
    assert len(reference.records[0]["expert_load"]) == len(MODEL.moe_layers) + 2


def test_modules_without_weight_leave_the_network_as_it_is(corpus: Path, tmp_path: Path) -> None:
    def losses(mtp: MTPConfig) -> tuple[list[float], list[float]]:
        config = run_of(corpus, mtp)
        moe = replace(config.model.moe, balance_loss=0.0)
        config = replace(config, model=replace(config.model, moe=moe))
        found = train(tmp_path / str(mtp.depth), config)
        return [r["loss"] for r in found.records], found.evaluations

    assert losses(MTPConfig(depth=2, loss_weight=0.0)) == losses(MTPConfig())


class OneBatch:
    """Two documents in the second sequence, the first one with a weight of its own for each token."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(0, MODEL.vocab_size, (2, 17), generator=generator)
        starts = torch.zeros(2, 16, dtype=torch.bool)
        starts[:, 0] = starts[1, 9] = True
        weights = torch.rand(2, 16, generator=generator)
        weights[0, 3] = 0.0
        targets = tokens[:, 1:].clone()
        targets[0, 3] = -1
        self.batch = Batch(
            tokens_BT=tokens[:, :-1], targets_BT=targets, weights_BT=weights, document_starts_BT=starts
        )


def test_the_loss_is_that_of_the_paper_token_by_token() -> None:
    """Every place of every module alone: shared embedding and head, no step over a document's start."""
    model, experts = Transformer(PLAIN, None, seed=1), LocalExperts(PLAIN, seed=1)
    batch = OneBatch().batch
    exchange: Any = SimpleNamespace(experts=experts)
    loss = next_token(model, batch, exchange, lambda layer: torch.empty(0), step=5)
    assert loss.further is not None
    hidden = model(batch.tokens_BT, experts=experts, memory=None).hidden_BTH
    total, weights = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for k, out in enumerate(model.predictions(batch.tokens_BT, hidden, experts), 1):
        assert out.hidden_BTH.shape == (2, 16 - k, MODEL.hidden)
        for b in range(2):
            for i in range(16 - k):
                target = int(batch.targets_BT[b, i + k])
                if batch.document_starts_BT[b, i + 1 : i + k + 1].any() or target < 0:
                    continue
                logits = out.hidden_BTH[b, i].double() @ model.head_weight.double().T
                ce = F.cross_entropy(logits[None], torch.tensor([target]))
                weight = float(batch.weights_BT[b, i + k])  # type: ignore[index]
                total[k - 1] += weight * ce.item()
                weights[k - 1] += weight
    torch.testing.assert_close(loss.further.double(), 0.1 / 2 * total.sum(), rtol=1e-5, atol=0)
    means = torch.stack(list(loss.metrics.values())).double()
    torch.testing.assert_close(means, total / weights, rtol=1e-5, atol=0)
    before = next_token(model, batch, exchange, lambda layer: torch.empty(0), step=4).further
    torch.testing.assert_close(before, loss.further * 3)


def test_a_module_sees_no_token_beyond_its_own() -> None:
    model, experts = Transformer(PLAIN, None, seed=1), LocalExperts(PLAIN, seed=1)
    tokens = OneBatch().batch.tokens_BT
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 7) % MODEL.vocab_size

    def hidden(tokens: torch.Tensor) -> list[torch.Tensor]:
        main = model(tokens, experts=experts, memory=None).hidden_BTH
        return [out.hidden_BTH for out in model.predictions(tokens, main, experts)]

    for k, (one, other) in enumerate(zip(hidden(tokens), hidden(changed)), 1):
        assert torch.allclose(one[:, : 10 - k], other[:, : 10 - k], atol=1e-6)
        assert not torch.allclose(one[:, 10 - k], other[:, 10 - k], atol=1e-3)


def test_an_evaluation_knows_the_next_token_alone() -> None:
    model, experts = Transformer(PLAIN, None, seed=1), LocalExperts(PLAIN, seed=1)
    exchange: Any = SimpleNamespace(experts=experts)
    loss = next_token(model, OneBatch().batch, exchange, lambda layer: torch.empty(0), step=None)
    assert loss.further is None and not loss.metrics
    assert len(loss.counts_LE) == len(MODEL.moe_layers)


@pytest.mark.parametrize(
    "config",
    [
        replace(preset("tiny"), dse=DSEConfig(), mtp=MTPConfig(depth=1)),
        replace(MODEL, dse=DSEConfig(), attention=("mla",), tie_embeddings=False, mtp=MTPConfig(depth=2)),
        replace(MODEL, dse=DSEConfig(), moe=MoEConfig(router="dense"), mtp=MTPConfig(depth=3)),
        replace(MODEL, dse=DSEConfig(), moe=MoEConfig(leading_dense=3), mtp=MTPConfig(depth=1)),
    ],
)
def test_counts_equal_what_the_modules_hold(config: ModelConfig) -> None:
    counts, model = count_parameters(config), Transformer(config, None)
    assert counts["dense"] == sum(p.numel() for p in model.parameters())
    assert counts["experts"] == sum(p.numel() for p in LocalExperts(config).parameters())
    layer = model.layers[-1]
    assert [(type(m.block.attention), type(m.block.moe)) for m in model.mtp] == [
        (type(layer.attention), type(layer.moe))
    ] * config.mtp.depth


def test_flops_of_a_module_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, hidden=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=6,
        moe=MoEConfig(num_experts=4, top_k=2, num_shared=1, expert_dim=6, leading_dense=0), mtp=MTPConfig(depth=2),
    )  # fmt: skip
    matrices = 8 * (8 + 4 + 4) + 8 * 8 + 8 * 4 + 3 * 8 * 6 + 2 * 3 * 8 * 6 + 10 * 8 + 8 * 16
    # Of five tokens the first module has four rows, with 2.5 keys each, the second one three, with two.
    expected = (4 * (2 * matrices + 2 * 2.5 * 2 * 8) + 3 * (2 * matrices + 2 * 2.0 * 2 * 8)) / 5
    flops, without = flops_per_token(config, 5), flops_per_token(replace(config, mtp=MTPConfig()), 5)
    assert flops["mtp"] == pytest.approx(expected)
    assert flops["active"] == without["active"] and without["mtp"] == 0
    assert flops["training"] == 3 * (flops["active"] + flops["mtp"])


def test_the_configuration_with_a_module_trains(corpus: Path, tmp_path: Path) -> None:
    config = load_yaml(ROOT / "configs" / "mtp.yaml")
    found = train(
        tmp_path / "run",
        replace(
            config,
            data=replace(config.data, path=str(corpus), verify=False),
            train=replace(config.train, steps=2, seq_len=32, sequences_per_shard=1, eval_batches=1),
        ),
    )
    assert set(found.records[0]["losses"]) == {"mtp_1"}


def test_sequences_must_be_longer_than_what_is_predicted(corpus: Path, tmp_path: Path) -> None:
    config = run_of(corpus, MTPConfig(depth=32))
    with pytest.raises(ConfigError, match=r"train.seq_len=32 .*model.mtp.depth=32"):
        train(tmp_path / "run", config)
