"""The whole slot's step through the kernels: on a GPU where there is one, else in Triton's interpreter."""

import triton_interpreter  # noqa: F401  isort: skip

from dataclasses import replace
from pathlib import Path

import torch
from local_cluster import train
from test_whole_slot import close, whole_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_kernels_train_as_the_reference_does(corpus: Path, tmp_path: Path) -> None:
    config = whole_run(corpus, steps=2, logical_shards=2, sequences_per_shard=1)
    reference = train(tmp_path / "reference", replace(config, kernels="reference"))
    config = replace(config, kernels="triton", cluster=replace(config.cluster, device=DEVICE))
    close(train(tmp_path / "triton", config), reference, 5e-3)
