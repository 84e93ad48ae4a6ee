"""What a model asks for that fills several GPUs: a quick start, gradients as planned, checkpoints in files of some size."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_cluster import MODEL, Trained, tiny_run, train
from torch import Tensor

from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.peers.token_exchange import TokenExchange
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import DENSE
from sparseray.actors.state.slab import MOMENTS, ExpertSlab
from sparseray.errors import ConfigError
from sparseray.jobs import plan
from sparseray.model.config import DSEConfig
from sparseray.model.init import initial_tensor, room_for
from sparseray.platform.config import RunConfig, load_yaml
from sparseray.platform.device import GIB, resolve_device
from sparseray.platform.gpu import Driver, Gpu
from sparseray.platform.installing import disk_seconds
from sparseray.platform.planning.device_memory import device_memory
from sparseray.platform.planning.inventory import Inventory
from sparseray.platform.planning.replan import make_plan
from sparseray.platform.run import checkpoint
from sparseray.platform.run.checkpoint import in_groups
from sparseray.platform.saving import Checkpoints

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PLAIN = replace(MODEL, dse=DSEConfig(layers=()))
ADAM: dict[str, Any] = {"seed": 3, "num_parts": 1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def slabs_run(data: Path, *, slots: int, **train_keys: Any) -> RunConfig:
    config = tiny_run(data, steps=4, colocated=True, attention_workers=slots, expert_shards=slots)
    settings = {"dtype": "bfloat16", "logical_shards": slots, **train_keys}
    return replace(config, model=PLAIN, train=replace(config.train, **settings))


# -- the start -----------------------------------------------------------------------------------------


def holdings() -> tuple[Holdings, list[DenseState]]:
    """A slot's state, and every replica of the dense weights that was built."""
    built: list[DenseState] = []

    def new() -> DenseState:
        built.append(DenseState(PLAIN, None, **ADAM))
        return built[-1]

    return Holdings(new, ExpertShard(PLAIN, **ADAM), None), built


def weights(held: Holdings) -> list[Tensor]:
    assert held.dense is not None
    return [p.detach().clone() for p in held.dense.parameters]


def test_dense_weights_that_were_made_ahead_are_not_made_again() -> None:
    held, built = holdings()
    held.spare()
    held.initialize([DENSE])
    assert len(built) == 1
    assert all(map(torch.equal, weights(held), built[0].parameters))
    wanted = [p.detach() for p in DenseState(PLAIN, None, **ADAM).parameters]
    assert all(map(torch.equal, weights(held), wanted))


def _trained(held: Holdings) -> None:
    held.initialize([DENSE])
    assert held.dense is not None
    held.dense.parameters[0].data.zero_()
    held.trim()
    assert held.dense is None


def _half_loaded(held: Holdings) -> None:
    first = {name: torch.zeros_like(p) for name, p in zip(held.spare().names[:1], held.spare().parameters)}
    with pytest.raises(KeyError):
        held.load([DENSE], first, 1)


def _trained_and_assigned(held: Holdings) -> None:
    held.initialize([DENSE])
    assert held.dense is not None
    held.dense.parameters[0].data.zero_()


@pytest.mark.parametrize("change", [_trained, _half_loaded, _trained_and_assigned])
def test_dense_weights_that_have_changed_are_drawn_anew(change: Callable[[Holdings], None]) -> None:
    held, _ = holdings()
    change(held)
    held.initialize([DENSE])
    wanted = [p.detach() for p in DenseState(PLAIN, None, **ADAM).parameters]
    assert all(map(torch.equal, weights(held), wanted))


