"""Configurations that mean something else than they say: refused with file, line, key, value and what would do."""

import random
import re
from pathlib import Path

import pytest
from processes import ROOT

from sparseray.errors import ConfigError, UserError
from sparseray.model.counts import count_parameters
from sparseray.platform import config as configuration
from sparseray.platform.checks import check_cluster
from sparseray.platform.config import RunConfig, load_yaml, to_dict
from sparseray.platform.opening import training_inventory
from sparseray.platform.planning.schedule import learning_rate
from sparseray.platform.settings import keys_of

CASES = 600
TINY = (ROOT / "configs" / "tiny.yaml").read_text()


def parse(path: Path, *options: str) -> RunConfig:
    return configuration.parse(["--config", str(path), *options], prog="x", description="")


def refused(tmp_path: Path, content: str | bytes, *options: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        parse(path, *options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: {steps: 7}\ndata: {}\ntrain: {seq_len: 64}\n", ["run.yaml:3", "'train'", "line 1", "one place"]),
        ("train:\n  steps: 7\n  seed: 1\n  steps: 8\n", ["run.yaml:4", "'train.steps'", "line 2"]),
        ("train.steps: 7\ntrain:\n  steps: 8\n", ["run.yaml:3", "'train.steps'", "line 1"]),
        ("train:\n  steps: null\n", ["run.yaml:2", "train.steps", "null", "default is 100"]),
        ("train:\n  steps:\n", ["run.yaml:2", "train.steps", "null"]),
        ("train:\n", ["run.yaml:1", "train is a section", "empty", "steps: 100"]),
        ("model:\n  moe: 7\n", ["run.yaml:2", "model.moe is a section", "'7'", "num_experts: 16"]),
        ("model: [1]\n", ["run.yaml:1", "model is a section", "a list"]),
        ("optim:\n  lr: -0.1\n", ["run.yaml:2", "optim.lr=-0.1", "at least 0", "0.002"]),
        ("optim:\n  lr: .nan\n", ["run.yaml:2", "optim.lr=nan", "finite"]),
        ("optim:\n  lr: .inf\n", ["run.yaml:2", "optim.lr=inf", "finite"]),
        ("optim:\n  beta1: 1\n", ["run.yaml:2", "optim.beta1=1.0", "below 1"]),
        ("optim:\n  min_lr_ratio: 1.5\n", ["run.yaml:2", "min_lr_ratio=1.5", "at most 1"]),
        ("cluster:\n  threads_per_slot: 0\n", ["run.yaml:2", "threads_per_slot=0", "at least 1"]),
        ("cluster:\n  hang_s: 0.1\n", ["run.yaml:2", "hang_s=0.1", "at least 0.3"]),
        ("train:\n  steps: true\n", ["run.yaml:2", "train.steps=True", "whole number"]),
        ("train:\n  steps: 1e3\n", ["run.yaml:2", "train.steps=1000.0", "whole number"]),
        ("train:\n  steps: 1_000\n", ["run.yaml:2", "train.steps='1_000'", "whole number"]),
        (f"train:\n  steps: {'9' * 5000}\n", ["run.yaml:2", "train.steps", "whole number"]),
        ("data:\n  verify: yes\n", ["run.yaml:2", "data.verify='yes'", "true or false", "default is true"]),
        ('data:\n  verify: "true"\n', ["run.yaml:2", "data.verify", "true or false"]),
        ("run_dir: 7\n", ["run.yaml:1", "run_dir=7", "quotes"]),
        ("run_dir: ''\n", ["run_dir", "empty"]),
        ('run_dir: "a\\0b"\n', ["run.yaml:1", "run_dir", "NUL"]),
        ("run_dir: $SPARSERAY_NOWHERE/x\n", ["run_dir", "SPARSERAY_NOWHERE", "not set"]),
        ("model:\n  attention: {a: b}\n", ["run.yaml:2", "model.attention", "list"]),
        ("model:\n  dse:\n    layers: [1, x]\n", ["run.yaml:3", "model.dse.layers", "whole number"]),
        ("model:\n  moe: &x\n    <<: *x\n", ["run.yaml"]),
        ("train: {steps: 7}\n---\ntrain: {steps: 8}\n", ["run.yaml", "YAML"]),
        (b"train:\n  steps: 7\nrun_dir: r\xe4ume\n", ["run.yaml:3", "UTF-8"]),
        ("", ["run.yaml", "sections"]),
        ("model:\n  num_heads: 3\n  num_kv_heads: 2\n", ["num_heads=3", "run.yaml:2", "run.yaml:3"]),
    ],
)  # fmt: skip
def test_what_means_something_else_is_refused_with_its_place(
    tmp_path: Path, content: str | bytes, words: list[str]
) -> None:
    line = refused(tmp_path, content)
    assert all(word in line for word in words), line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.steps"], ["--train.steps", "value"]),
        (["--train.steps", "--train.seed=1"], ["--train.steps", "value"]),
        (["--train.steps=1.5"], ["--train.steps=1.5", "whole number"]),
        (["--train=7"], ["--train=7", "section", "steps: 100"]),
        (["--train={steps: 0}"], ["train.steps=0", "at least 1"]),
        (["--data.verify=no"], ["--data.verify=no", "true or false"]),
        (["steps"], ["'steps'", "--NAME VALUE"]),
        (["--run_dir=r\udce4ume"], ["run_dir", "UTF-8"]),
        (["--optim.clip=nan"], ["--optim.clip=nan", "a number"]),
    ],
)
def test_options_are_held_to_the_same_limits(tmp_path: Path, options: list[str], words: list[str]) -> None:
    line = refused(tmp_path, TINY, *options)
    assert all(word in line for word in words), line


