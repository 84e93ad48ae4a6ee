"""Several slots that compute in slabs, by collectives of a group: as on GPUs of several hosts, here by gloo on a CPU."""

from pathlib import Path
from typing import Any

import pytest
from local_cluster import Trained, train
from test_across_slots import check, slabs_run

from sparseray.platform.config import RunConfig


def by_collectives(data: Path, **cluster: Any) -> RunConfig:
    return slabs_run(data, **{"exchange": "collective", **cluster})


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One slot that has everything, undisturbed."""
    return train(tmp_path_factory.mktemp("one") / "run", slabs_run(corpus))


@pytest.mark.parametrize(("slots", "replication"), [(2, 1), (3, 2)])
def test_the_number_of_slots_changes_no_bit(
    slots: int, replication: int, corpus: Path, one: Trained, tmp_path: Path
) -> None:
    check(train(tmp_path / "run", by_collectives(corpus, slots=slots, replication=replication)), one)
