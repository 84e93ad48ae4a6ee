"""Expert slabs: rows come and go without a bit changing, and memory is given back."""

from dataclasses import replace

import pytest
import torch
from loads import load_keys
from torch import Tensor

from sparseray.actors.state.adamw import AdamW
from sparseray.actors.state.experts import ExpertShard
from sparseray.model.config import ModelConfig, MoEConfig
from sparseray.model.presets import preset

KEYS = [(layer, expert) for layer in range(2) for expert in (5, 0, 3)]
UPDATE = {"lr": 0.01, "scale": 0.5}


def odd_model() -> ModelConfig:
    """Sizes that leave a rest after every vector register."""
    tiny = preset("tiny")
    moe = MoEConfig(num_experts=8, top_k=2, expert_dim=7, leading_dense=tiny.num_layers - 2)
    return replace(tiny, hidden=36, moe=moe)


def shard_of(model: ModelConfig, **more: object) -> ExpertShard:
    optim = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return ExpertShard(model, seed=3, num_parts=1, **(optim | more))  # type: ignore[arg-type]


def gradient_of(shard: ExpertShard, key: tuple[int, int], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * key[0] + key[1])
    return torch.randn(shard.size, generator=generator)


def update(shard: ExpertShard, step: int) -> None:
    for key in shard.owned:
        shard.reduced[key] = gradient_of(shard, key, step)
    assert shard.is_reduced
    shard.apply(**UPDATE)


def alone(model: ModelConfig, key: tuple[int, int], steps: int) -> dict[str, Tensor]:
    """One expert's tensors after some updates, each matrix a tensor of its own."""
    source = shard_of(model)
    source.initialize([key])
    names = source.names(key)
    matrices = [tensor.clone() for tensor in source.tensors([key], with_optimizer=False).values()]
    adamw = AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, steps + 1):
        row = gradient_of(source, key, step) * UPDATE["scale"]
        parts = torch.split(row, [m.numel() for m in matrices])
        adamw.step(matrices, [p.view_as(m) for p, m in zip(parts, matrices)], lr=UPDATE["lr"])
    return dict(zip(names, matrices)) | adamw.tensors(names, matrices)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_an_update_of_slabs_has_the_bits_of_one_tensor_after_the_other() -> None:
    model = odd_model()
    shard = shard_of(model)
    shard.initialize(KEYS)
    shard.assign(KEYS, KEYS)
    for step in (1, 2, 3):
        update(shard, step)
    for key in KEYS:
        assert_equal(shard.tensors([key]), alone(model, key, 3))


def test_experts_that_move_take_their_bits_along_whatever_lies_beside_them() -> None:
    model = odd_model()
    old, new = shard_of(model), shard_of(model)
    old.initialize(KEYS)
    old.assign(KEYS, KEYS)
    update(old, 1)
    stay, leave = KEYS[::2], KEYS[1::2]
    load_keys(new, leave, old.tensors(leave), 1)
    new.assign(leave, leave)
    old.assign(stay, stay)
    assert set(old.held) == set(KEYS), "a peer can still copy what is no longer assigned"
    for shard in (old, new):
        update(shard, 2)
    assert (set(old.held), set(new.held)) == (set(stay), set(leave))
    load_keys(old, leave[:1], new.tensors(leave[:1]), 2)
    old.assign([*leave[:1], *stay], stay)
    update(old, 3)
    for key in [*leave[:1], *stay]:
        assert_equal(old.tensors([key]), alone(model, key, 3))


def test_logical_tensors_are_views_of_two_contiguous_slabs() -> None:
    shard = shard_of(odd_model())
    shard.initialize(KEYS)
    gate_up, down = shard.slabs[0].weights
    assert gate_up.shape == (3, 14, 36) and down.shape == (3, 36, 7)
    assert gate_up.is_contiguous() and down.is_contiguous()
    for tensor in shard.tensors(KEYS[:3], with_optimizer=False).values():
        assert tensor.untyped_storage().data_ptr() in {
            s.untyped_storage().data_ptr() for s in (gate_up, down)
        }


def test_trim_gives_the_memory_of_experts_back() -> None:
    shard = shard_of(odd_model())
    shard.initialize(KEYS)
    shard.assign(KEYS, KEYS)
    update(shard, 1)
    full = shard.num_bytes
    assert full == 3 * 4 * shard.size * len(KEYS)
    shard.assign(KEYS[:2], KEYS[:2])
    shard.trim()
    assert shard.num_bytes == full // 3
    shard.assign([], [])
    shard.trim()
    assert shard.num_bytes == 0


def test_replicas_of_different_steps_are_not_mixed() -> None:
    shard = shard_of(odd_model())
    shard.initialize(KEYS[:1])
    with pytest.raises(AssertionError, match="different steps"):
        shard.begin_load(KEYS[1:2], 4)


def test_the_compute_copy_follows_every_change_of_the_masters() -> None:
    model = odd_model()
    shard = shard_of(model, compute_dtype=torch.bfloat16)

    def check() -> None:
        for slab in shard.slabs:
            for copy, master in zip(slab.compute, slab.weights):
                assert copy.dtype == torch.bfloat16 and torch.equal(copy, master.bfloat16())

    shard.initialize(KEYS[:4])
    check()
    shard.assign(KEYS[:4], KEYS[:4])
    update(shard, 1)
    check()
    other = shard_of(model)
    other.initialize(KEYS)
    other.assign(KEYS, KEYS)
    update(other, 1)
    load_keys(shard, KEYS[4:], other.tensors(KEYS[4:]), 1)
    check()
    assert shard_of(model).slabs[0].compute is not None


def test_computing_in_bfloat16_is_close_and_gives_fp32_gradients() -> None:
    model = preset("tiny")
    generator = torch.Generator().manual_seed(0)
    x, dout = (torch.randn(6, model.hidden, generator=generator) for _ in range(2))
    rows, weights = torch.arange(6), torch.full((6,), 0.5)
    found = []
    for dtype in (None, torch.bfloat16):
        shard = shard_of(model, compute_dtype=dtype)
        shard.initialize([(0, 0), (0, 1)])
        shard.assign([(0, 0), (0, 1)], [(0, 0), (0, 1)])
        y = shard.forward(0, 0, x, rows, [0, 1], [4, 2], True)
        dx = shard.backward(0, 0, dout, weights)
        assert shard.finish_part(0)
        found.append([y, dx, shard.pack(shard.owned)])
    for exact, rounded in zip(*found):
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_slabs_on_a_gpu_train_as_on_the_cpu() -> None:
    model, keys = preset("tiny"), [(0, 0), (0, 1)]
    generator = torch.Generator().manual_seed(0)
    x, dout = (torch.randn(6, model.hidden, generator=generator) for _ in range(2))
    found = []
    for device in ("cpu", "cuda"):
        shard = shard_of(model, device=device)
        shard.initialize(keys)
        shard.assign(keys, keys)
        outputs = []
        for _ in range(3):
            rows, weights = torch.arange(6, device=device), torch.full((6,), 0.5, device=device)
            outputs.append(shard.forward(0, 0, x.to(device), rows, [0, 1], [4, 2], True))
            outputs.append(shard.backward(0, 0, dout.to(device), weights))
            assert shard.finish_part(0) and shard.digests(keys)
            shard.unpack(keys, shard.pack(keys))
            shard.apply(**UPDATE)
        assert {tensor.device.type for tensor in shard.tensors(keys).values()} == {device}
        found.append(outputs)
    for ours, theirs in zip(*found):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-3, atol=1e-4)