def test_values_are_drawn_to_the_same_bits_wherever_they_go() -> None:
    held = ExpertShard(PLAIN, **ADAM)
    held.initialize([(0, 2), (1, 5)])
    for key in held.held:
        for name, value in held.tensors([key], with_optimizer=False).items():
            assert torch.equal(value, initial_tensor(name, value.shape, seed=3, std=PLAIN.init_std))
    # What is on a device, or in another dtype, is drawn aside, in memory that serves the next tensor too.
    large, small = torch.empty(40, 50, dtype=torch.bfloat16), torch.empty(7, 3, dtype=torch.bfloat16)
    rooms = [room_for(large), room_for(small)]
    assert rooms[0].data_ptr() == rooms[1].data_ptr() and rooms[1].shape == small.shape
    drawn = initial_tensor("a", (7, 3), seed=1, std=0.5, room=rooms[1])
    assert torch.equal(drawn, initial_tensor("a", (7, 3), seed=1, std=0.5))


def test_a_large_checkpoint_is_waited_for_as_long_as_a_slow_disk_takes() -> None:
    config = tiny_run(Path(), attention_workers=2, expert_shards=2, colocated=True)
    inventory = Inventory.of(PLAIN, parts=2)
    roles = inventory.roles(config.cluster)
    placed = make_plan(
        generation=1,
        addresses={0: "", 1: ""},
        inventory=inventory,
        roles=roles,
        replication=1,
        colocated=True,
    )
    sizes = {"dense": 10e9, "expert": 1e9}
    experts = len(PLAIN.moe_layers) * PLAIN.moe.num_experts
    assert disk_seconds(placed, lambda piece: int(sizes[piece[0]])) == pytest.approx(100 + 10 * experts / 2)


# -- memory of the device ------------------------------------------------------------------------------


