"""The stateless data order: batches are a pure function of seed, step and logical shard."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseray.actors.training.token_data import TokenDataset, batch, window_at
from sparseray.errors import DataError
from sparseray.jobs.tokens.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    (folder / "text").mkdir()
    rng = random.Random(11)
    for index in range(40):
        words = rng.choices(["token", "shard", "expert", "row", "step"], k=rng.randrange(20, 200))
        (folder / "text" / f"{index}.txt").write_text(f"{index} {' '.join(words)}\n")
    prepare([str(folder / "text")], folder / "data", vocab_size=280, validation_fraction=0.2)
    return folder / "data"


@pytest.mark.parametrize("num_windows", [1, 2, 3, 5, 64, 65, 1000])
def test_each_epoch_visits_every_window_once_in_another_order(num_windows: int) -> None:
    epochs = [
        [window_at(epoch * num_windows + position, num_windows, seed=4) for position in range(num_windows)]
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(num_windows)) for epoch in epochs)
    if num_windows >= 64:
        other = [window_at(position, num_windows, seed=5) for position in range(num_windows)]
        assert len({*map(tuple, epochs), tuple(other), tuple(range(num_windows))}) == 5


def test_data_order_is_the_same_in_every_release() -> None:
    assert [window_at(position, 1000, seed=0) for position in (0, 1, 999, 1000, 123456)] == [
        599,
        469,
        208,
        245,
        440,
    ]


def test_global_batch_does_not_depend_on_how_many_callers_make_it(prepared: Path) -> None:
    dataset = TokenDataset(prepared)

    def global_batch(step: int, num_parts: int, order: list[int]) -> torch.Tensor:
        parts = {
            part: batch(
                dataset,
                seed=1,
                step=step,
                part=part,
                num_parts=num_parts,
                sequences_per_part=8 // num_parts,
                seq_len=33,
            )
            for part in order
        }
        return torch.cat([parts[part].tokens_BT for part in sorted(parts)])

    for step in (0, 7, 1000):
        whole = global_batch(step, 1, [0])
        assert torch.equal(whole, global_batch(step, 8, [3, 1, 7, 0, 6, 2, 5, 4]))
        assert torch.equal(whole, global_batch(step, 2, [1, 0]))
    assert not torch.equal(global_batch(0, 1, [0]), global_batch(1, 1, [0]))


def test_steps_of_an_epoch_cover_every_window_once(prepared: Path) -> None:
    dataset = TokenDataset(prepared, "validation")
    seq_len = 16
    windows = dataset.num_windows(seq_len)
    rows = [
        batch(dataset, seed=2, step=step, part=part, num_parts=2, sequences_per_part=1, seq_len=seq_len)
        for step in range(windows)
        for part in range(2)
    ]
    expected = sorted(dataset.sequence(index, seq_len)[0][:-1].tolist() for index in range(windows))
    for epoch in range(2):
        assert (
            sorted(row.tokens_BT[0].tolist() for row in rows[epoch * windows : (epoch + 1) * windows])
            == expected
        )


def test_targets_are_the_next_tokens_and_starts_mark_documents_only(prepared: Path) -> None:
    dataset = TokenDataset(prepared)
    seq_len = 50
    for index in (0, 1, dataset.num_windows(seq_len) - 1):
        tokens, starts = dataset.sequence(index, seq_len)
        assert tokens.shape == (seq_len + 1,)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, dataset.tokens[index * seq_len : (index + 1) * seq_len + 1])
        first = index * seq_len
        before = [dataset.tokens[first + t - 1] if first + t else dataset.eos_id for t in range(seq_len)]
        np.testing.assert_array_equal(starts, np.array(before) == dataset.eos_id)
    made = batch(dataset, seed=0, step=5, part=0, num_parts=1, sequences_per_part=3, seq_len=seq_len)
    assert made.tokens_BT.shape == made.targets_BT.shape == made.document_starts_BT.shape == (3, seq_len)
    assert (made.tokens_BT.dtype, made.targets_BT.dtype) == (torch.int64, torch.int64)
    assert made.document_starts_BT.dtype == torch.bool
    assert torch.equal(made.tokens_BT[:, 1:], made.targets_BT[:, :-1])


def test_windows_that_do_not_fit_are_refused(prepared: Path) -> None:
    dataset = TokenDataset(prepared, "validation")
    assert dataset.num_windows(dataset.num_tokens - 1) == 1
    with pytest.raises(DataError, match="too few for seq_len"):
        dataset.num_windows(dataset.num_tokens)
    with pytest.raises(IndexError):
        dataset.sequence(dataset.num_windows(16), 16)
    with pytest.raises(DataError, match="out of range"):
        batch(dataset, seed=0, step=0, part=2, num_parts=2, sequences_per_part=1, seq_len=16)
