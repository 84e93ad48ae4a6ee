"""The folder of a run: configuration, one JSON line a step, journal, checkpoints and report.

A run resumes by itself from what its folder holds; a folder of another configuration is refused.
"""

import errno
import json
import os
import shutil
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sparseray.errors import CheckpointError, ConfigError, IdentityError
from sparseray.log import get_logger
from sparseray.model.dse_layout import DSELayout
from sparseray.platform.config import RunConfig, from_dict, save_yaml, to_dict
from sparseray.platform.run import checkpoint
from sparseray.platform.run.texts import HANDED_ON, TOKENIZER_CONFIG

log = get_logger(__name__)

# Keys that may differ between two starts of one run: they change no bit of its result up to there.
FREE_KEYS = (
    "cluster.",
    "serve.",
    "metrics.",
    "run_dir",
    "kernels",
    "determinism",
    "data.path",
    "data.mixture",
    "data.verify",
    "optim.",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.restore_from",
    "train.eval_every",
    "train.eval_batches",
    "train.dtype",
    "train.recompute",
    "train.spike",
)


ORIGIN = "origin.json"
MOST_UNWRITTEN = 100_000
"""Lines that wait for a disk that is full; the oldest go first."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a run began with.

    Args:
        checkpoint: its folder.
        step: that it is of.
        begin: step that the run goes on from; 0 for one that took the weights alone.
    """

    checkpoint: str
    step: int
    begin: int


