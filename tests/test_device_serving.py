"""What is said before a GPU is used: of the kernels' compiler, of an engine's memory, of what `auto` stands for; cures work."""

import logging
import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_device import GOOD, H100, NONE, _built_for_cuda, change, config, cured

from sparseray.errors import ConfigError
from sparseray.platform.config import RunConfig
from sparseray.platform.device import describe_serving, resolve_device, resolve_serving_device
from sparseray.platform.gpu import Driver
from sparseray.platform.planning.device_memory import GIB, serving_memory

assert _built_for_cuda


def served(**keys: Any) -> RunConfig:
    return change(config(), cluster__device="cuda", **keys)


def of(gib: float) -> Driver:
    return replace(GOOD, gpus=(replace(H100, num_bytes=int(gib * GIB)),))


@pytest.mark.parametrize("version", [None, "3.5.1", "2.9.0+git1234"])
@pytest.mark.parametrize("resolve", [resolve_device, resolve_serving_device])
def test_triton_that_is_missing_or_too_old_is_told_of(
    monkeypatch: pytest.MonkeyPatch, version: str | None, resolve: Any
) -> None:
    triton = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", triton)
    said = "Triton, which is not installed" if version is None else f"Triton {version} is here"
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        resolve(served(), GOOD)
    assert "pip install 'triton>=3.6,<3.8'" in str(refused.value)
    assert resolve(change(served(), cluster__device="cpu"), GOOD).cluster.device == "cpu"
    if resolve is resolve_device:
        assert str(refused.value).endswith("or kernels=reference")
        assert resolve(served(kernels="reference"), GOOD).cluster.device == "cuda"
    else:
        assert "kernels=" not in str(refused.value), "a server has no such option"


def test_a_server_is_told_of_an_old_gpu_without_a_cure_that_it_does_not_take() -> None:
    old = Driver(cuda=(13, 0), gpus=(replace(H100, name="NVIDIA A100", capability=(8, 0)),))
    with pytest.raises(ConfigError, match=r"NVIDIA A100 has compute capability 8\.0") as refused:
        resolve_serving_device(served(), old)
    assert str(refused.value).endswith("set cluster.device=cpu")
    assert resolve_serving_device(cured(served(), str(refused.value)), old).cluster.device == "cpu"
    # What the run was trained with says nothing of the server, which has no other way on a GPU.
    assert resolve_serving_device(served(kernels="reference"), GOOD).kernels == "auto"


def test_an_engine_is_estimated_by_weights_and_pages() -> None:
    need = serving_memory(served())
    assert need.weights == pytest.approx(6 * 1.25e9, rel=0.02)
    # Keys and values of 16 heads of 64 in bf16, in 12 layers; a page of nobody beside 4,096 tokens.
    of_token = 12 * 2 * 16 * 64 * 2
    assert need.least == (4096 + 256) * of_token and need.caches == (16 * 4096 + 256) * of_token
    assert serving_memory(served(serve__max_batch=1)).caches == need.least
    assert serving_memory(served(serve__max_model_len=256)).least == 512 * of_token
    assert serving_memory(served(serve__cache_gib=1.0)).caches == GIB
    exact = serving_memory(served(serve__dtype="float32"))
    assert exact.least == 2 * need.least and exact.weights == need.weights * 4 // 6
    halves = serving_memory(served(cluster__expert_shards=2, cluster__attention_workers=2))
    assert 0.5 < halves.weights / need.weights < 0.6
    assert "caches of the longest request 0.20" in describe_serving(need)


