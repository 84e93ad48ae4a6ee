"""Dense kernels against their plain reference, outputs and gradients, at odd sizes and in memory full of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from torch import Tensor

from sparseray.kernels.dense import reference
from sparseray.kernels.dense.embedding import embedding_grad_
from sparseray.kernels.dense.head_loss import head_loss, head_loss_gradients
from sparseray.kernels.dense.rms_norm import add_rms_norm, rms_norm
from sparseray.kernels.dense.rope import rope
from sparseray.kernels.dense.swiglu import swiglu
from sparseray.kernels.ops import REFERENCE
from sparseray.model.layers import rope_tables

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def memory_full_of_nan() -> Iterator[None]:
    """What `torch.empty` returns holds NaN, so that a value nobody wrote shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


def rand(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    found, wanted = found.detach(), wanted.detach()
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    assert float(error) <= tolerance, float(error)


def compare(
    fused: Callable[..., tuple[Tensor, ...]], plain: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> None:
    """Outputs and gradients of `fused`, run twice to the same bits, against `plain` in fp64."""
    tolerance = TOLERANCE[inputs[0].dtype]
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = plain(*exact)
    grads = [torch.randn_like(x) for x in wanted]
    torch.autograd.backward(wanted, grads)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outs = fused(*leaves)
        torch.autograd.backward(outs, [g.to(out.dtype) for g, out in zip(grads, outs)])
        runs.append([*outs, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    for found, want in zip(runs[0], [*wanted, *(x.grad for x in exact)]):
        assert found.dtype in (inputs[0].dtype, torch.float32)
        assert_close(found, want, tolerance)


def loss_inputs(R: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    targets = torch.randint(0, V, (R,))
    targets[::5] = -1
    return (
        rand(R, H, dtype=dtype),
        rand(V, H, dtype=dtype, scale=0.3),
        targets.to(DEVICE),
        torch.rand(R).to(DEVICE),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "H", "V"), [(13, 24, 61), (1, 16, 5), (9, 33, 8200)])
def test_head_loss_and_its_gradients_equal_the_reference(R: int, H: int, V: int, dtype: torch.dtype) -> None:
    hidden, weight, targets, weights = loss_inputs(R, H, V, dtype)
    targets[0] = V - 1

    def plain(h: Tensor, w: Tensor) -> tuple[Tensor]:
        return (reference.head_loss_reference(h, w, targets, weights.double()),)

    compare(lambda h, w: (head_loss(h, w, targets, weights),), plain, [hidden, weight])


@pytest.mark.parametrize("rows", [1, 4, 13])
def test_chunks_of_rows_change_the_loss_by_rounding_only(rows: int) -> None:
    hidden, weight, targets, weights = loss_inputs(13, 24, 61, torch.float32)
    grads = torch.empty_like(hidden), torch.empty_like(weight)
    loss = head_loss_gradients(
        hidden, weight, targets, weights, hidden_grad_RH=grads[0], weight_grad_VH=grads[1], rows=rows
    )
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    wanted = reference.head_loss_reference(hidden, weight, targets, weights)
    torch.testing.assert_close(loss, wanted.detach())
    for found, want in zip(grads, torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_of_the_head_is_added_to_a_slab(dtype: torch.dtype) -> None:
    hidden, weight, targets, weights = loss_inputs(11, 16, 40, dtype)
    slab = torch.zeros(40, 16, device=DEVICE)
    for part in (slice(0, 4), slice(4, 11)):
        leaf = hidden[part].clone().requires_grad_()
        head_loss(leaf, weight.requires_grad_(), targets[part], weights[part], weight_grad_VH=slab).backward()
        assert leaf.grad is not None
        assert weight.grad is None
    exact = weight.detach().double().requires_grad_()
    reference.head_loss_reference(hidden.double(), exact, targets, weights.double()).backward()
    assert exact.grad is not None
    assert_close(slab, exact.grad, TOLERANCE[dtype])


def test_head_loss_without_rows_to_count_and_without_gradients() -> None:
    hidden, weight, _, weights = loss_inputs(6, 16, 40, torch.float32)
    nothing = torch.full((6,), -1, dtype=torch.int64, device=DEVICE)
    loss = head_loss(hidden.requires_grad_(), weight.requires_grad_(), nothing, weights)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    slab = torch.ones(40, 16, device=DEVICE)
    with torch.no_grad():
        targets = nothing + 1
        loss = head_loss(hidden, weight, targets, weights, weight_grad_VH=slab)
    torch.testing.assert_close(loss, reference.head_loss_reference(hidden, weight, targets, weights).detach())
    assert bool((slab == 1.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 40), (3, 5, 64), (2500, 16), (2, 5000)])
def test_norms_equal_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype), rand(shape[-1], dtype=dtype)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return reference.rms_norm_reference(total, weight, 1e-6), total

    compare(
        lambda x, w: (rms_norm(x, w, 1e-6),),
        lambda x, w: (reference.rms_norm_reference(x, w, 1e-6),),
        [x, weight],
    )
    compare(lambda x, r, w: add_rms_norm(x, r, w, 1e-6), plain, [x, residual, weight])

    def of_three(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        normed, total = plain(x, residual, weight)
        return normed, normed, normed, total

    compare(lambda x, r, w: add_rms_norm(x, r, w, 1e-6, 3), of_three, [x, residual, weight])


def test_a_reader_of_the_norm_without_a_gradient_is_left_out() -> None:
    leaves = [rand(5, 24).requires_grad_(), rand(5, 24).requires_grad_(), rand(24).requires_grad_()]
    outs = add_rms_norm(*leaves, 1e-6, 3)
    assert len({out.data_ptr() for out in outs[:3]}) == 1
    found = torch.autograd.grad(outs[2].square().sum(), leaves)
    wanted = torch.autograd.grad(add_rms_norm(*leaves, 1e-6)[0].square().sum(), leaves)
    for one, other in zip(found, wanted):
        assert torch.equal(one, other)


def test_norm_with_one_of_its_outputs_unused_and_a_wider_residual() -> None:
    x, residual, weight = rand(5, 24).half(), rand(5, 24), rand(24)
    for chosen in (0, 1):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        exact = [t.double().requires_grad_() for t in (x, residual, weight)]
        out = add_rms_norm(*leaves, 1e-6)
        assert (out[0].dtype, out[1].dtype) == (torch.float16, torch.float32)
        out[chosen].float().square().sum().backward()
        total = exact[0] + exact[1]
        (
            reference.rms_norm_reference(total, exact[2], 1e-6) if chosen == 0 else total
        ).square().sum().backward()
        for leaf, want in zip(leaves, exact):
            assert (leaf.grad is None) == (want.grad is None)
            if leaf.grad is not None:
                assert leaf.grad.dtype == leaf.dtype
                assert_close(leaf.grad, want.grad, 2e-3)


def test_bits_of_a_normed_row_do_not_depend_on_the_number_of_rows() -> None:
    x, weight = rand(37, 48), rand(48)
    all_rows = rms_norm(x, weight, 1e-6)
    for count in (1, 5, 36):
        assert torch.equal(rms_norm(x[:count], weight, 1e-6), all_rows[:count])


def test_dense_kernels_take_no_rows() -> None:
    x, weight = rand(0, 16).requires_grad_(), rand(16).requires_grad_()
    swiglu(rms_norm(x, weight, 1e-6)).sum().backward()
    assert x.grad.shape == (0, 16)
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "D", "start", "C"),
    [((5, 2, 2), 16, 0, 8), ((3, 1, 3), 24, 16, 4), ((18, 0, 0), 12, 2, 3), ((1, 1, 1), 6, 0, 3)],
)
def test_rotary_encoding_equals_the_reference(
    heads: tuple[int, int, int], D: int, start: int, C: int, is_interleaved: bool, dtype: torch.dtype
) -> None:
    R, count = 11, heads[0] + heads[1]
    cos, sin = (t.to(DEVICE) for t in rope_tables(50, 2 * C, 10000.0))
    positions = torch.randint(0, 50, (R,), device=DEVICE)

    def plain(fused: Tensor) -> tuple[Tensor, ...]:
        turned = fused[:, :count]
        middle = turned[..., start : start + 2 * C]
        middle = reference.rope_reference(
            middle, cos[positions], sin[positions], is_interleaved=is_interleaved
        )
        turned = torch.cat([turned[..., :start], middle, turned[..., start + 2 * C :]], dim=-1)
        return turned[:, : heads[0]], turned[:, heads[0] :], fused[:, count:]

    options = {"heads": heads, "start": start, "is_interleaved": is_interleaved}
    compare(lambda x: rope(x, positions, cos, sin, **options), plain, [rand(R, sum(heads), D, dtype=dtype)])


def test_rotary_reference_in_halves_is_the_models() -> None:
    cos, sin = rope_tables(9, 8, 10000.0)
    x = torch.randn(9, 3, 8)
    assert torch.equal(
        reference.rope_reference(x, cos, sin, is_interleaved=False), REFERENCE.rotary(x, cos, sin)
    )
    mixed = x.view(9, 3, 2, 4).transpose(-1, -2).flatten(-2)
    turned = reference.rope_reference(mixed, cos, sin, is_interleaved=True)
    torch.testing.assert_close(
        turned.view(9, 3, 4, 2).transpose(-1, -2).flatten(-2), REFERENCE.rotary(x, cos, sin)
    )


def test_rotary_encoding_refuses_heads_that_do_not_fit() -> None:
    cos, sin = rope_tables(9, 8, 10000.0)
    with pytest.raises(ValueError, match=r"heads=\(2, 1, 1\)"):
        rope(torch.zeros(9, 3, 8), torch.arange(9), cos, sin, heads=(2, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 40), (3, 5, 6), (2, 2500)])
def test_swiglu_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(
        lambda x: (swiglu(x),),
        lambda x: (reference.swiglu_reference(x),),
        [rand(*shape, dtype=dtype, scale=4.0)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "V", "H", "hot"),
    [(1, 3, 5, 0), (64, 4, 16, 0), (300, 7, 70, 200), (257, 300, 16, 0), (200, 5, 16, 200), (129, 2, 8, 64)],
)
def test_embedding_gradient_equals_the_reference(
    R: int, V: int, H: int, hot: int, dtype: torch.dtype
) -> None:
    ids, grads = torch.randint(-1, V, (R,)), rand(R, H, dtype=dtype)
    ids[torch.randperm(R)[:hot]] = V // 2
    wanted = reference.embedding_grad_reference(ids, grads.double(), V)
    found = [embedding_grad_(torch.empty(V, H, device=DEVICE), ids.to(DEVICE), grads) for _ in range(2)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-5)
    # Each row is rounded once (in fp16: the interpreter cuts bf16 off).
    narrow = embedding_grad_(torch.empty(V, H, dtype=torch.float16, device=DEVICE), ids.to(DEVICE), grads)
    assert torch.equal(narrow, found[0].half())
    more = embedding_grad_(found[0].clone(), ids.to(DEVICE), grads, accumulate=True)
    torch.testing.assert_close(more.double(), 2 * wanted, rtol=1e-5, atol=1e-5)
