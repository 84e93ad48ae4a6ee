"""What the parts of benchmarks/serving.py share: servers, streams, what undisturbed ones gave, and the table's lines."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.elastic_parts import Row
from benchmarks.serving_load import Load, Seen, compare
from benchmarks.serving_run import Server

WIDE = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2, "standby": 1}
NARROW = {"attention_workers": 1, "expert_shards": 1, "memory_shards": 1, "replication": 1, "standby": 1}


@dataclass(kw_only=True)
class Bench:
    """What the parts share.

    Args:
        checkpoint: to serve.
        streams: at once; twice as many where engines are killed.
        tokens: of each stream.
        repeats: kills of an engine.
        minutes: of the parts with a kill every ten seconds, and with a constant load.
        cycles: changes of plan in the soak.
        source: all choices of victims come from here.
    """

    checkpoint: Path
    streams: int
    tokens: int
    repeats: int
    minutes: float
    cycles: int
    source: random.Random
    rows: list[Row] = field(default_factory=list)
    expected: dict[int, list[int]] = field(default_factory=dict)

    def server(self, *options: str, **roles: int) -> Server:
        """Start a server of the usual shape.

        Args:
            options: further ones of the command.
            roles: other numbers of slots.
        """
        shape = [f"--cluster.{name}={value}" for name, value in {**WIDE, **roles}.items()]
        usual = ("--serve.max_waiting", "1024", "--serve.drain_s", "30")
        return Server(self.checkpoint, *shape, *usual, *options)

    def load(self, server: Server, at: Mapping[int, Callable[[], object]] | None = None) -> Load:
        """Streams to a server.

        Args:
            server: it.
            at: what happens at which token.
        """
        return Load(port=server.port, max_tokens=self.tokens, at=at or {})

    def undisturbed(self, server: Server, streams: int) -> Seen:
        """Answer the streams once without any fault, after a turn that warms the server.

        Args:
            server: it.
            streams: at once.
        """
        self.load(server).ask(range(streams))
        answers = self.load(server).ask(range(streams))
        self.expected |= {answer.seed: answer.tokens for answer in answers}
        return compare(answers, self.expected)

    def kept(
        self, server: Server, seconds: float, at: Mapping[int, Callable[[], object]] | None = None
    ) -> Seen:
        """Keep the streams open for a while.

        Args:
            server: it.
            seconds: after which none begins.
            at: what happens at which token.
        """
        load = self.load(server, at)
        return compare(load.keep(self.streams, range(self.streams), seconds), self.expected)

    def add(self, part: str, what: str, seen: Seen, plain: Seen, limit_s: float) -> None:
        """Take a line and show it at once.

        Args:
            part, what: of the table.
            seen, plain: with and without the fault.
            limit_s: that the gap must keep.
        """
        gap_s = seen.worst_gap_s - plain.worst_gap_s
        measured = (
            f"{seen.failed} of {seen.streams} failed, {seen.other} with other tokens; worst gap {1000 * gap_s:.0f} ms "
            f"beyond {1000 * plain.worst_gap_s:.0f} ms{'; ' + seen.why if seen.why else ''}"
        )
        is_met = not seen.failed and not seen.other and gap_s <= limit_s
        self.line(part, what, measured, f"0, 0, {1000 * limit_s:.0f} ms", is_met)

    def line(self, part: str, what: str, measured: str, target: str = "", is_met: bool | None = None) -> None:
        """Take a line and show it at once.

        Args:
            part, what, measured, target: of the table.
            is_met: whether the target is; None where there is none.
        """
        verdict = {True: "met", False: "NOT MET", None: ""}[is_met]
        print(f"[{part}] {what}: {measured} {verdict}", flush=True)
        self.rows.append(Row(part=part, what=what, measured=measured, target=target, is_met=is_met))