@pytest.mark.parametrize("determinism", ["fast", "bitwise"])
@pytest.mark.parametrize("parts", [2, 4])
def test_slots_keep_the_gradients_that_the_plan_counts(
    determinism: str, parts: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = dict.fromkeys(("dense", "experts"), 0)

    def note(name: str, gradients: list[Tensor]) -> None:
        most[name] = max(most[name], sum(g.numel() * g.element_size() for g in gradients))

    finish = DeviceExchange._finish

    def noted(me: DeviceExchange, step: int) -> None:
        note("dense", [g for _, _, value in me.dense.sum.nodes() for g in value])
        note("experts", me.held.sum.total or [])
        finish(me, step)

    monkeypatch.setattr(DeviceExchange, "_finish", noted)
    config = replace(slabs_run(corpus, slots=2, logical_shards=parts), determinism=determinism)
    train(tmp_path / "run", config, stop_after=2)
    planned, count = device_memory(config).gradients, device_memory(config).weights // 6
    # What stands at the end of a step: one sum of each tensor, in fp32 where it is of more than one part. Routers' are always.
    is_own = determinism == "fast" and parts == 2
    routers = 2 * len(PLAIN.moe_layers) * PLAIN.hidden * PLAIN.moe.num_experts
    bytes_of_dense = (most["dense"] - routers) / 2 if parts == 2 else most["dense"] / 4
    assert most["experts"] / (2 if is_own else 4) + bytes_of_dense == count
    assert most["dense"] + most["experts"] <= planned + routers
    assert (planned == 2 * count) == is_own


class _Dense:
    """Stands for dense weights whose moments take 400 bytes."""

    model = SimpleNamespace(recompute=False)

    def __init__(self) -> None:
        self.taken = 0

    def moments(self) -> None:
        self.taken = 400


@pytest.mark.parametrize(("free", "counts"), [(40_000, False), (8_000, True)])
def test_memory_is_kept_for_moments_before_rows_take_it(
    free: int, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab, dense = ExpertSlab(8, 8, device="cpu", compute_dtype=torch.bfloat16), _Dense()
    slab.take(range(4))
    assert slab.compute and slab.num_bytes == 4 * 3 * 64 * 6
    at_first = slab.num_bytes
    for name, value in {
        "memory_allocated": lambda _: slab.num_bytes + dense.taken,
        "max_memory_allocated": lambda _: at_first + 100,
        "memory_reserved": lambda _: at_first + 100,
        "mem_get_info": lambda _: (free, 50_000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    held = SimpleNamespace(slabs=[slab], config=PLAIN)
    exchange: Any = SimpleNamespace(
        _is_settled=False, device=torch.device("cuda"), held=held, _dense=dense, counts_rows=True
    )
    TokenExchange.settle(exchange, 2, 1)
    # Two moments of 4 x 3 x 64 numbers in fp32 take 6144, the dense ones 400, rows for others 256.
    assert set(MOMENTS) <= set(slab._fields) and dense.taken
    assert exchange.counts_rows is counts


def gpus(count: int, gib: float) -> Driver:
    gpu = Gpu(name="a GPU", capability=(9, 0), num_bytes=int(gib * GIB))
    return Driver(cuda=(13, 0), gpus=(gpu,) * count)


@pytest.mark.parametrize(
    ("count", "gib", "changes"),
    [(2, 139.8, {}), (4, 139.8, {"sequences_per_shard": 4}), (4, 79.1, {"recompute": True})],
)
def test_moonlight_fits_two_gpus_of_140_gib_and_four_of_80(
    count: int, gib: float, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    config = load_yaml(CONFIGS / "moonlight.yaml")
    roles = replace(config.cluster, attention_workers=count, expert_shards=count)
    train = replace(config.train, logical_shards=count, **changes)
    resolve_device(replace(config, cluster=roles, train=train), gpus(count, gib))
    with pytest.raises(ConfigError, match="this run takes about"):
        resolve_device(replace(config, cluster=roles, train=train), gpus(count, gib / 2))


def test_the_plan_says_what_a_checkpoint_takes_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for gib in (256, 128):
        monkeypatch.setattr("sparseray.platform.device.host_bytes", lambda gib=gib: gib << 30)
        plan.run(load_yaml(CONFIGS / "moonlight.yaml"), said.append)
    of_host = [line for line in said if line.startswith("on the host")]
    # 15.5 B masters of 4 bytes and moments of 2 each.
    assert "takes 115.5 of this machine's 256 GiB; it is written beside the next steps" in of_host[0]
    assert "115.5 of this machine's 128 GiB; it is written while training waits" in of_host[1]


# -- checkpoints ---------------------------------------------------------------------------------------


def test_tensors_are_grouped_in_their_order() -> None:
    tensors = {str(n): torch.full((n,), float(n)) for n in (0, 1, 64, 100, 150, 1000, 2)}
    groups = list(in_groups(tensors, 1024))
    assert [name for group in groups for name in group] == list(tensors)
    assert [list(group) for group in groups] == [["0", "1", "64", "100"], ["150"], ["1000"], ["2"]]
    assert list(in_groups({}, 1024)) == [{}]


def test_a_checkpoint_of_many_files_is_that_of_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = train(tmp_path / "one", slabs_run(corpus, slots=2))
    monkeypatch.setattr(checkpoint, "in_groups", partial(in_groups, most_bytes=8192))
    config = slabs_run(corpus, slots=2)
    train(tmp_path / "many", config, stop_after=2)
    files = list((tmp_path / "many" / "checkpoints" / "step_2").glob("experts_*.safetensors"))
    assert len(files) > 4 and all(file.stat().st_size < 16_000 for file in files)
    many: Trained = train(tmp_path / "many", config)
    assert many.curve == one.curve and many.digest == one.digest


def test_training_waits_for_a_checkpoint_whose_copy_is_too_large_for_the_host(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: list[bool] = []
    begin = Checkpoints._begin

    def noted(me: Checkpoints, step: int, *, in_background: bool) -> Any:
        how.append(in_background)
        return begin(me, step, in_background=in_background)

    monkeypatch.setattr(Checkpoints, "_begin", noted)
    config = slabs_run(corpus, slots=1, checkpoint_every=2)
    beside = train(tmp_path / "beside", config)
    monkeypatch.setattr("sparseray.platform.device.host_bytes", lambda: 1000)
    waited = train(tmp_path / "waited", config)
    assert how == [True, False, False, False]
    assert waited.digest == beside.digest
