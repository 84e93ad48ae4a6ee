"""Loads a state from tensors, as a slot's holdings do."""

from collections.abc import Sequence

from torch import Tensor

from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.memory import MemoryShard
from sparseray.actors.state.pieces import Key


def load_keys(
    state: ExpertShard | MemoryShard,
    keys: Sequence[Key],
    tensors: dict[str, Tensor],
    step: int,
    *,
    with_optimizer: bool = True,
) -> None:
    for name, own in state.begin_load(keys, step, with_optimizer=with_optimizer).items():
        own.copy_(tensors[name])
    state.end_load()


def load_dense(state: DenseState, tensors: dict[str, Tensor], step: int) -> None:
    for name, own in state.begin_load(step).items():
        own.copy_(tensors[name])
    state.end_load()
