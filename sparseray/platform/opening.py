"""What a run begins with, opened and checked before anything is started or written.

`open_training` reads configuration, data and run folder; `open_serving` a checkpoint. What either lets
through, the cluster can start; all that a user can have got wrong is said here, as one line.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from sparseray.actors.training.mixture import Mixture
from sparseray.actors.training.token_data import TokenDataset
from sparseray.actors.training.tokenizer_file import load_tokenizer
from sparseray.errors import CheckpointError, ConfigError, IdentityError
from sparseray.model.config import ModelConfig, MTPConfig
from sparseray.model.dse_layout import DSELayout
from sparseray.platform import config as configuration
from sparseray.platform.checks import check_cluster, check_folder, check_start
from sparseray.platform.config import ClusterConfig, RunConfig, ServeConfig
from sparseray.platform.device import is_whole, resolve_device, resolve_serving_device, spreads_experts
from sparseray.platform.planning.inventory import Inventory, num_slots
from sparseray.platform.run import checkpoint
from sparseray.platform.run.folder import Origin, RunFolder, flat
from sparseray.platform.run.journal import Journal, set_aside_if_damaged

OF_THE_RUN = (
    "max_seq_len", "rope.", "rope_theta", "init_std", "moe.bias_update", "moe.balance_loss", "dse.document_end_id",
    "mtp.loss_weight", "mtp.later_loss_weight", "mtp.later_from",
)  # fmt: skip
"""Keys of the model that a run may change of what it begins with."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How the validation loss is measured.

    Args:
        batches: of one validation.
        bytes_per_token: of the split, for bits per byte.
    """

    batches: int
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """Everything that a training run begins with.

    Args:
        config: of the run, with what follows from the data; paths are absolute.
        folder: of the run, not written yet.
        train: its tokens.
        validation: how they are measured.
        layout: DSE identity, None for a model without memory.
        newest: checkpoint to go on from.
        origin: what the run began with, or begins with now; None for a seed.
    """

    config: RunConfig
    folder: RunFolder
    train: TokenDataset
    validation: Validation
    layout: DSELayout | None
    newest: Path | None
    origin: Origin | None = None

    def create_folder(self) -> list[str]:
        """Write what the run folder lacks, and what has changed since the run began.

        Returns:
            what a person should know of it.
        """
        changed = self.folder.changes(self.config)
        tokenizer = Path(self.config.data.path) / "tokenizer.json"
        self.folder.open(self.config, self.layout, tokenizer, self.origin)
        said = []
        if aside := set_aside_if_damaged(self.folder.journal):
            where = f"going on from {self.newest}, which is whole" if self.newest else "starting anew"
            said.append(f"{self.folder.journal} was damaged and is kept as {aside}; {where}")
        if changed:
            step = int(self.newest.name.removeprefix("step_")) if self.newest else 0
            journal = Journal(self.folder.journal)
            journal.lead()
            journal.append("settings", generation=0, step=step, changed=changed)
            journal.close()
            said.append(f"changed since the run began: {', '.join(changed)}")
        return said


def check_origin(config: RunConfig, layout: DSELayout | None) -> Origin:
    """See that a run can begin with `init_from`, and say where it goes on from.

    Args:
        config: of the run.
        layout: its DSE identity; None for a model without memory.

    Raises:
        CheckpointError: it is damaged, of another model, or lacks what is asked for.
        IdentityError: its tokens or rows are others.
        ConfigError: the run would have no step to make.
    """
    origin = Path(config.init_from)
    manifest = checkpoint.read_manifest(origin)
    checkpoint.check_files(origin, manifest)
    found = configuration.from_dict(RunConfig, manifest["config"])
    old, new = (flat(configuration.to_dict(one)["model"]) for one in (found, config))
    free = (*OF_THE_RUN, "vocab_size") if old["vocab_size"] < new["vocab_size"] else OF_THE_RUN
    differing = [k for k in sorted(new) if old.get(k) != new[k] and not k.startswith(free)]
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"init_from={origin} is of another model: model.{key} is {old.get(key)!r} there and {new[key]!r} here"
            f" ({len(differing)} keys differ); take the model of its configuration"
        )
    if layout is not None and manifest["dse_layout_sha256"] != layout.sha256:
        raise IdentityError(
            f"init_from={origin} addresses its table rows by another DSE identity; use its data"
        )
    tokenizers = [origin / "tokenizer.json", Path(config.data.path) / "tokenizer.json"]
    vocabularies = [load_tokenizer(path).get_vocab() for path in tokenizers]
    if not vocabularies[0].items() <= vocabularies[1].items():
        raise IdentityError(
            f"init_from={origin} has another tokenizer than data.path={config.data.path}; prepare the data with"
            f" --tokenizer {tokenizers[0]}"
        )
    if config.init_state == "weights":
        return Origin(checkpoint=str(origin), step=manifest["step"], begin=0)
    if not any("@" in name for name in manifest["tensors"]):
        raise CheckpointError(
            f"init_from={origin} holds weights alone, and init_state=optimizer wants moments; use --init_state weights"
        )
    if manifest["step"] >= config.train.steps:
        raise ConfigError(
            f"init_from={origin} is of step {manifest['step']}, and train.steps={config.train.steps} ends before; set "
            f"train.steps to {manifest['step'] + config.train.steps}"
        )
    return Origin(checkpoint=str(origin), step=manifest["step"], begin=manifest["step"])


def training_inventory(config: RunConfig) -> Inventory:
    """What a training run has to place."""
    return Inventory.of(config.model, parts=config.train.logical_shards)


def serving_inventory(config: RunConfig) -> Inventory:
    """What a server has to place: engines share nothing, whatever the run's logical shards were.

    On devices each of them holds everything, unless experts are to lie on several.
    """
    in_slabs = is_whole(config)
    return Inventory.of(
        config.model, parts=0, is_whole=in_slabs and not spreads_experts(config), in_slabs=in_slabs
    )


def slots_of(config: RunConfig, inventory: Inventory) -> int:
    """Slots to start with: those with roles, and the standby ones.

    Args:
        config: of the run.
        inventory: what there is to place.
    """
    roles = inventory.roles(config.cluster)
    return num_slots(roles, colocated=config.cluster.colocated) + config.cluster.standby


def open_training(config: RunConfig) -> TrainingInputs:
    """Check configuration, data and run folder of a run.

    Raises:
        UserError: something does not fit; nothing was written.
    """
    check_cluster(config.cluster, training_inventory(config))
    config = resolve_device(config)
    check_start(config.cluster)
    check_folder(Path(config.run_dir), "run_dir")
    data = open_data(config)
    config = resolve(config, data["train"])
    config = replace(
        config,
        run_dir=str(Path(config.run_dir).absolute()),
        data=replace(config.data, path=str(Path(config.data.path).absolute())),
        init_from=str(Path(config.init_from).absolute()) if config.init_from else "",
    )
    layout = build_layout(config.model, data["train"])
    folder = RunFolder(Path(config.run_dir))
    folder.check(config)
    folder.check_identity(layout)
    folder.check_data(Path(config.data.path))
    newest = folder.check_checkpoint(config, layout)
    is_new = config.init_from and newest is None
    origin = check_origin(config, layout) if is_new else folder.origin()
    windows = data["validation"].num_windows(config.train.seq_len)
    validation = Validation(
        batches=_validation_batches(windows, config), bytes_per_token=data["validation"].bytes_per_token
    )
    return TrainingInputs(
        config=config,
        folder=folder,
        train=data["train"],
        validation=validation,
        layout=layout,
        newest=newest,
        origin=origin,
    )


def open_data(config: RunConfig) -> dict[str, TokenDataset]:
    """Open both splits, verified, and see that the model's vocabulary holds their tokens."""
    if not config.data.path:
        raise ConfigError(
            "data.path is not set; give --data.path a folder made by `python -m sparseray data prepare --source stdlib --out DIR`"
        )
    data = {
        split: TokenDataset(Path(config.data.path), split, verify=config.data.verify)
        for split in ("train", "validation")
    }
    if data["train"].vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {data['train'].vocab_size} tokens of "
            f"{config.data.path}; set model.vocab_size to at least that"
        )
    if config.train.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={config.train.seq_len} exceeds model.max_seq_len={config.model.max_seq_len}; lower the first"
        )
    if config.train.seq_len <= config.model.mtp.depth:
        raise ConfigError(
            f"train.seq_len={config.train.seq_len} must exceed model.mtp.depth={config.model.mtp.depth}: the last module has"
            " no token to predict; lower the second"
        )
    return data


