"""What is said before a run starts that its GPU, its driver or its settings cannot carry; cures work as written."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseray.errors import ConfigError
from sparseray.model.config import MLAConfig
from sparseray.platform.config import RunConfig, load_yaml
from sparseray.platform.device import describe, is_whole, resolve_device, resolve_serving_device
from sparseray.platform.gpu import Driver, Gpu
from sparseray.platform.planning.device_memory import device_memory

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), num_bytes=80 << 30)
GOOD = Driver(cuda=(13, 0), gpus=(H100,))
NONE = Driver(cuda=(0, 0), gpus=())


@pytest.fixture(autouse=True)
def _built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def config(**keys: Any) -> RunConfig:
    return change(load_yaml(CONFIGS / "1b_full.yaml"), **keys)


def change(config: RunConfig, **keys: Any) -> RunConfig:
    """Set keys such as train__dtype."""
    for name, value in keys.items():
        section, _, key = name.partition("__")
        inner = replace(getattr(config, section), **{key: value}) if key else value
        config = replace(config, **{section: inner})
    return config


def cured(config: RunConfig, message: str) -> RunConfig:
    """Do what the message says, for the first cure that it names."""
    cure = message.rpartition("; ")[2].split(", or ")[0]
    for name, text in re.findall(r"([\w.]+)=([\w.]+)", cure):
        section, _, key = name.partition(".")
        number = (int(text) if text.isdigit() else float(text)) if text[0].isdigit() else text
        value: Any = {"true": True, "false": False}.get(text, number)
        config = change(config, **{f"{section}__{key}" if key else section: value})
    return config


@pytest.mark.parametrize(
    ("keys", "driver", "said"),
    [
        ({}, NONE, "no NVIDIA driver"),
        ({}, Driver(cuda=(13, 0), gpus=()), "no GPU to this process"),
        ({}, Driver(cuda=(13, 0), gpus=(replace(H100, capability=(8, 0)),)), "compute capability 8.0"),
        ({"train__logical_shards": 2, "cluster__attention_workers": 2}, GOOD, "2 slots and 0 on standby take a GPU each"),
        ({"cluster__expert_shards": 2}, GOOD, "this machine shows 1"),
        ({"cluster__expert_shards": 3, "cluster__standby": 1}, replace(GOOD, gpus=(H100, H100)), "this machine shows 2"),
        ({"cluster__standby": 1}, GOOD, "1 slots and 1 on standby"),
        ({"cluster__colocated": False}, GOOD, "this machine shows 1"),
        ({"train__sequences_per_shard": 64}, GOOD, "takes about"),
        ({"train__sequences_per_shard": 1}, replace(GOOD, gpus=(replace(H100, num_bytes=16 << 30),)), "takes about"),
        ({"cluster__device": "cpu", "train__dtype": "float32"}, NONE, "optim.moments=bfloat16"),
        (
            {"cluster__device": "cpu", "train__dtype": "float32", "optim__moments": "float32", "train__recompute": True},
            NONE,
            "train.recompute=true",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_the_cure_works(
    keys: dict[str, Any], driver: Driver, said: str
) -> None:
    wrong = config(**keys)
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        resolve_device(wrong, driver)
    resolve_device(cured(wrong, str(refused.value)), driver)


def test_an_old_driver_is_told_apart_from_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"driver runs CUDA up to 12\.4.*update the driver"):
        resolve_device(config(), replace(GOOD, cuda=(12, 4)))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA"):
        resolve_device(config(), GOOD)


def test_auto_takes_a_gpu_where_there_is_one_and_the_roles_share_a_slot() -> None:
    auto = config(cluster__device="auto")
    assert resolve_device(auto, GOOD).cluster.device == "cuda"
    assert resolve_device(auto, NONE).cluster.device == "cpu"
    spread = change(auto, cluster__colocated=False, train__dtype="float32", optim__moments="float32")
    assert resolve_device(spread, GOOD).cluster.device == "cpu"
    old = Driver(cuda=(13, 0), gpus=(replace(H100, capability=(8, 0)),))
    assert resolve_device(auto, old).cluster.device == "cpu"
    assert is_whole(auto) and not is_whole(spread)


def test_the_estimate_counts_the_rows_of_three_steps_where_a_memory_has_its_tables_on_the_host() -> None:
    with_memory = load_yaml(CONFIGS / "1b_memory.yaml")
    assert device_memory(config()).rows == 0
    found = device_memory(with_memory).rows
    addresses, per_row = 2 * 8 * 4096 * 8, 64 * 2 + 64 * 4 + 12
    assert 3 * addresses * per_row < found < 4.5 * addresses * per_row
    small = replace(with_memory.model.dse, rows_per_head=4096)
    assert device_memory(change(with_memory, model__dse=small)).rows < 0.2 * found
    assert "memory rows" in describe(device_memory(with_memory))


def test_the_estimate_counts_what_settings_change() -> None:
    base = device_memory(config())
    count = base.weights // 6
    assert (
        count == pytest.approx(1.24e9, rel=0.02) and base.moments == 4 * count and base.gradients == 2 * count
    )
    assert device_memory(config(optim__moments="float32")).moments == 2 * base.moments
    assert device_memory(config(train__recompute=True)).activations < 0.5 * base.activations
    four = device_memory(config(train__logical_shards=4, train__sequences_per_shard=2, determinism="bitwise"))
    assert four.activations == base.activations // 4 and four.gradients == (2 + 4 * 2) * count
    fast = device_memory(config(train__logical_shards=4, determinism="fast"))
    assert fast.gradients == (2 + 4) * count


def test_the_estimate_of_several_slots_counts_a_share_of_the_experts_and_what_they_exchange() -> None:
    one = device_memory(config(train__logical_shards=2, determinism="fast"))
    roles = {"cluster__attention_workers": 2, "cluster__expert_shards": 2}
    two = device_memory(config(train__logical_shards=2, determinism="fast", **roles))
    replicas = device_memory(
        config(train__logical_shards=2, determinism="fast", cluster__replication=2, **roles)
    )
    assert one.exchange == 0 < two.exchange
    assert replicas.weights == one.weights and 0.5 < two.weights / one.weights < 0.7


def test_the_estimate_counts_what_latent_attention_keeps() -> None:
    model = config().model
    narrow, wide = (
        config(model=replace(model, attention=("mla",), mla=MLAConfig(v_head_dim=width), num_layers=1))
        for width in (16, 48)
    )
    tokens = narrow.train.seq_len * narrow.train.sequences_per_shard
    kept = device_memory(wide).activations - device_memory(narrow).activations
    # The values and the output of every head, in bfloat16.
    assert kept == tokens * model.num_heads * 2 * 32 * 2


def test_latent_attention_is_served_on_a_gpu() -> None:
    latent = config(model=replace(config().model, attention=("mla",)))
    assert resolve_serving_device(latent, GOOD).cluster.device == "cuda"


def test_a_server_computes_in_its_own_dtype_on_a_gpu_and_in_float32_on_a_cpu() -> None:
    trained = change(config(), train__dtype="bfloat16")
    on_gpu = resolve_serving_device(change(trained, cluster__device="auto"), GOOD)
    assert (on_gpu.cluster.device, on_gpu.train.dtype) == ("cuda", "bfloat16")
    exact = resolve_serving_device(change(on_gpu, serve__dtype="float32"), GOOD)
    assert is_whole(exact) and exact.train.dtype == "float32"
    on_cpu = resolve_serving_device(change(trained, cluster__device="auto"), NONE)
    assert (on_cpu.cluster.device, on_cpu.train.dtype) == ("cpu", "float32") and not is_whole(on_cpu)


def test_engines_on_gpus_hold_everything_each_and_nothing_is_asked_for_beside_them() -> None:
    two = Driver(cuda=GOOD.cuda, gpus=GOOD.gpus * 2)
    engines = change(config(), cluster__device="cuda", cluster__attention_workers=2)
    assert resolve_serving_device(engines, two).cluster.attention_workers == 2
    with pytest.raises(ConfigError, match="this machine shows 1") as refused:
        resolve_serving_device(engines, GOOD)
    assert resolve_serving_device(cured(engines, str(refused.value)), GOOD).cluster.attention_workers == 1
    for wrong in ({"cluster__memory_shards": 2}, {"cluster__colocated": False}):
        with pytest.raises(ConfigError) as refused:
            resolve_serving_device(change(engines, **wrong), two)
        assert resolve_serving_device(cured(change(engines, **wrong), str(refused.value)), two)