@pytest.mark.parametrize(
    ("keys", "gib", "cure"),
    [
        ({"serve__cache_gib": 10.0}, 16.0, "serve.cache_gib="),
        ({"serve__max_batch": 65536}, 16.0, "serve.max_batch="),
        ({"model__max_seq_len": 1 << 20}, 16.0, "serve.max_model_len="),
        ({}, 4.0, "cluster.device=cpu"),
    ],
    ids=str,
)
def test_an_engine_that_does_not_fit_is_refused_and_the_cure_works(
    keys: dict[str, Any], gib: float, cure: str
) -> None:
    wrong = served(**keys)
    with pytest.raises(ConfigError, match=rf"an engine takes about .* has {gib} GiB") as refused:
        resolve_serving_device(wrong, of(gib))
    assert f"set {cure}" in str(refused.value)
    resolve_serving_device(cured(wrong, str(refused.value)), of(gib))


def nsa(**keys: Any) -> RunConfig:
    """A model with NSA, and with other sizes than those of the configuration."""
    model = replace(config().model, attention=("nsa",), num_kv_heads=1)
    sizes = {name: keys.pop(name) for name in ("select_block", "num_selected") if name in keys}
    return change(served(), model=replace(model, **{"nsa": replace(model.nsa, **sizes), **keys}))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (nsa(head_dim=256), "native sparse attention takes heads of at most 192 channels, not 256"),
        (nsa(head_dim=160), "values of at most 128 channels beside heads of 160"),
        (nsa(num_heads=96, head_dim=64), "at most 64 query heads for a key/value head, not 96"),
        (nsa(head_dim=128, select_block=256), "selection blocks of at most 128 tokens with heads of 128"),
        (change(served(), model=replace(config().model, head_dim=320)), "full attention takes heads of at most 256"),
    ],
    ids=["channels", "values", "group", "block", "full"],
)  # fmt: skip
@pytest.mark.parametrize("resolve", [resolve_device, resolve_serving_device])
def test_sizes_that_the_kernels_do_not_take_are_refused_and_the_cure_works(
    wrong: RunConfig, said: str, resolve: Any
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        resolve(wrong, of(1000.0))
    mended = wrong
    for name, text in re.findall(r"model\.([\w.]+)=(\d+)", str(refused.value)):
        inner, _, key = name.rpartition(".")
        model, value = mended.model, int(text)
        section: Any = replace(getattr(model, inner), **{key: value}) if inner else value
        mended = change(mended, model=replace(model, **{inner or key: section}))
    assert mended != wrong
    resolve(mended, of(1000.0))
    assert resolve(change(wrong, cluster__device="cpu"), NONE).cluster.device == "cpu"


def test_heads_whose_gradients_would_have_no_order_are_refused_where_one_is_wanted() -> None:
    wide = change(served(), model=replace(config().model, head_dim=256), determinism="bitwise")
    with pytest.raises(ConfigError, match=r"at most 192 channels.* not 256, with determinism=bitwise"):
        resolve_device(wide, of(1000.0))
    resolve_device(change(wide, determinism="fast"), of(1000.0))
    resolve_serving_device(wide, of(1000.0))


@pytest.mark.parametrize(
    "keys", [{"head_dim": 80}, {"head_dim": 192, "v_head_dim": 128}, {"select_block": 128}], ids=str
)
def test_odd_sizes_that_the_kernels_take_are_let_through(keys: dict[str, Any]) -> None:
    assert resolve_device(nsa(**keys), of(1000.0)).cluster.device == "cuda"


def test_what_auto_stands_for_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    logger = logging.getLogger("sparseray.platform.device")
    logger.addHandler(handler)
    try:
        auto = change(config(), cluster__device="auto")
        for driver in (GOOD, NONE):
            resolve_device(auto, driver)
        spread = change(auto, cluster__colocated=False, train__dtype="float32", optim__moments="float32")
        resolve_device(spread, GOOD)
    finally:
        logger.removeHandler(handler)
    assert said == [
        "cluster.device: auto is cuda here",
        "cluster.device: auto is cpu here (1 GPUs of compute capability 9.0 or more are needed, and the driver shows 0)",
        "cluster.device: auto is cpu here (roles are in slots of their own: cluster.colocated=false)",
    ]
