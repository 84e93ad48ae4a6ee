"""The configuration of a run: YAML files and `--a.b value` overrides, validated into frozen dataclasses.

A file is the complete record of a run; defaults live once, here and in model/config.py. Unknown
keys are errors that name the nearest known one.
"""

import argparse
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from sparseray.actors.training.mixture import Mixture
from sparseray.errors import ConfigError
from sparseray.kernels.settings import Kernels
from sparseray.model.config import ModelConfig
from sparseray.model.limits import Limits, check, complaint, count, within
from sparseray.platform.cluster_config import MOST_SLOTS
from sparseray.platform.cluster_config import ClusterConfig as ClusterConfig
from sparseray.platform.plain_values import from_dict as from_dict
from sparseray.platform.plain_values import to_dict as to_dict
from sparseray.platform.settings import Setting, expand_path, read_file, read_options

Determinism = typing.Literal["bitwise", "fast"]
InitState = typing.Literal["weights", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from.

    Args:
        path: folder written by `sparseray data prepare`.
        mixture: weights of its named sources, "code=0.6 text=0.4", and others from a step on, "code=0.2 text=0.8
            from=500"; empty for those that the data was prepared with.
        verify: check the SHA-256 of every token shard when it is opened.
    """

    path: str = ""
    mixture: tuple[str, ...] = ()
    verify: bool = True

    def __post_init__(self) -> None:
        check("data", self)
        if self.mixture:
            Mixture.parse(self.mixture)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW for dense weights and experts, row-wise Adam for memory rows.

    Args:
        lr: peak learning rate.
        min_lr_ratio: last learning rate over the peak.
        warmup_steps: steps of linear warm-up.
        schedule: after the warm-up. "cosine" falls to the last step; "constant" stays; "wsd" stays, and falls linearly in
            the last `decay_steps`.
        decay_steps: of "wsd"; 0 for a tenth of the run.
        beta1, beta2, eps: Adam's.
        weight_decay: on matrices; never on vectors and memory rows.
        clip: limit of the global gradient norm, memory rows included.
        memory_lr_scale: factor on the learning rate of memory rows (5 in arXiv 2601.07372, appendix A).
        moments: dtype of both moments of dense weights and experts; bfloat16 where one slot plays all roles.
    """

    lr: float = within(2e-3, 0.0, 1e3)
    min_lr_ratio: float = within(0.1, 0.0, 1.0)
    warmup_steps: int = count(20, 0)
    schedule: typing.Literal["cosine", "constant", "wsd"] = "cosine"
    decay_steps: int = count(0, 0)
    beta1: float = within(0.9, 0.0, below=1.0)
    beta2: float = within(0.95, 0.0, below=1.0)
    eps: float = within(1e-8, above=0.0, at_most=1.0)
    weight_decay: float = within(0.1, 0.0, 1e3)
    clip: float = within(1.0, 0.0, 1e9)
    memory_lr_scale: float = within(5.0, 0.0, 1e6)
    moments: typing.Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check("optim", self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One pretraining run.

    Args:
        steps: optimizer steps in all.
        seq_len: tokens of a sequence.
        logical_shards: parts of the global batch, fixed whatever the number of workers.
        sequences_per_shard: sequences of one part.
        seed: of initialisation and data order.
        checkpoint_every: steps between checkpoints, 0 for only the last.
        keep_checkpoints: how many checkpoints stay.
        eval_every: steps between validations, 0 for only the last.
        eval_batches: validation batches of one logical shard's size.
        dtype: that forward and backward compute in, beside fp32 master weights; bfloat16 where one slot plays all
            roles. Routers, norms' statistics, softmax, loss and the update are fp32 in any case.
        spike: what is done about a step whose loss or gradient norm stands out upwards or is not finite. "off": one
            that is not finite ends the run; "skip": its update is left out; "rollback": and the weights become those of
            the last scheduled checkpoint, so that the data of all steps since is left out.
        spike_deviations: robust deviations (of the median absolute one) above the median that stand out.
        spike_window: applied steps that a step is compared with; the first 16 are compared with nothing.
        recompute: run each layer's forward pass again in the backward pass instead of keeping its activations.
        restore_from: where a run goes on that has lost state for good. "checkpoint": at its newest one, to the same bits;
            "engines": with the weights of a server that follows it on its platform, where these are of a later step;
            moments begin at zero then, and bits differ from there on.
    """

    steps: int = count(100)
    seq_len: int = count(128)
    logical_shards: int = count(4, 1, 1 << 16)
    sequences_per_shard: int = count(4, 1, 1 << 24)
    seed: int = count(0, 0)
    checkpoint_every: int = count(50, 0)
    keep_checkpoints: int = count(3)
    eval_every: int = count(50, 0)
    eval_batches: int = count(8)
    dtype: typing.Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    spike: typing.Literal["off", "skip", "rollback"] = "off"
    spike_deviations: float = within(8.0, above=0.0, at_most=1e9)
    spike_window: int = count(64, 16, 1 << 16)
    restore_from: typing.Literal["checkpoint", "engines"] = "checkpoint"

    def __post_init__(self) -> None:
        check("train", self)
        if self.spike == "rollback" and not self.checkpoint_every:
            raise ConfigError(
                "train.spike=rollback goes back to the last of the checkpoints that train.checkpoint_every=0 makes none "
                "of; set train.checkpoint_every to 50"
            )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The HTTP server.

    Args:
        host, port: address; loopback by default; port 0 for a free one.
        max_batch: requests that share a step.
        max_model_len: prompt and completion tokens of one request; 0 for as many as the model has.
        prefill_chunk: tokens of all prompts together in one step on a CPU; a GPU takes 8,192.
        cache_gib: GiB of the caches' pages; 0 for 0.8 of what the weights leave on a GPU, and on a CPU for what
            `max_batch` of the longest requests need.
        dtype: of weights and caches on a GPU; a CPU serves in float32.
        speculate: "mtp": draft tokens with the model's own modules (`model.mtp`) and judge them together; the texts
            are the same. "none" does not load the modules.
        max_waiting: requests that may wait beside those in the batches, before new ones get 429.
        drain_s: seconds that open requests get at a stop.
        follow_every: steps of a followed run (`serve --run`) between two versions of the weights; 0 for only those that
            `publish` brings.
        in_flight: "finish": open requests end with the version that they began with; "switch": they go on with the new one.
        target_ttft_ms: within which nine of ten requests shall have their first token; 0 for any time.
        target_itl_ms: within which nine of ten further tokens shall come; 0 for any time.
        min_engines, max_engines: bounds of the number of engines, which follows the load; max_engines 0: it does not.
        max_expert_shards, max_memory_shards: the same for the shards, whose least numbers are those of `cluster`.
        ingress: "process": HTTP in the command's own process; "ray": in replicas under Ray Serve (`sparseray[ingress]`).
        ingress_replicas: how many of these.
        ignore_unknown_fields: leave fields that the server does not know out of a body, instead of refusing it.
    """

    host: str = "127.0.0.1"
    port: int = count(8000, 0, 65535)
    max_batch: int = count(16, 1, 1 << 16)
    max_model_len: int = count(0, 0)
    prefill_chunk: int = count(64)
    cache_gib: float = within(0.0, 0.0, 1e6)
    dtype: typing.Literal["float32", "bfloat16"] = "bfloat16"
    speculate: typing.Literal["none", "mtp"] = "none"
    max_waiting: int = count(256, 1, 1 << 20)
    drain_s: float = within(5.0, 0.0, 3600.0)
    follow_every: int = count(50, 0)
    in_flight: typing.Literal["finish", "switch"] = "finish"
    target_ttft_ms: float = within(0.0, 0.0, 1e9)
    target_itl_ms: float = within(0.0, 0.0, 1e9)
    min_engines: int = count(1, 1, MOST_SLOTS)
    max_engines: int = count(0, 0, MOST_SLOTS)
    max_expert_shards: int = count(0, 0, MOST_SLOTS)
    max_memory_shards: int = count(0, 0, MOST_SLOTS)
    ingress: typing.Literal["process", "ray"] = "process"
    ingress_replicas: int = count(2, 1, 1024)
    ignore_unknown_fields: bool = False

    def __post_init__(self) -> None:
        check("serve", self)
        if 0 < self.max_engines < self.min_engines:
            raise ConfigError(
                f"serve.min_engines={self.min_engines} is above serve.max_engines={self.max_engines}; lower the first"
            )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is recorded for Prometheus beyond the usual.

    Args:
        per_expert: also a series for each expert of each layer; many, so only on request.
    """

    per_expert: bool = False

    def __post_init__(self) -> None:
        check("metrics", self)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run.

    Args:
        model, data, optim, train, cluster, serve, metrics: see each section.
        kernels: "reference" (plain PyTorch), "triton", or "auto": Triton on a GPU of compute capability 9 or more,
            compiled loops where a CPU serves.
        determinism: "bitwise" (every sum in one order, gradients of the parts along one tree whatever the number of
            workers), or "fast": on a GPU parts are summed in place and full attention takes its fastest backward pass.
        run_dir: folder of the run.
        init_from: checkpoint that the run begins with, empty for the seed.
        init_state: "weights": moments begin at zero, and steps at 1; "optimizer": the run goes on from the checkpoint's
            step with its moments.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    kernels: Kernels = "auto"
    determinism: Determinism = "bitwise"
    run_dir: str = "runs/run"
    init_from: str = ""
    init_state: InitState = "weights"

    def __post_init__(self) -> None:
        if problem := complaint(str, Limits(), self.run_dir):
            raise ConfigError(f"run_dir={self.run_dir!r} {problem}")
        if not self.run_dir:
            raise ConfigError("run_dir= is empty; give the folder of the run")
        if self.init_state == "optimizer" and not self.init_from:
            raise ConfigError("init_state=optimizer goes on from a checkpoint; give it as init_from")


PATHS = ("data.path", "run_dir", "init_from")
SECTIONS = ("model", "data", "optim", "train", "cluster", "serve", "metrics")


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of an example as they are, so that they can be copied."""


class Parser(jsonargparse.ArgumentParser):
    """Raises our error, which names the nearest key, where the library would exit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"formatter_class": _HelpFormatter} | options))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a message of ours.

        Args:
            message: of the parser.
            ex: what it comes from.
        """
        raise ConfigError(_shorten(message))


def parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """Return a parser with `--config FILE` and one option per field of every section.

    Args:
        prog: name of the command.
        description: of the command, for --help.
    """
    found = Parser(prog=prog, description=description)
    found.add_argument("--config", action="config", help="YAML file; options after it override its values")
    for section, kind in zip(SECTIONS, (f.type for f in fields(RunConfig))):
        found.add_class_arguments(typing.cast(type, kind), section)
    found.add_argument(
        "--kernels",
        type=Kernels,
        default=RunConfig.kernels,
        help="what the model computes with; auto: Triton on a GPU of compute capability 9 or more",
    )
    found.add_argument(
        "--determinism",
        type=Determinism,
        default=RunConfig.determinism,
        help="bitwise: the same bits in every run; fast: on a GPU sums may take any order",
    )
    found.add_argument(
        "--run_dir", type=str, default=RunConfig.run_dir, help="folder of the run; resumes what it holds"
    )
    found.add_argument("--init_from", type=str, default="", help="checkpoint that the run begins with")
    found.add_argument(
        "--init_state",
        type=InitState,
        default=RunConfig.init_state,
        help="of it; weights: steps begin at 1; optimizer: go on from its step, with its moments",
    )
    return found


def parse(arguments: Sequence[str], *, prog: str, description: str) -> RunConfig:
    """Read a configuration from command-line arguments.

    Args:
        arguments: words after the command's name; `--help` and `--print_config` show something and exit.
        prog: the command's name, for its help.
        description: of the command, with an example, for its help.

    Raises:
        ConfigError: an unknown key, a wrong type, or values that do not fit each other; with file and line.
    """
    if {"-h", "--help"} & set(arguments):
        parser(prog, description).print_help()
        raise SystemExit(0)
    settings = read_options([w for w in arguments if w.partition("=")[0] != "--print_config"], RunConfig)
    config = _build(settings)
    if any(word.partition("=")[0] == "--print_config" for word in arguments):
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _build(settings: dict[str, Setting]) -> RunConfig:
    nested: dict[str, Any] = {}
    for name, setting in settings.items():
        *sections, leaf = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        is_path = name in PATHS and setting.value
        inner[leaf] = expand_path(setting.value, name) if is_path else setting.value
    try:
        return from_dict(RunConfig, nested)
    except ConfigError as error:
        # Values that do not fit each other: the message names them, and each stands somewhere.
        named = re.findall(r"([\w.]+)=", str(error))
        places = {s.place for n in named for key, s in settings.items() if f".{key}".endswith(f".{n}")}
        where = f" (see {', '.join(sorted(places))})" if places else ""
        raise ConfigError(f"{error}{where}") from None


def _shorten(message: str) -> str:
    """Keep what the library says of the mistake and drop its stack of type alternatives."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(dict.fromkeys(lines))[:600]


def save_yaml(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration.

    Args:
        config: resolved.
        path: of the file.
    """
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load_yaml(path: Path) -> RunConfig:
    """Read a configuration that `save_yaml` wrote.

    Raises:
        ConfigError: it is missing or not ours; with the line.
    """
    return _build(read_file(path, RunConfig))


def die(error: Exception) -> int:
    """Print a user's mistake as one line and return the exit code 2."""
    print(f"sparseray: error: {error}", file=sys.stderr)
    return 2
