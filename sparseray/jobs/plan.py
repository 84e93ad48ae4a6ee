"""The `plan` command: who would hold what in a run, or holds it in a job that goes on, and how many bytes that is.

Reads the same options as `pretrain` and makes the same plan of generation 1 from them. Without
`data.path` it answers from the configuration alone. With the name of a job it shows that one's plan; it starts nothing.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparseray.errors import ConfigError, SchedulerLostError, UserError
from sparseray.jobs.output import print_line
from sparseray.jobs.running import connect
from sparseray.platform import config as configuration
from sparseray.platform.config import RunConfig
from sparseray.platform.planning.replan import Piece, holdings, piece_bytes

if TYPE_CHECKING:
    from sparseray.actors.state.assignment import Plan

DESCRIPTION = """Show who would hold what in a run: roles, experts, memory and bytes of every slot. Starts nothing.

example:
  python -m sparseray plan --config configs/tiny.yaml --cluster.attention_workers 2 \\
      --cluster.expert_shards 2 --cluster.memory_shards 2 --cluster.replication 2
  python -m sparseray plan runs/first
"""
COLUMNS = (
    "slot",
    "roles",
    "logical shards",
    "experts",
    "backup experts",
    "buckets",
    "backup buckets",
    "bytes",
)
LEFT_ALIGNED = 3
"""The first columns are text; numbers are aligned to the right."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one slot holds.

    Args:
        slot: its id.
        roles: for people to read.
        shards: logical shards that it runs.
        experts, buckets: pieces that it answers for.
        expert_backups, bucket_backups: pieces of which it only keeps a copy.
        num_bytes: weights and optimizer state.
    """

    slot: int
    roles: tuple[str, ...]
    shards: tuple[int, ...]
    experts: int
    expert_backups: int
    buckets: int
    bucket_backups: int
    num_bytes: int


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, 2 for a user's mistake, 1 when a job does not answer."""
    try:
        if len(arguments) == 1 and not arguments[0].startswith("-"):
            return show_job(arguments[0], print_line)
        config = configuration.parse(arguments, prog="sparseray plan", description=DESCRIPTION)
        return run(config, print_line)
    except UserError as error:
        return configuration.die(error)
    except SchedulerLostError as error:
        configuration.die(error)
        return 1


def show_job(job: str, show: Callable[[str], None]) -> int:
    """Show the plan in force of a job that goes on.

    Raises:
        UserError: there is no such job, or it has no plan yet.
    """
    scheduler = connect(job)
    from sparseray.actors.state.assignment import Plan
    from sparseray.actors.wire.codec import from_plain
    from sparseray.model.counts import count_parameters
    from sparseray.platform.cluster import ask

    found = ask(scheduler, "plan")
    if found is None:
        raise ConfigError(f"{job} has no plan yet; ask again once its slots have started")
    config = configuration.from_dict(RunConfig, found["config"])
    plan = from_plain(Plan, found["plan"])
    size = piece_bytes(
        config.model, table_rows(config), count_parameters(config.model)["dense"], config.optim.moments
    )
    show(f"generation {plan.generation}")
    _show_shares([share(plan, slot, size) for slot in sorted(plan.addresses)], show)
    return 0


def run(config: RunConfig, show: Callable[[str], None]) -> int:
    """Show the plan of a run's first generation.

    Raises:
        UserError: configuration or data do not fit.
    """
    from sparseray.model.counts import count_parameters
    from sparseray.platform.checks import check_cluster
    from sparseray.platform.device import choose_device
    from sparseray.platform.opening import build_layout, open_data, resolve, training_inventory

    config, _ = choose_device(config)
    plan = check_cluster(config.cluster, training_inventory(config))
    data_line = "data: none given (--data.path); nothing was checked against a vocabulary"
    if config.data.path:
        train = open_data(config)["train"]
        config = resolve(config, train)
        build_layout(config.model, train)
        passes = config.train.steps * tokens_per_step(config) / train.num_tokens
        data_line = (
            f"data: {train.num_tokens:,} tokens, seen {passes:.2f} times in {config.train.steps:,} steps"
        )
    parameters = count_parameters(config.model)
    size = piece_bytes(config.model, table_rows(config), parameters["dense"], config.optim.moments)
    shares = [share(plan, slot, size) for slot in sorted(plan.addresses)]
    _show_shares(shares, show)
    once = sum(map(size, holdings(plan)))
    held = sum(s.num_bytes for s in shares)
    show("")
    show(
        f"parameters: {parameters['total']:,} in all, {parameters['active']:,} active for a token "
        f"(dense {parameters['dense']:,}, experts {parameters['experts']:,}, memory {parameters['memory']:,})"
    )
    show(
        f"bytes: {human(once)} of weights and optimizer state, {human(held)} with all copies; "
        f"replication {config.cluster.replication}, activations not counted"
    )
    _show_devices(config, show)
    show(
        f"step: {tokens_per_step(config):,} tokens in {config.train.logical_shards} logical shards of "
        f"{config.train.sequences_per_shard} x {config.train.seq_len}"
    )
    if config.cluster.device == "cuda":
        show(_step_times(config))
    show(data_line)
    show(
        f"slots: {len(shares)}{' that share roles' if config.cluster.colocated else ''}, "
        f"{len(shares) * config.cluster.cpus_per_slot:g} CPUs"
    )
    return 0


