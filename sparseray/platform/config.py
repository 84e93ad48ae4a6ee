"""The configuration of a run: YAML files and `--a.b value` overrides, validated into frozen dataclasses.

A file is the complete record of a run; defaults live once, here and in model/config.py. Unknown
keys are errors that name the nearest known one.
"""

import argparse
import difflib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml

from sparseray.errors import ConfigError
from sparseray.kernels.settings import Kernels
from sparseray.model.config import ModelConfig

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from.

    Args:
        path: folder written by `sparseray data prepare`.
        verify: check the SHA-256 of every token shard when it is opened.
    """

    path: str = ""
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW for dense weights and experts, row-wise Adam for memory rows.

    Args:
        lr: peak learning rate.
        min_lr_ratio: last learning rate over the peak.
        warmup_steps: steps of linear warm-up before the cosine.
        beta1, beta2, eps: Adam's.
        weight_decay: on matrices; never on vectors and memory rows.
        clip: limit of the global gradient norm, memory rows included.
        memory_lr_scale: factor on the learning rate of memory rows (5 in arXiv 2601.07372, appendix A).
    """

    lr: float = 2e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    memory_lr_scale: float = 5.0


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
    """

    steps: int = 100
    seq_len: int = 128
    logical_shards: int = 4
    sequences_per_shard: int = 4
    seed: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 3
    eval_every: int = 50
    eval_batches: int = 8

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "seq_len",
            "logical_shards",
            "sequences_per_shard",
            "keep_checkpoints",
            "eval_batches",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How many slots play which role, and where.

    Args:
        attention_workers, expert_shards, memory_shards: slots of each role.
        replication: holders of every piece of state.
        colocated: roles share slots; a call from a slot to itself is a function call.
        threads_per_slot: torch threads; part of the bits of a result.
        cpus_per_slot: CPUs that Ray reserves for a slot.
        address: Ray address to join, for example "auto"; empty starts a local Ray.
        transport: "ipc" (Unix sockets, one host) or "tcp".
        bind_host: address that TCP sockets and metrics bind to.
        deadline_s: seconds without an answer after which all slots are probed.
        hang_s: seconds without a sign of life after which a slot counts as lost.
        standby: warm slots without a role, ready to take over a lost one's.
        max_slots: most slots of the job, 0 for as many as the cluster has room for.
        rebalance_above: load of the busiest expert shard over the mean that moves experts, 0 for never.
        rebalance_every: least number of steps between two such moves.
    """

    attention_workers: int = 1
    expert_shards: int = 1
    memory_shards: int = 1
    replication: int = 1
    colocated: bool = False
    threads_per_slot: int = 1
    cpus_per_slot: float = 1.0
    address: str = ""
    transport: typing.Literal["ipc", "tcp"] = "ipc"
    bind_host: str = "127.0.0.1"
    deadline_s: float = 30.0
    hang_s: float = 0.7
    standby: int = 0
    max_slots: int = 0
    rebalance_above: float = 0.0
    rebalance_every: int = 50

    def __post_init__(self) -> None:
        if self.standby < 0 or self.max_slots < 0 or self.rebalance_every < 1:
            raise ConfigError(
                "cluster.standby, cluster.max_slots and cluster.rebalance_every cannot be negative"
            )
        if self.hang_s < 0.3:
            raise ConfigError(
                f"cluster.hang_s={self.hang_s:g} is below 0.3 s: a busy machine would look like a dead one"
            )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The HTTP server.

    Args:
        host, port: address; loopback by default.
        max_batch: requests that share a step.
        max_model_len: prompt and completion tokens of one request.
        prefill_chunk: prompt tokens of one request per step.
        max_waiting: requests that may queue before new ones get 429.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 16
    max_model_len: int = 512
    prefill_chunk: int = 64
    max_waiting: int = 256


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is recorded for Prometheus beyond the usual.

    Args:
        per_expert: also a series for each expert of each layer; many, so only on request.
    """

    per_expert: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run.

    Args:
        model, data, optim, train, cluster, serve, metrics: see each section.
        kernels: "reference" (plain PyTorch), "triton", or "auto": Triton on a GPU of compute capability 9 or more.
        run_dir: folder of the run.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    kernels: Kernels = "auto"
    run_dir: str = "runs/run"


SECTIONS = ("model", "data", "optim", "train", "cluster", "serve", "metrics")


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of an example as they are, so that they can be copied."""


class Parser(jsonargparse.ArgumentParser):
    """Raises our error, which names the nearest key, where the library would exit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"formatter_class": _HelpFormatter} | options))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_shorten(message))


def parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    """Return a parser with `--config FILE` and one option per field of every section."""
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
        "--run_dir", type=str, default=RunConfig.run_dir, help="folder of the run; resumes what it holds"
    )
    return found


def parse(arguments: Sequence[str], *, prog: str, description: str) -> RunConfig:
    """Read a configuration from command-line arguments.

    Raises:
        ConfigError: an unknown key, a wrong type, or values that do not fit each other.
    """
    check_keys(arguments, set(known_keys()))
    reader = parser(prog, description)
    made = reader.instantiate(reader.parse_args(list(arguments)))
    sections = {name: getattr(made, name) for name in SECTIONS}
    return RunConfig(**sections, kernels=made.kernels, run_dir=made.run_dir)


def _shorten(message: str) -> str:
    """Keep what the library says of the mistake and drop its stack of type alternatives."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(dict.fromkeys(lines))[:600]


def known_keys(kind: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key, sections included."""
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        yield prefix + item.name
        if is_dataclass(hints[item.name]):
            yield from known_keys(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")


def check_keys(arguments: Sequence[str], known: set[str]) -> None:
    """See that options, and keys of files given with --config, are known.

    Raises:
        ConfigError: one is not; it names the nearest that is.
    """
    for position, argument in enumerate(arguments):
        if not argument.startswith("--") or argument in ("--help", "--config", "--print_config"):
            if position and arguments[position - 1] == "--config":
                _check_file(Path(argument), known)
            continue
        name = argument[2:].split("=")[0]
        if name == "config":
            _check_file(Path(argument.split("=", 1)[1]), known)
        elif name not in known:
            raise ConfigError(f"unknown option --{name}; {_nearest(name, known)}")


def _check_file(path: Path, known: set[str]) -> None:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}; give --config an existing file"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} must hold sections such as 'model:' and 'train:', not {type(content).__name__}"
        )
    for name in _flat_keys(content):
        if name not in known:
            raise ConfigError(f"{path}: unknown key {name!r}; {_nearest(name, known)}")


def _flat_keys(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "see --help for the known ones"


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return plain values for YAML, JSON or msgpack."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_dict(kind: type[C], value: dict[str, Any]) -> C:
    """Rebuild a dataclass from `to_dict`; lists become tuples where the field says so.

    Raises:
        ConfigError: a key that the dataclass lacks.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ConfigError(f"unknown keys {unknown} for {kind.__name__}; was this written by another version?")
    return kind(**{name: _typed(hints[name], item) for name, item in value.items()})


def _typed(hint: Any, value: Any) -> Any:
    if is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and any(typing.get_origin(o) is tuple or o is tuple for o in options):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return value


def save_yaml(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load_yaml(path: Path) -> RunConfig:
    """Read a configuration that `save_yaml` wrote.

    Raises:
        ConfigError: it is missing or not ours.
    """
    try:
        return from_dict(RunConfig, yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def die(error: Exception) -> int:
    """Print a user's mistake as one line and return the exit code 2."""
    print(f"sparseray: error: {error}", file=sys.stderr)
    return 2
