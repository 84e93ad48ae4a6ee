"""On what device a run computes, and whether it can: said in one sentence before anything is started.

`cluster.device: cuda` is slots with a GPU each: of one that has all roles, tensors stay there and no message is made;
several of one host, whose roles may be apart, exchange through each other's memory. The same way of working on a CPU is what `train.dtype:
bfloat16` asks for without a GPU.
"""

import os
from dataclasses import replace
from pathlib import Path

from sparseray.errors import ConfigError
from sparseray.log import get_logger
from sparseray.platform.config import RunConfig
from sparseray.platform.gpu import Driver, driver
from sparseray.platform.kernels_fit import check_shapes, check_triton
from sparseray.platform.planning.device_memory import (
    GIB,
    DeviceMemory,
    ServingMemory,
    device_memory,
    num_devices,
    serving_memory,
    snapshot_bytes,
)

log = get_logger(__name__)

CAPABILITY = (9, 0)
COPY_SHARE = 0.6
"""Of the host's memory that a checkpoint's copy may take; the rest is files' and everybody's."""


def is_whole(config: RunConfig) -> bool:
    """Whether slots compute in slabs on their devices, and in step where they are several."""
    return config.cluster.device == "cuda" or config.train.dtype == "bfloat16"


def host_bytes() -> int:
    """Memory of this machine, or what a container may use of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return found
    return min(found, int(limit)) if limit.isdigit() else found


def saves_beside(config: RunConfig) -> bool:
    """Whether checkpoints are written beside the next steps: from a copy, for which the host has room."""
    return is_whole(config) and snapshot_bytes(config) <= COPY_SHARE * host_bytes()


def spreads_experts(config: RunConfig) -> bool:
    """Whether a server's engines have some of the experts each, and compute in rounds."""
    return is_whole(config) and config.cluster.expert_shards > 1


def resolve_device(config: RunConfig, found: Driver | None = None) -> RunConfig:
    """Replace `cluster.device: auto` by the device that it stands for, and see that the run fits it.

    Args:
        config: of a training run.
        found: what the driver tells; None asks it.

    Raises:
        ConfigError: what does not fit, where, and what to change.
    """
    config, found = choose_device(config, found)
    if not is_whole(config):
        _check_by_message(config)
    if config.cluster.device == "cuda":
        assert found is not None
        _check_gpu(config, found, or_else=", or kernels=reference")
        check_shapes(config, trains=True)
        _check_memory(config, found)
    return config


def resolve_serving_device(config: RunConfig, found: Driver | None = None) -> RunConfig:
    """The same for a server, which computes in `serve.dtype` on a GPU and in float32 on a CPU.

    Args:
        config: of the checkpoint's run, with the server's sections.
        found: what the driver tells; None asks it.

    Raises:
        ConfigError: what does not fit, where, and what to change.
    """
    config, found = choose_device(config, found)
    dtype = config.serve.dtype if config.cluster.device == "cuda" else "float32"
    config = replace(config, train=replace(config.train, dtype=dtype))
    if config.cluster.device == "cuda":
        assert found is not None
        # With what the run trained is its own affair; an engine's graphs hold kernels.
        config = replace(config, kernels="auto")
        _check_engines(config)
        _check_gpu(config, found, or_else="")
        check_shapes(config, trains=False)
        _check_serving_memory(config, found)
    return config


def choose_device(config: RunConfig, found: Driver | None = None) -> tuple[RunConfig, Driver | None]:
    """The configuration with the device that `auto` stands for, and what the driver tells where it was asked.

    Args:
        config: of a run or a server.
        found: what the driver tells; None asks it.
    """
    device = config.cluster.device
    if device != "cpu":
        found = driver() if found is None else found
        if device == "auto":
            reason = _against_gpu(config, found)
            device = "cpu" if reason else "cuda"
            log.info("cluster.device: auto is %s here%s", device, f" ({reason})" if reason else "")
    return replace(config, cluster=replace(config.cluster, device=device)), found


