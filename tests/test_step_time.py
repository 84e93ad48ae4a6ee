"""The predicted time of a step on GPUs, beside what was measured, and the placement that it would choose."""

from dataclasses import replace
from pathlib import Path

import pytest

from sparseray.platform.config import RunConfig, load_yaml
from sparseray.platform.planning.step_time import Placement, placements, step_seconds

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def config(name: str, parts: int) -> RunConfig:
    found = load_yaml(CONFIGS / f"{name}.yaml")
    return replace(found, train=replace(found.train, logical_shards=parts))


def test_one_gpu_takes_what_was_measured() -> None:
    one = Placement(attention=1, experts=1, shared=True)
    assert step_seconds(config("1b_full", 1), one) == pytest.approx(0.1396, rel=0.1)


@pytest.mark.parametrize("name", ["1b_full", "moonlight_6"])
def test_shared_roles_are_the_fastest_and_more_gpus_take_longer_for_more_tokens(name: str) -> None:
    times = []
    for gpus in (1, 2, 4):
        found = {str(each): step_seconds(config(name, gpus), each) for each in placements(gpus, gpus)}
        assert min(found, key=lambda each: found[each]) == f"{gpus} shared"
        times.append(found[f"{gpus} shared"])
    assert times[0] < times[1] < times[2] < 1.5 * times[0]


def test_attention_slots_are_no_more_than_parts() -> None:
    assert [str(each) for each in placements(4, 2)] == ["4 shared", "1 + 3", "2 + 2"]


def test_rows_of_one_slots_order_take_longer_than_their_sums() -> None:
    shared = Placement(attention=4, experts=4, shared=True)
    fast = config("1b_full", 4)
    assert step_seconds(replace(fast, determinism="bitwise"), shared) > step_seconds(fast, shared)