class RunFolder:
    """Reads and writes one run's folder.

    Args:
        path: the folder; created by `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.events = path / "events.jsonl"
        self.journal = path / "journal.sqlite"
        self.checkpoints = path / "checkpoints"
        self.identity = path / "identity"
        self.report = path / "report"
        self.machines = path / "machines.json"
        self.targets = path / "prometheus_targets.json"
        self._unwritten: deque[tuple[Path, str]] = deque(maxlen=MOST_UNWRITTEN)
        self._is_told = False

    def check(self, config: RunConfig) -> None:
        """Refuse a folder that belongs to another configuration; changes nothing.

        Raises:
            ConfigError: naming the keys that differ, or that the folder is no run's.
        """
        if not self.config.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise ConfigError(f"run_dir={self.path} is not empty and not a run; give a new folder")
            return
        old, new = self._recorded(), flat(to_dict(config))
        differing = [k for k in sorted(old | new) if old.get(k) != new.get(k) and not k.startswith(FREE_KEYS)]
        if differing:
            shown = ", ".join(
                f"{key} ({old.get(key)!r} there, {new.get(key)!r} here)" for key in differing[:5]
            )
            raise ConfigError(
                f"run_dir={self.path} belongs to another configuration: {shown}; these cannot change while a run goes on "
                f"(optim.*, train.steps, evaluation, checkpoints and cluster can): use the values of its config.yaml, or "
                "another run_dir"
            )

    def changes(self, config: RunConfig) -> list[str]:
        """What of a run's result will differ from here on, as "key old -> new"."""
        if not self.config.exists():
            return []
        old, new = self._recorded(), flat(to_dict(config))
        return [
            f"{key} {old.get(key)!r} -> {new[key]!r}"
            for key in sorted(new)
            if key.startswith(("optim.", "train.", "data.mixture")) and old.get(key) != new[key]
        ]

    def _recorded(self) -> dict[str, Any]:
        """The run's configuration by dotted key, also one whose values would be refused today."""
        try:
            content = yaml.safe_load(self.config.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{self.config} cannot be read ({' '.join(str(error).split())}); restore it, or give another run_dir"
            ) from None
        if not isinstance(content, dict):
            raise ConfigError(f"{self.config} holds no configuration; restore it, or give another run_dir")
        # What a later version added has its default.
        return flat(to_dict(RunConfig())) | flat(content)

    def recorded_config(self) -> RunConfig:
        """The configuration that the run was started with.

        Raises:
            ConfigError: it cannot be read.
        """
        return from_dict(RunConfig, yaml.safe_load(self.config.read_text()))

    def check_identity(self, layout: DSELayout | None) -> None:
        """Refuse data that would address the table rows in another way than the run's; changes nothing.

        Raises:
            IdentityError: the run was started with another DSE identity.
        """
        if layout is not None and self.identity.exists() and self.layout_sha256() != layout.sha256:
            raise IdentityError(
                f"{self.identity} holds another DSE identity than this data and configuration give: "
                "the table rows would be addressed wrongly; use the data that the run was started with"
            )

    def check_checkpoint(self, config: RunConfig, layout: DSELayout | None) -> Path | None:
        """Return the newest finished checkpoint once it is sure that this run can go on from it.

        Args:
            config: of the run.
            layout: DSE identity; None for a model without memory.

        Raises:
            CheckpointError: it is damaged, or of another model.
            IdentityError: its rows are addressed in another way.
        """
        newest = self.newest_checkpoint()
        if newest is None:
            return None
        manifest, cure = checkpoint.read_manifest(newest), f"remove {newest} to use the one before"
        if manifest["step"] != int(newest.name.removeprefix("step_")):
            raise CheckpointError(f"{newest} holds step {manifest['step']}: it was renamed; {cure}")
        # What a later version added has its default.
        old = flat(to_dict(RunConfig())["model"]) | flat(manifest["config"]["model"])
        new = flat(to_dict(config)["model"])
        differing = [f"model.{key}" for key in sorted(old | new) if old.get(key) != new.get(key)]
        if differing:
            raise CheckpointError(f"{newest} is of another model ({', '.join(differing[:5])} differ); {cure}")
        if layout is not None and manifest["dse_layout_sha256"] != layout.sha256:
            raise IdentityError(f"{newest} addresses its table rows by another DSE identity; {cure}")
        return newest

    def origin(self) -> Origin | None:
        """Where the run's weights came from; None for a seed."""
        path = self.identity / ORIGIN
        return Origin(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def open(
        self, config: RunConfig, layout: DSELayout | None, tokenizer: Path, origin: Origin | None = None
    ) -> None:
        """Create what is missing; the identity (DSE layout, tokenizer) is written once and checked ever after.

        Args:
            config: of the run.
            layout: DSE identity; None for a model without memory.
            tokenizer: file of the data's tokenizer.
            origin: where a new run's weights come from; None for a seed.
        """
        for path in (self.path, self.checkpoints, self.report):
            path.mkdir(parents=True, exist_ok=True)
        if not (self.identity / "tokenizer.json").exists():
            unfinished = self.path / "identity.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            shutil.copyfile(tokenizer, unfinished / "tokenizer.json")
            shutil.copyfile(tokenizer.with_name("manifest.json"), unfinished / "data_manifest.json")
            if layout is not None:
                layout.save(unfinished)
            if origin is not None:
                for given in (Path(origin.checkpoint) / name for name in HANDED_ON):
                    if given.is_file():
                        shutil.copyfile(given, unfinished / given.name)
                (unfinished / ORIGIN).write_text(json.dumps(asdict(origin), indent=1), encoding="utf-8")
            os.rename(unfinished, self.identity)
        self.check_identity(layout)
        self._write_tokenizer_config(tokenizer, config, origin)
        if not self.config.exists() or self.changes(config):
            save_yaml(config, self.path / "config.tmp")
            os.replace(self.path / "config.tmp", self.config)

    def _write_tokenizer_config(self, tokenizer: Path, config: RunConfig, origin: Origin | None) -> None:
        """Tell other tools what tokenizer.json does not say: which token ends a text, and how long one may be.

        Args:
            tokenizer: file of the data's tokenizer.
            config: of the run.
            origin: what the run began with; the rest of what that says of its tokenizer, a chat template among it, stays.
        """
        target = self.identity / TOKENIZER_CONFIG
        beside = (Path(origin.checkpoint) if origin else tokenizer.parent) / TOKENIZER_CONFIG
        if target.exists():
            return
        manifest = json.loads(tokenizer.with_name("manifest.json").read_text(encoding="utf-8"))
        stated = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        content = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **stated,
            "eos_token": manifest["tokenizer"]["eos_token"],
            "model_max_length": config.model.max_seq_len,
        }
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, target)

    def check_data(self, data: Path) -> None:
        """Refuse to go on with other token shards than the run was started with; changes nothing.

        Raises:
            ConfigError: the SHA-256 of a shard differs.
        """
        started = self.identity / "data_manifest.json"
        if started.exists() and _shards(started) != _shards(data / "manifest.json"):
            raise ConfigError(
                f"data.path={data} holds other token shards than run_dir={self.path} was started with; "
                "give the same data, or another run_dir"
            )

    def layout_sha256(self) -> str:
        """SHA-256 of the run's DSE identity, empty without memory layers."""
        has_layout = (self.identity / "dse_layout.json").exists()
        return DSELayout.load(self.identity).sha256 if has_layout else ""

    def copy_identity(self, directory: Path) -> None:
        """Put tokenizer and DSE identity beside a checkpoint's tensors."""
        for path in self.identity.iterdir():
            shutil.copyfile(path, directory / path.name)

    def newest_checkpoint(self) -> Path | None:
        """The newest finished checkpoint, its files checked for length."""
        found = checkpoint.list_finished(self.checkpoints)
        if not found:
            return None
        checkpoint.check_files(found[-1], checkpoint.read_manifest(found[-1]))
        return found[-1]

    def rewind(self, step: int) -> None:
        """Drop the records of steps after `step`, so that each step stands in the files once."""
        for path in (self.metrics, self.evaluations):
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(line + "\n" for line in kept))
                os.replace(temporary, path)

    def append(self, record: dict[str, Any]) -> None:
        """Add one step's record; floats are written so that they read back exactly."""
        self._append(self.metrics, record)

    def append_evaluation(self, record: dict[str, Any]) -> None:
        """Add one validation's record."""
        self._append(self.evaluations, record)

    def append_event(self, event: dict[str, Any]) -> None:
        """Add one event: a loss, a recovery, a resize; they are never dropped, not even by `rewind`."""
        self._append(self.events, event)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        """Add a line; where that fails it is kept, whole, and written before the next one."""
        self._unwritten.append((path, json.dumps(record) + "\n"))
        while self._unwritten:
            path, line = self._unwritten[0]
            try:
                _write_whole(path, line)
            except OSError as error:
                if not self._is_told:
                    log.error("%s cannot be written, its lines wait: %s", path, error)
                self._is_told = True
                return
            self._unwritten.popleft()
        self._is_told = False

    def records(self) -> list[dict[str, Any]]:
        """All steps' records; a last line cut short by a kill does not count."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines() if _step_of(line) < _CUT]

    def event_lines(self) -> list[dict[str, Any]]:
        """What happened to the run, in order of time; lines cut short by a kill do not count.

        Each has "time" (Unix seconds), "step", "generation", "kind" ("start", "lost", "recovered", "resized",
        "rebalanced", "restored", "checkpoint" or "scheduler"), "text", and the number of slots in each role:
        "attention", "experts", "memory", "standby".
        """
        if not self.events.exists():
            return []
        lines = self.events.read_text().splitlines()
        return sorted((json.loads(line) for line in lines if _step_of(line) < _CUT), key=lambda e: e["time"])


def _write_whole(path: Path, line: str) -> None:
    """Append a line, or nothing of it."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            content = line.encode()
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def _shards(manifest: Path) -> list[str]:
    try:
        return sorted(entry["sha256"] for entry in json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{manifest} cannot be read ({' '.join(str(error).split())}); restore it, or give another run_dir"
        ) from None


_CUT = 1 << 62


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return _CUT


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary of dotted keys.

    Args:
        value: plain values by key.
        prefix: put before every key.
    """
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return found