def _against_gpu(config: RunConfig, found: Driver) -> str:
    """Why a run is not for the GPUs of this machine; empty if it is."""
    suits = sum(gpu.capability >= CAPABILITY for gpu in found.gpus)
    if not config.cluster.colocated:
        return "roles are in slots of their own: cluster.colocated=false"
    if suits >= num_devices(config):
        return ""
    which = f"GPUs of compute capability {_dotted(CAPABILITY)} or more"
    return f"{num_devices(config)} {which} are needed, and the driver shows {suits}"


def _check_engines(config: RunConfig) -> None:
    """See that nothing is asked for beside engines, each of which has everything, or some of the experts."""
    cluster, shards = config.cluster, f"cluster.expert_shards={config.cluster.expert_shards}"
    if not cluster.colocated:
        raise ConfigError(
            "cluster.colocated=false does not fit cluster.device=cuda in serving, where an engine's slot has all roles;"
            " set cluster.colocated=true"
        )
    if cluster.memory_shards > 1:
        raise ConfigError(
            f"cluster.memory_shards={cluster.memory_shards} does not fit cluster.device=cuda in serving, where every"
            " engine (cluster.attention_workers) has all tables; set cluster.memory_shards=1"
        )
    if cluster.expert_shards > 1 and config.model.dse.layers:
        raise ConfigError(
            f"{shards}: on GPUs a model with memory layers (model.dse.layers={list(config.model.dse.layers)}) is served"
            " with all experts in every engine; set cluster.expert_shards=1"
        )
    if cluster.expert_shards > 1 and config.serve.speculate != "none":
        raise ConfigError(
            f"serve.speculate={config.serve.speculate}: engines that share experts ({shards}) do not draft; set"
            " serve.speculate=none"
        )


def _check_by_message(config: RunConfig) -> None:
    needs = "needs slots that compute in slabs (cluster.device=cuda, or train.dtype=bfloat16)"
    if config.optim.moments != "float32":
        raise ConfigError(f"optim.moments={config.optim.moments} {needs}; set optim.moments=float32")
    if config.train.recompute:
        raise ConfigError(f"train.recompute=true {needs}; set train.recompute=false")


def _check_gpu(config: RunConfig, found: Driver, *, or_else: str) -> None:
    """See that there are GPUs, and what computes on them; `or_else` is a further cure for old ones."""
    what = "cluster.device=cuda"
    if found.cuda == (0, 0):
        raise ConfigError(f"{what}: this machine has no NVIDIA driver (libcuda.so.1); set cluster.device=cpu")
    if not found.gpus:
        raise ConfigError(
            f"{what}: the driver shows no GPU to this process; set cluster.device=cpu, or see that"
            " CUDA_VISIBLE_DEVICES names one"
        )
    gpu = found.gpus[0]
    if gpu.capability < CAPABILITY and config.kernels != "reference":
        raise ConfigError(
            f"{what}: {gpu.name} has compute capability {_dotted(gpu.capability)} and the kernels need"
            f" {_dotted(CAPABILITY)}; set cluster.device=cpu{or_else}"
        )
    _check_number(config, len(found.gpus))
    _check_torch(what, found)
    if config.kernels != "reference":
        check_triton(what, or_else)


def _check_number(config: RunConfig, gpus: int) -> None:
    """See that there is a GPU for each slot; those of other machines are counted by Ray."""
    cluster, slots = config.cluster, num_devices(config)
    if cluster.address or slots + cluster.standby <= gpus:
        return
    wanted = {
        role: min(getattr(cluster, role), gpus)
        for role in ("attention_workers", "expert_shards", "memory_shards")
    }
    wanted["standby"] = min(cluster.standby, gpus - min(slots, gpus))
    cure = " ".join(f"cluster.{k}={v}" for k, v in wanted.items() if v != getattr(cluster, k))
    if not cluster.colocated:
        cure = f"cluster.colocated=true {cure}".rstrip()
    raise ConfigError(
        f"cluster.device=cuda: {slots} slots and {cluster.standby} on standby take a GPU each, and this machine shows"
        f" {gpus}; set {cure}, or cluster.device=cpu"
    )


def _check_memory(config: RunConfig, found: Driver) -> None:
    gpu, need = found.gpus[0], device_memory(config)
    if need.total > gpu.num_bytes:
        raise ConfigError(
            f"cluster.device=cuda: this run takes about {need.total / GIB:.1f} GiB and {gpu.name} has"
            f" {gpu.num_bytes / GIB:.1f} GiB ({describe(need)}); {_cure(config, gpu.num_bytes)}"
        )


