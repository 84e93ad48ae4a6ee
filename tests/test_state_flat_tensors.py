"""Tensors in flat slabs: where they lie, and gradients that come one by one brought together."""

import math

import torch

from sparseray.actors.state.flat_tensors import ALIGNMENT, LARGE, FlatTensors

SHAPES = [torch.Size(s) for s in ((3, 5), (7,), (LARGE,), (ALIGNMENT, 2), (), (130,))]
KINDS = ["matrix", "vector", "vector", "matrix", "vector", "vector"]


def test_every_tensor_has_its_own_place_and_those_of_a_kind_lie_together() -> None:
    flat = FlatTensors(SHAPES, KINDS)
    assert [run.members for run in flat.runs] == [(0, 3), (1, 4, 5), (2,)]
    assert [run.start for run in flat.runs] == [0, *(run.end for run in flat.runs[:-1])]
    slab = flat.slab(torch.float32, torch.device("cpu"))
    views = flat.views(slab)
    for number, (view, shape, start) in enumerate(zip(views, SHAPES, flat.starts)):
        assert view.shape == shape
        assert start % ALIGNMENT == 0
        view.fill_(number + 1)
    for number, (view, kind) in enumerate(zip(views, KINDS)):
        assert bool((view == number + 1).all())
        run = next(run for run in flat.runs if number in run.members)
        assert {KINDS[i] for i in run.members} == {kind}
        assert run.start <= flat.starts[number] < run.end


def test_gradients_are_brought_to_their_tensors_places() -> None:
    flat = FlatTensors(SHAPES, KINDS)
    gradients = [torch.full(shape, number + 1.0).bfloat16() for number, shape in enumerate(SHAPES)]
    slab = torch.full((flat.num_elements,), math.nan, dtype=torch.bfloat16)
    for run in flat.runs:
        run.of(slab)[: flat.gather(run, gradients).numel()] = flat.gather(run, gradients).reshape(-1)
    assert flat.gather(flat.runs[2], gradients) is gradients[2]
    for view, gradient in zip(flat.views(slab), gradients):
        assert torch.equal(view, gradient)
