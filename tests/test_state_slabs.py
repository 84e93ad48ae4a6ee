"""Slabs of one slot that has everything: the same names, updates and checkpoints as the states they stand for."""

import math
import random

import pytest
import torch
from loads import load_dense
from local_cluster import MODEL

from sparseray.actors.exchange.on_device import exact_sum
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.gradient_sum import GradientSum
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.kernels.ops import REFERENCE
from sparseray.model.config import DSEConfig

CONFIG = MODEL.__class__(**{**vars(MODEL), "dse": DSEConfig()})
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CPU = torch.device("cpu")


def dense_slabs(dtype: torch.dtype = torch.float32, moments: torch.dtype = torch.float32) -> DenseSlabs:
    return DenseSlabs(
        CONFIG,
        None,
        seed=3,
        num_parts=1,
        ops=REFERENCE,
        device=CPU,
        dtype=dtype,
        moments=moments,
        determinism="bitwise",
        **ADAM,
    )


def whole_experts(dtype: torch.dtype | None = None, moments: torch.dtype = torch.float32) -> SlabExperts:
    found = SlabExperts(
        CONFIG,
        seed=3,
        num_parts=1,
        ops=REFERENCE,
        device=CPU,
        compute_dtype=dtype,
        moments=moments,
        determinism="bitwise",
        **ADAM,
    )
    found.initialize(EVERY)
    found.assign(EVERY, EVERY)
    return found


EVERY = [(layer, e) for layer in range(len(CONFIG.moe_layers)) for e in range(CONFIG.moe.num_experts)]
COUNTS = torch.ones(len(CONFIG.moe_layers), CONFIG.moe.num_experts, dtype=torch.int64)


def test_dense_slabs_are_updated_as_dense_state_is() -> None:
    slabs, plain = dense_slabs(), DenseState(CONFIG, None, seed=3, num_parts=1, **ADAM)
    assert slabs.tensor_names() == plain.tensor_names()
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in plain.parameters]
        for p, g in zip(slabs.parameters, gradients):
            p.grad = g.clone()
        slabs.sum.add(0, slabs.take_gradients())
        slabs.apply(lr=1e-2, scale=0.5, counts_LE=COUNTS)
        plain.reduced = torch.cat([g.reshape(-1) for g in gradients])
        plain.apply(lr=1e-2, scale=0.5, counts_LE=COUNTS)
    ours, theirs = slabs.tensors(), plain.tensors()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_whole_experts_are_updated_as_a_shard_is() -> None:
    whole, shard = whole_experts(), ExpertShard(CONFIG, seed=3, num_parts=1, **ADAM)
    shard.initialize(EVERY)
    shard.assign(EVERY, EVERY)
    for _ in range(3):
        gradients = [
            torch.randn_like(leaf) for layer in range(len(whole.slabs)) for leaf in whole.weights(layer)
        ]
        leaves = [leaf for layer in range(len(whole.slabs)) for leaf in whole.weights(layer)]
        for leaf, gradient in zip(leaves, gradients):
            leaf.grad = gradient.clone()
        whole.sum.add(0, whole.take_gradients())
        assert whole.is_reduced
        whole.apply(lr=1e-2, scale=0.5)
        for layer, expert in EVERY:
            pair = gradients[2 * layer][expert], gradients[2 * layer + 1][expert]
            shard.reduced[(layer, expert)] = torch.cat([g.reshape(-1) for g in pair])
        shard.apply(lr=1e-2, scale=0.5)
    theirs = shard.tensors(EVERY)
    for name, value in whole.tensors(EVERY).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_bfloat16_copies_follow_their_masters_and_routers_stay_fp32() -> None:
    slabs, whole = dense_slabs(torch.bfloat16, torch.bfloat16), whole_experts(torch.bfloat16, torch.bfloat16)
    for p in slabs.parameters:
        p.grad = torch.randn_like(p)
    slabs.sum.add(0, slabs.take_gradients())
    slabs.apply(lr=1e-2, scale=1.0, counts_LE=COUNTS)
    for name, parameter, master in zip(slabs.names, slabs.parameters, slabs.masters):
        assert parameter.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
        assert torch.equal(parameter, master.to(parameter.dtype)), name
    for layer, slab in enumerate(whole.slabs):
        for leaf in whole.weights(layer):
            leaf.grad = torch.randn_like(leaf)
        assert slab.moments()[0][0].dtype == torch.bfloat16
    whole.sum.add(0, whole.take_gradients())
    whole.apply(lr=1e-2, scale=1.0)
    for layer, slab in enumerate(whole.slabs):
        for leaf, master in zip(whole.weights(layer), slab.weights):
            assert torch.equal(leaf, master.bfloat16())


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_state_goes_over_both_ways(moments: torch.dtype) -> None:
    slabs, plain = dense_slabs(torch.bfloat16, moments), DenseState(CONFIG, None, seed=4, num_parts=1, **ADAM)
    for p in slabs.parameters:
        p.grad = torch.randn_like(p)
    slabs.sum.add(0, slabs.take_gradients())
    slabs.apply(lr=1e-2, scale=1.0, counts_LE=COUNTS)
    load_dense(plain, slabs.tensors(), 1)
    back = dense_slabs(torch.bfloat16, moments)
    load_dense(back, plain.tensors(), 1)
    for name, value in slabs.tensors().items():
        assert torch.equal(back.tensors()[name], value), name
    for one, other in zip(back.parameters, slabs.parameters):
        assert torch.equal(one, other)
    plain.reduced = torch.ones(sum(p.numel() for p in plain.parameters))
    plain.apply(lr=1e-2, scale=1.0, counts_LE=COUNTS)