def _check_serving_memory(config: RunConfig, found: Driver) -> None:
    gpu, need = found.gpus[0], serving_memory(config)
    of_caches = int(config.serve.cache_gib * GIB)
    if need.total - need.least + max(need.least, of_caches) > gpu.num_bytes:
        raise ConfigError(
            f"cluster.device=cuda: an engine takes {describe_serving(need)} and {gpu.name} has"
            f" {gpu.num_bytes / GIB:.1f} GiB; {_serving_cure(config, gpu.num_bytes)}"
        )


def _check_torch(what: str, found: Driver) -> None:
    import torch

    built = torch.version.cuda
    if built is None:
        raise ConfigError(
            f"{what}: torch {torch.__version__} is built without CUDA; install the build for CUDA, or set"
            " cluster.device=cpu"
        )
    needed = tuple(int(part) for part in built.split(".")[:2])
    if needed[0] > found.cuda[0]:
        raise ConfigError(
            f"{what}: the driver runs CUDA up to {_dotted(found.cuda)} and torch {torch.__version__} is built for"
            f" {built}; update the driver, or install a torch that is built for CUDA {found.cuda[0]}"
        )


def describe(memory: DeviceMemory) -> str:
    """The shares of an estimate, for people."""
    named = [("weights", memory.weights), ("moments", memory.moments), ("gradients", memory.gradients)]
    named += [("memory rows", memory.rows), ("exchange", memory.exchange)]
    named = [share for share in named if share[1]]
    named += [("activations", memory.activations), ("CUDA", memory.context)]
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in named)


def describe_serving(memory: ServingMemory) -> str:
    """What an engine takes of its GPU, for people."""
    return (
        f"about {memory.total / GIB:.1f} GiB (weights {memory.weights / GIB:.1f}, caches of the longest request"
        f" {memory.least / GIB:.2f}, a step {memory.working / GIB:.1f}, CUDA {memory.context / GIB:.1f}) and up to"
        f" {(memory.caches - memory.least) / GIB:.1f} GiB more for the caches of others"
    )


def _serving_cure(config: RunConfig, num_bytes: int) -> str:
    """The first change that makes an engine fit, as a setting."""
    need, serve = serving_memory(config), config.serve
    if num_bytes >= need.total:
        return f"set serve.cache_gib={max(1, int((num_bytes - need.total + need.least) / GIB * 100)) / 100:g}"
    for batch in (serve.max_batch // 2, 1):
        if (
            batch
            and serving_memory(replace(config, serve=replace(serve, max_batch=batch))).total <= num_bytes
        ):
            return f"set serve.max_batch={batch}"
    longest = serve.max_model_len or config.model.max_seq_len
    for length in (longest // 2, longest // 8, longest // 64):
        if (
            length
            and serving_memory(replace(config, serve=replace(serve, max_model_len=length))).total <= num_bytes
        ):
            return f"set serve.max_model_len={length}"
    return "set cluster.device=cpu, or serve from GPUs with more memory"


def _cure(config: RunConfig, num_bytes: int) -> str:
    """The first change that makes the run fit, as settings."""
    for count in range(config.train.sequences_per_shard - 1, 0, -1):
        if config.train.sequences_per_shard % count:
            continue
        parts = config.train.logical_shards * config.train.sequences_per_shard // count
        train = replace(config.train, sequences_per_shard=count, logical_shards=parts)
        if device_memory(replace(config, train=train)).total <= num_bytes:
            return f"set train.sequences_per_shard={count} and train.logical_shards={parts}"
    if not config.train.recompute:
        train = replace(config.train, recompute=True)
        if device_memory(replace(config, train=train)).total <= num_bytes:
            return "set train.recompute=true"
    if config.optim.moments == "float32":
        optim = replace(config.optim, moments="bfloat16")
        if device_memory(replace(config, optim=optim)).total <= num_bytes:
            return "set optim.moments=bfloat16"
    return "make the model smaller (model.num_layers, model.moe.num_experts)"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
