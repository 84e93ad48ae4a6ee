"""Mixtures: which source each sequence of the data order comes from, a pure function of its position.

Positions are spread evenly: of the first n, a source of weight w has n*w, rounded down, and the last the rest; so every
step has about the same mixture, each source's windows come in its own order without a gap or a repetition, and nothing
is counted or saved. A mixture may change at given steps. Weights are exact fractions: no rounding, on no machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from sparseray.errors import ConfigError

EXAMPLE = "code=0.6 text=0.4"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Weights of the sources by name, from a step on; none is zero."""

    begin: int
    weights: tuple[tuple[str, Fraction], ...]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Stages in the order of their steps; the first begins at 0."""

    stages: tuple[Stage, ...]

    @staticmethod
    def parse(texts: Sequence[str]) -> "Mixture":
        """Read stages such as "code=0.6 text=0.4" and "code=0.3 text=0.7 from=500".

        Raises:
            ConfigError: a stage that cannot be read, or stages out of order.
        """
        stages = tuple(_stage(text) for text in texts)
        begins = [stage.begin for stage in stages]
        if begins[0] != 0 or begins != sorted(set(begins)):
            raise ConfigError(
                f"data.mixture has stages from steps {begins}; the first begins at 0, without from=, and each later one "
                "after the one before"
            )
        return Mixture(stages=stages)

    @property
    def names(self) -> tuple[str, ...]:
        """All sources, in the order in which they are first named."""
        return tuple(dict.fromkeys(name for stage in self.stages for name, _ in stage.weights))

    def place(self, position: int, per_step: int) -> tuple[str, int]:
        """Return the source of a position, and which of the source's sequences it is, from 0.

        Args:
            position: of the endless data order.
            per_step: sequences of a step.
        """
        stage, before = self._until(position, per_step)
        name, index = _split(position - stage.begin * per_step, stage)
        return name, before.get(name, 0) + index

    def counts(self, step: int, per_step: int) -> dict[str, int]:
        """Sequences of each source in one step; those without any are left out.

        Args:
            step: number of the step.
            per_step: sequences of a step.
        """
        stage, _ = self._until(step * per_step, per_step)
        first = (step - stage.begin) * per_step
        ends = (_shares(first, stage), _shares(first + per_step, stage))
        return {name: ends[1][name] - ends[0][name] for name in ends[1] if ends[1][name] > ends[0][name]}

    def _until(self, position: int, per_step: int) -> tuple[Stage, dict[str, int]]:
        """The stage that a position is in, and the sequences of each source in the stages before it."""
        before: dict[str, int] = {}
        for stage, following in zip(self.stages, (*self.stages[1:], None)):
            if following is None or position < following.begin * per_step:
                return stage, before
            for name, count in _shares((following.begin - stage.begin) * per_step, stage).items():
                before[name] = before.get(name, 0) + count
        raise AssertionError("there is a stage")


def _split(position: int, stage: Stage) -> tuple[str, int]:
    """Source of a position of a stage, and its index there: one source after another takes its share of what is left."""
    rest, total = position, sum((weight for _, weight in stage.weights), Fraction(0))
    for name, weight in stage.weights[:-1]:
        share = weight / total
        index = rest * share // 1
        if (rest + 1) * share // 1 > index:
            return name, int(index)
        rest, total = rest - int(index), total - weight
    return stage.weights[-1][0], rest


def _shares(positions: int, stage: Stage) -> dict[str, int]:
    """How many of a stage's first positions each source has."""
    found, rest = {}, positions
    total = sum((weight for _, weight in stage.weights), Fraction(0))
    for name, weight in stage.weights[:-1]:
        found[name] = int(rest * weight / total // 1)
        rest, total = rest - found[name], total - weight
    found[stage.weights[-1][0]] = rest
    return found


def _stage(text: str) -> Stage:
    weights, begin = {}, 0
    for word in text.split():
        name, _, value = word.partition("=")
        try:
            number = Fraction(value)
        except (ValueError, ZeroDivisionError):
            number = Fraction(-1)
        is_step = name == "from" and number.denominator == 1
        if not name or name in weights or not 0 <= number <= 1 << 40 or (name == "from" and not is_step):
            raise ConfigError(f"data.mixture={text!r}: {word!r} gives a source no weight; write {EXAMPLE!r}")
        if is_step:
            begin = int(number)
        else:
            weights[name] = number
    if not any(weights.values()):
        raise ConfigError(f"data.mixture={text!r} gives no source a weight; write {EXAMPLE!r}")
    return Stage(begin=begin, weights=tuple((name, weight) for name, weight in weights.items() if weight))
