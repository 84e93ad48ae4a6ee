"""A run in which one slot plays all roles in slabs, as on a GPU, here in bf16 on a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
from local_cluster import Trained, tiny_run, train

from sparseray.platform.config import RunConfig

WHOLE = {"colocated": True, "device": "cpu"}


def whole_run(data: Path, *, steps: int = 6, dtype: str = "bfloat16", **train_keys: object) -> RunConfig:
    config = tiny_run(data, steps=steps, **WHOLE)
    return replace(config, train=replace(config.train, dtype=dtype, **train_keys))


def close(one: Trained, other: Trained, tolerance: float) -> None:
    for a, b in zip(one.curve, other.curve, strict=True):
        assert a[0] == pytest.approx(b[0], rel=tolerance)
        assert a[2] == pytest.approx(b[2], rel=20 * tolerance)


def test_bfloat16_follows_fp32_and_comes_again_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "fp32", tiny_run(corpus, steps=6, **WHOLE))
    runs = [train(tmp_path / name, whole_run(corpus)) for name in ("one", "two")]
    close(runs[0], plain, 5e-3)
    assert runs[0].curve == runs[1].curve and runs[0].digest == runs[1].digest
    assert runs[0].curve != plain.curve


def test_recomputed_layers_change_no_bit(corpus: Path, tmp_path: Path) -> None:
    kept, again = (train(tmp_path / str(r), whole_run(corpus, steps=3, recompute=r)) for r in (False, True))
    assert kept.curve == again.curve and kept.digest == again.digest