def test_what_is_allowed_means_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "räume 1")
    path = tmp_path / "run.yaml"
    path.write_text(
        "\ufeffmodel:\n  attention: nsa\noptim:\n  lr: 1e-3\n  clip: 1\ndata:\n  path: ~/data\nrun_dir: $WHERE/no\n"
    )
    config = parse(path, "--train={steps: 3, seed: 1}", "--cluster.address", "off", "--model.dse.layers=[1]")
    assert config.model.attention == ("nsa",) * 4 and config.model.dse.layers == (1,)
    assert (config.optim.lr, config.optim.clip, type(config.optim.clip)) == (1e-3, 1.0, float)
    assert (config.data.path, config.run_dir) == ("/home/me/data", "räume 1/no")
    assert (config.train.steps, config.train.seed, config.cluster.address) == (3, 1, "off")


def test_every_number_has_a_range_and_a_default_inside_it() -> None:
    numbers = [(name, key) for name, key in keys_of(RunConfig) if key.hint in (int, float)]
    assert len(numbers) > 60
    # Token ids are held against the vocabulary, with which they must fit.
    unlimited = {
        name for name, key in numbers if not key.limits.complaint(-2) or not key.limits.complaint(1e30)
    }
    assert unlimited == {"model.dse.pad_id", "model.dse.document_end_id"}


VALUES = [
    "null", "~", "true", "yes", "off", "0", "1", "-1", "2", "3", "7", "64", "1000000", "99999999999999999999", "0.5", "1.0", "1e-3", "1e999", "-0.1", ".nan", ".inf", "-.inf", "''", "'x'",
    "full", "nsa", "v2", "gshard", "dense", "tcp", "ipc", "float32", "bfloat16", "[]", "[0]", "[1,2]", "[2,3]", "[1,null]", "[[1]]", "{}", "{a:", "1}", "1_0", "0x10", "010", "1:30",
    "2001-01-01", "!!python/object:os.system", "!!int", "x", "*a", "&a", '"\\0"', "ä", "%TAG", "@", "`", "|", ">", "?", "-",
]  # fmt: skip


def mutated(source: random.Random) -> bytes:
    """A configuration around a valid one: some values, keys, lines or bytes are others."""
    lines = TINY.splitlines()
    for _ in range(source.choice((1, 1, 2, 3))):
        index = source.randrange(len(lines))
        what = source.randrange(12)
        if what < 8:
            lines[index] = re.sub(r"(:|-)( .*)?$", rf"\g<1> {_escaped(source.choice(VALUES))}", lines[index])
        elif what == 8:
            lines.insert(source.randrange(len(lines)), lines[index])
        elif what == 9:
            del lines[index]
        elif what == 10:
            lines[index] = " " * source.randrange(5) + lines[index].strip()
        else:
            lines[index] = lines[index].replace(":", source.choice(("s:", " :", "::", ":\t", "")))
    content = bytearray(("\n".join(lines) + "\n").encode())
    if source.random() < 0.1:
        content[source.randrange(len(content))] = source.randrange(256)
    return bytes(content)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\")


def outcome(number: int, path: Path) -> tuple[bool, str]:
    """Try a case: whether a run can begin with it, and what is wrong with how it was taken; "" if nothing is."""
    path.write_bytes(mutated(random.Random(number)))
    try:
        config = parse(path)
        check_cluster(config.cluster, training_inventory(config))
    except UserError as error:
        is_sentence = 10 < len(str(error)) < 1000 and "\n" not in str(error)
        return False, "" if is_sentence else f"no sentence: {error}"
    rates = [learning_rate(step, config.optim, config.train.steps) for step in (1, config.train.steps)]
    if count_parameters(config.model)["total"] < 1 or not all(0.0 <= r <= config.optim.lr for r in rates):
        return True, f"a run that cannot work: {config}"
    configuration.save_yaml(config, path)
    return True, "" if to_dict(load_yaml(path)) == to_dict(config) else f"reads back as another: {config}"


@pytest.mark.parametrize(
    ("first", "cases"), [(0, CASES), pytest.param(CASES, 20_000, marks=pytest.mark.long)], ids=["", "many"]
)
def test_thousands_of_configurations_end_in_a_sentence_or_in_a_run_that_can_work(
    tmp_path: Path, first: int, cases: int
) -> None:
    found = [outcome(number, tmp_path / "run.yaml") for number in range(first, first + cases)]
    assert not [fault for _, fault in found if fault]
    assert cases // 20 < sum(can_begin for can_begin, _ in found) < cases
