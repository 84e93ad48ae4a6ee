"""Losses with a weight for each token: what a part's gradient is divided by is that of the whole global batch."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from local_cluster import MODEL, tiny_run, train
from torch import Tensor

from sparseray.actors import roles
from sparseray.actors.exchange.protocol import Exchange, PartGradients
from sparseray.actors.state.dense import DenseState
from sparseray.actors.training.objective import Loss, next_token
from sparseray.actors.training.token_data import Batch, TokenDataset
from sparseray.actors.training.token_data import batch as token_batch
from sparseray.actors.training.worker import AttentionWorker
from sparseray.actors.wire.messages import PartDone
from sparseray.model.config import DSEConfig
from sparseray.model.dse import Rows
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer, cross_entropy_sum

PARTS = 2
CONFIG = replace(MODEL, dse=DSEConfig(layers=()), moe=replace(MODEL.moe, balance_loss=0.0))
GENERATOR = torch.Generator().manual_seed(3)
TOKENS = torch.randint(0, 300, (2 * PARTS, 17), generator=GENERATOR)
# The first part has few targets that count, the second one many; one target is -1 besides.
WEIGHTS = (
    torch.rand(2 * PARTS, 16, generator=GENERATOR) > torch.tensor([0.9, 0.9, 0.2, 0.2])[:, None]
).float()


def targets() -> Tensor:
    found = TOKENS[:, 1:].clone()
    found[WEIGHTS == 0] = -1
    return found


class Source:
    """Two parts of two sequences."""

    def __call__(self, step: int, part: int) -> Batch:
        rows = slice(2 * part, 2 * part + 2)
        starts = torch.zeros(2, 16, dtype=torch.bool)
        return Batch(
            tokens_BT=TOKENS[rows, :-1],
            targets_BT=targets()[rows],
            weights_BT=WEIGHTS[rows],
            document_starts_BT=starts,
        )

    def weight(self, step: int) -> float:
        return float(WEIGHTS.sum())


class InProcess:
    """`Exchange` of experts as modules; it keeps the gradients."""

    abreast = 1

    def __init__(self) -> None:
        self.experts, self.found = LocalExperts(CONFIG, seed=0), list[Tensor]()

    def begin(self, step: int, part: int) -> None:
        pass

    def reduce(self, step: int, part: int, gradients: PartGradients) -> None:
        self.found += gradients.dense

    def conclude(self, step: int) -> None:
        pass


def test_ignored_targets_do_not_count_and_parts_add_up_to_the_gradient_of_the_whole_batch() -> None:
    state = DenseState(CONFIG, None, seed=0, num_parts=PARTS, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    exchange, done = InProcess(), dict[int, PartDone]()
    AttentionWorker(state, exchange).run_step(1, range(PARTS), Source(), done.__setitem__)

    whole = Transformer(CONFIG, None, seed=0)
    out = whole(TOKENS[:, :-1], experts=LocalExperts(CONFIG, seed=0), memory=None)
    loss = cross_entropy_sum(whole, out.hidden_BTH, targets(), WEIGHTS)
    (loss / WEIGHTS.sum()).backward()
    gradient = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in whole.parameters()]
    )

    assert [done[part].weight for part in range(PARTS)] == [
        float(WEIGHTS[:2].sum()),
        float(WEIGHTS[2:].sum()),
    ]
    assert done[0].weight < done[1].weight / 2
    torch.testing.assert_close(sum(d.loss_sum for d in done.values()), float(loss), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sum(exchange.found), gradient, rtol=1e-4, atol=1e-6)


def with_parts(
    model: Transformer, batch: Batch, exchange: Exchange, fetched: Rows, *, step: int | None
) -> Loss:
    loss = next_token(model, batch, exchange, fetched, step=step)
    first = batch.tokens_BT[0, 0].float()
    return replace(loss, metrics={"second": torch.tensor(loss.weight), "first_token": first})


def test_further_losses_are_in_the_record_of_their_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "AttentionWorker", partial(AttentionWorker, objective=with_parts))
    config = tiny_run(corpus, steps=2, attention_workers=2)
    found = train(tmp_path / "run", config)
    data = TokenDataset(corpus, "train", verify=False)
    for record in found.records:
        parts = [
            token_batch(
                data, seed=0, step=record["step"], part=p, num_parts=4, sequences_per_part=2, seq_len=32
            )
            for p in range(4)
        ]
        first = math.fsum(float(part.tokens_BT[0, 0]) for part in parts) / 4
        assert record["losses"] == {"first_token": first, "second": 64.0}