def resolve(config: RunConfig, data: TokenDataset) -> RunConfig:
    """Fill in what follows from the data: the token that ends a document, which serving must know too, and the mixture.

    Args:
        config: of the run.
        data: its training split.

    Raises:
        ConfigError: the mixture names other sources than the data has.
    """
    dse = replace(config.model.dse, document_end_id=data.eos_id)
    mixture = config.data.mixture or _prepared_mixture(data)
    for name in Mixture.parse(mixture).names if mixture else ():
        if name not in data.sources:
            has = f"named sources {', '.join(data.sources)}" if data.sources else "no named sources"
            raise ConfigError(
                f"data.mixture names {name!r}, and {data.folder} has {has}; name those, or prepare the data with "
                f"--source {name}=DIR"
            )
        data.num_windows(config.train.seq_len, name)
    found = replace(config.data, mixture=mixture)
    return replace(config, model=replace(config.model, dse=dse), data=found)


def _prepared_mixture(data: TokenDataset) -> tuple[str, ...]:
    """The mixture that data was prepared with: by weights, or by numbers of tokens; empty without named sources."""
    weights = {one.name: one.weight for one in data.manifest.sources if one.name in data.sources}
    sizes = {name: stop - start for name, (start, stop) in data.sources.items()}
    words = [f"{name}={weights.get(name) or size!r}" for name, size in sizes.items()]
    return (" ".join(words),) if words else ()