def test_the_order_of_a_sum() -> None:
    leaves = [torch.randn(50).bfloat16() for _ in range(5)]
    wide = [leaf.float() for leaf in leaves]
    tree = ((wide[0] + wide[1]) + (wide[2] + wide[3])) + wide[4]
    running = (((wide[0] + wide[1]) + wide[2]) + wide[3]) + wide[4]
    for determinism, expected in (("bitwise", tree), ("fast", running)):
        total = GradientSum(5, determinism)
        for part, leaf in enumerate(leaves):
            assert total.total is None
            total.add(part, [leaf.clone()])
        assert total.total is not None and torch.equal(total.total[0], expected), determinism


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("determinism", ["bitwise", "fast"])
def test_what_is_lent_to_a_sum_may_change_with_the_next_part(determinism: str, dtype: torch.dtype) -> None:
    for count in range(1, 8):
        leaves = [torch.randn(50).to(dtype) for _ in range(count)]
        orders = [range(count)] if determinism == "fast" else [range(count), reversed(range(count))]
        for order in map(list, orders):
            given, lent = GradientSum(count, determinism), GradientSum(count, determinism)
            place = torch.empty(50, dtype=dtype)
            for part in order:
                given.add(part, [leaves[part].clone()])
                place.copy_(leaves[part])
                lent.add(part, [place], lent=True)
                if count > 1:
                    place.fill_(torch.nan)
            assert given.total is not None and lent.total is not None
            assert torch.equal(lent.total[0].float(), given.total[0].float()), (count, order)


def test_norms_that_travel_as_a_few_numbers_are_rounded_once() -> None:
    generator = random.Random(5)
    for _ in range(50):
        values = [generator.random() * 2.0 ** generator.randint(-150, 120) for _ in range(900)]
        cut = generator.randint(0, 900)
        few = [exact_sum(values[:cut]), exact_sum(values[cut:])]
        assert sum(map(len, few)) < 20
        assert math.fsum(few[0] + few[1]) == math.fsum(values)
    assert exact_sum([]) == [] and exact_sum([1.0, math.inf]) == [math.inf]
    assert math.isnan(exact_sum([1.0, math.inf, math.nan])[0])