def _show_devices(config: RunConfig, show: Callable[[str], None]) -> None:
    """What the run takes of its devices, and of the host for a checkpoint; what a server of its checkpoints takes of a GPU."""
    from sparseray.platform.device import (
        describe,
        describe_serving,
        host_bytes,
        is_whole,
        saves_beside,
    )
    from sparseray.platform.planning.device_memory import GIB, device_memory, serving_memory, snapshot_bytes

    if is_whole(config):
        memory, copied = device_memory(config), snapshot_bytes(config)
        show(f"on the device: about {memory.total / GIB:.1f} GiB ({describe(memory)})")
        when = (
            "beside the next steps"
            if saves_beside(config)
            else "while training waits, as the copy is too large"
        )
        show(
            f"on the host: a checkpoint's copy takes {copied / GIB:.1f} of this machine's {host_bytes() / GIB:.0f} GiB; it is"
            f" written {when}"
        )
        fast = device_memory(replace(config, determinism="fast"))
        show(_of_determinism(config, (memory.total - fast.total) / GIB))
    longest = config.serve.max_model_len or config.model.max_seq_len
    show(
        f"served from a GPU: {describe_serving(serving_memory(config))}; {config.serve.max_batch} requests at once of at"
        f" most {longest:,} tokens"
    )


def _of_determinism(config: RunConfig, gib: float) -> str:
    """What `determinism: fast` gains a run: memory of sums over parts, and a faster pass of attention."""
    if config.determinism == "fast":
        return "determinism: fast, the bits of a second run may differ; bitwise keeps them"
    gains = [f"{gib:.1f} GiB less for sums over parts"] if gib > 0 else []
    if set(config.model.attention) & {"full", "mla"}:
        gains.append("cuDNN's backward pass of full and latent attention, which has no fixed order")
    return f"determinism: bitwise; fast would gain {' and '.join(gains) or 'nothing'}"


def _step_times(config: RunConfig) -> str:
    """What a step would take with each placement of as many GPUs, the best one first."""
    from sparseray.platform.planning.device_memory import num_devices
    from sparseray.platform.planning.step_time import placements, step_seconds

    gpus = num_devices(config)
    found = sorted(
        (step_seconds(config, each), str(each)) for each in placements(gpus, config.train.logical_shards)
    )
    each = ", ".join(f"{name}: {seconds * 1e3:.0f} ms" for seconds, name in found)
    return f"time: about {each} (attention + experts, {gpus} GPUs of one host); best: {found[0][1]}"


def _show_shares(shares: Sequence[Share], show: Callable[[str], None]) -> None:
    if sys.stdout.isatty():
        _show_rich(shares)
    else:
        for line in plain_table(shares):
            show(line)


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of a global batch."""
    return config.train.logical_shards * config.train.sequences_per_shard * config.train.seq_len


def table_rows(config: RunConfig) -> list[int]:
    """Rows of every memory layer's table, as `DSELayout.num_rows` counts them, without a tokenizer."""
    from sparseray.model.dse_layout import draw_primes

    return [sum(map(sum, layer)) for layer in draw_primes(config.model.dse)]


def share(plan: "Plan", slot: int, size: Callable[[Piece], int]) -> Share:
    """Count what a slot holds."""
    held = {piece: holders for piece, holders in holdings(plan).items() if slot in holders}

    def count(kind: str, *, primary: bool) -> int:
        return sum(piece[0] == kind and (holders[0] == slot) == primary for piece, holders in held.items())

    return Share(
        slot=slot,
        roles=tuple(plan.roles_of(slot)),
        shards=tuple(plan.parts_of(slot)),
        experts=count("expert", primary=True),
        expert_backups=count("expert", primary=False),
        buckets=count("bucket", primary=True),
        bucket_backups=count("bucket", primary=False),
        num_bytes=sum(map(size, held)),
    )


def cells(shares: Sequence[Share]) -> list[tuple[str, ...]]:
    """Return the table's rows as text, the totals last."""
    counts = ("experts", "expert_backups", "buckets", "bucket_backups")
    rows = [
        (
            str(s.slot),
            " + ".join(s.roles),
            ranges(s.shards),
            *(str(getattr(s, name) or "-") for name in counts),
            human(s.num_bytes),
        )
        for s in shares
    ]
    sums = [sum(getattr(s, name) for s in shares) for name in counts]
    shards = sum(len(s.shards) for s in shares)
    total = sum(s.num_bytes for s in shares)
    return [*rows, ("all", "", f"{shards} shards", *(str(number or "-") for number in sums), human(total))]


def plain_table(shares: Sequence[Share]) -> list[str]:
    """Return the table as lines without any drawing, for pipes and files."""
    rows = [COLUMNS, *cells(shares)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return [
        "  ".join(
            text.ljust(width) if i < LEFT_ALIGNED else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _show_rich(shares: Sequence[Share]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=(0, 1, 0, 0))
    rows = cells(shares)
    for i, (name, footer) in enumerate(zip(COLUMNS, rows[-1])):
        table.add_column(name, footer, justify="left" if i < LEFT_ALIGNED else "right", overflow="fold")
    for row in rows[:-1]:
        table.add_row(*row)
    Console().print(table)


def ranges(numbers: Sequence[int]) -> str:
    """Return rising numbers in short: "0-3, 6"; "-" for none."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts) or "-"


def human(num_bytes: int) -> str:
    """Return bytes with a decimal unit."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