def build_layout(model: ModelConfig, data: TokenDataset) -> DSELayout | None:
    """Build the DSE identity from the data's tokenizer; None for a model without memory.

    Args:
        model: its configuration.
        data: whose tokenizer counts.
    """
    return (
        DSELayout.build(model.dse, data.tokenizer(), vocab_size=model.vocab_size)
        if model.dse.layers
        else None
    )


def _validation_batches(windows: int, config: RunConfig) -> int:
    """Validation batches that a split of `windows` sequences can give.

    Raises:
        ConfigError: not even one.
    """
    per_batch = config.train.sequences_per_shard
    if windows < per_batch:
        raise ConfigError(
            f"the validation split has {windows} sequences of {config.train.seq_len} tokens and a batch takes {per_batch}; "
            "prepare more data, or lower train.seq_len or train.sequences_per_shard"
        )
    return min(config.train.eval_batches, windows // per_batch)


def open_serving(directory: Path, serve: ServeConfig, cluster: ClusterConfig) -> RunConfig:
    """Read a checkpoint's configuration, and check what is beside it and where it shall be served.

    Args:
        directory: of the checkpoint.
        serve, cluster: of the server; they replace those of the run.

    Raises:
        CheckpointError: damaged or incomplete.
        IdentityError: its DSE layout is not the one it was trained with.
        ConfigError: placement or lengths do not fit the model.
    """
    manifest = checkpoint.read_manifest(directory)
    checkpoint.check_files(directory, manifest)
    config = configuration.from_dict(RunConfig, manifest["config"])
    if config.model.dse.layers:
        found = DSELayout.load(directory).sha256
        if found != manifest["dse_layout_sha256"]:
            raise IdentityError(
                f"{directory} holds DSE layout {found[:12]}, and its tensors were trained with "
                f"{manifest['dse_layout_sha256'][:12]}: every row would be addressed wrongly; use the original folder"
            )
    return _open_served(directory, replace(config, serve=serve, cluster=cluster))


def open_followed(folder: RunFolder, serve: ServeConfig, cluster: ClusterConfig) -> RunConfig:
    """Read the configuration of a run that trains and has no checkpoint yet, and check where it shall be served.

    Args:
        folder: of the run.
        serve, cluster: of the server; they replace those of the run.

    Raises:
        UserError: as `open_serving`.
    """
    config = folder.recorded_config()
    return _open_served(folder.identity, replace(config, serve=serve, cluster=cluster))


def _open_served(identity: Path, config: RunConfig) -> RunConfig:
    """Check what a server needs besides weights, and say on what device it runs."""
    serve, directory = config.serve, identity
    if serve.max_model_len > config.model.max_seq_len:
        raise ConfigError(
            f"serve.max_model_len={serve.max_model_len} exceeds the model's {config.model.max_seq_len} tokens"
            f" ({directory}: model.max_seq_len); leave it out, or give at most that"
        )
    if not (directory / "tokenizer.json").exists():
        raise CheckpointError(f"{directory} has no tokenizer.json; use a whole checkpoint folder")
    config = replace(config, model=_with_drafting(config, directory))
    config = resolve_serving_device(config)
    check_cluster(config.cluster, serving_inventory(config))
    check_start(config.cluster)
    if serve.speculate == "mtp":
        check_drafting(config)
    return config


def check_drafting(config: RunConfig) -> None:
    """See that the device can judge drafts.

    Raises:
        ConfigError: it cannot.
    """
    if config.cluster.device == "cpu" and config.kernels != "auto":
        raise ConfigError(
            "serve.speculate=mtp: on a CPU drafts are judged by its compiled operations alone, not with kernels="
            f"{config.kernels}; leave it at none, or set kernels=auto"
        )


def _with_drafting(config: RunConfig, directory: Path) -> ModelConfig:
    """The model that is served: without its modules for further tokens where nothing is drafted."""
    if config.serve.speculate == "none":
        return replace(config.model, mtp=MTPConfig())
    if not config.model.mtp.depth:
        raise ConfigError(
            f"serve.speculate=mtp: {directory} has no modules that predict further tokens (model.mtp.depth=0); leave it"
            " at none"
        )
    return config.model
