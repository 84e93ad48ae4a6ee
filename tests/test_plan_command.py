"""The `plan` command: what it shows is the plan that `pretrain` would start with, and it starts nothing."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sparseray.actors.wire.codec import to_plain
from sparseray.jobs import plan as command
from sparseray.model.buckets import bucket_bounds
from sparseray.model.config import DSEConfig
from sparseray.model.counts import count_parameters
from sparseray.model.presets import preset
from sparseray.platform import cluster
from sparseray.platform import config as configuration
from sparseray.platform.checks import check_cluster
from sparseray.platform.config import DataConfig, RunConfig
from sparseray.platform.opening import build_layout, open_data, training_inventory

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--config", str(ROOT / "configs" / "tiny.yaml")]
TWO_EACH = [*TINY, "--cluster.attention_workers=2", "--cluster.expert_shards=2", "--cluster.memory_shards=2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command.main(arguments)
    return code, *capsys.readouterr()


def table(out: str) -> list[list[str]]:
    """Cells of the plain table: columns are two blanks apart."""
    lines = out.split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_every_slot_is_a_line_with_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *TWO_EACH)
    assert (code, err) == (0, "")
    heads, *rows = table(out)
    assert heads == list(command.COLUMNS)
    assert [row[:3] for row in rows[:2]] == [["0", "attention", "0-1"], ["1", "attention", "2-3"]]
    assert [row[1:5] for row in rows[2:4]] == [["expert", "-", "24", "-"]] * 2
    assert [row[1:7] for row in rows[4:6]] == [["memory", "-", "-", "-", "16", "-"]] * 2
    assert rows[6][:6] == ["all", "4 shards", "48", "-", "32", "-"]
    assert "2,048 tokens in 4 logical shards of 4 x 128" in out
    assert "slots: 6, 6 CPUs" in out
    assert "replication 1" in out


def test_replication_shows_backups_and_doubles_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *TWO_EACH, "--cluster.replication", "2")
    rows = table(out)[1:]
    assert [row[3:5] for row in rows[2:4]] == [["24", "24"]] * 2
    assert [row[5:7] for row in rows[4:6]] == [["16", "16"]] * 2
    line = next(line for line in out.splitlines() if line.startswith("bytes: "))
    once, held = (float(part.split()[0]) for part in line[len("bytes: ") :].split(", ")[:2])
    assert held == pytest.approx(2 * once, rel=0.01)


def test_bytes_are_those_of_all_parameters_and_moments(capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration.parse(TINY, prog="", description="")
    model, rows = config.model, sum(command.table_rows(config))
    parameters = count_parameters(model)
    expected = 12 * (parameters["dense"] + parameters["experts"]) + rows * (8 * model.dse.head_dim + 12)
    _, out, _ = run(capsys, *TINY)
    assert f"bytes: {command.human(expected)} of weights" in out
    assert f"parameters: {parameters['total']:,} in all, {parameters['active']:,} active" in out


def test_table_sizes_without_a_tokenizer_are_those_with_one(corpus: Path) -> None:
    model = preset("tiny")
    config = RunConfig(model=model, data=DataConfig(path=str(corpus)))
    layout = build_layout(model, open_data(config)["train"])
    assert layout is not None
    assert command.table_rows(config) == [layout.num_rows(layer) for layer in model.dse.layers]
    bounds = bucket_bounds(layout.num_rows(model.dse.layers[0]), model.dse.num_buckets)
    assert bounds[-1] == command.table_rows(config)[0]
    assert command.table_rows(RunConfig(model=preset("tiny"))) and DSEConfig().layers == ()


def test_data_is_checked_and_counted(capsys: pytest.CaptureFixture[str], corpus: Path) -> None:
    code, out, _ = run(capsys, *TINY, "--data.path", str(corpus), "--train.seq_len", "32")
    assert code == 0 and "tokens, seen" in out
    code, out, err = run(capsys, *TINY, "--data.path", str(corpus), "--model.vocab_size", "100")
    assert (code, out) == (2, "") and "model.vocab_size=100" in err


def test_colocated_slots_have_all_roles(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *TWO_EACH, "--cluster.colocated", "true")
    rows = table(out)[1:]
    assert [row[1] for row in rows[:2]] == ["attention + expert + memory"] * 2
    assert "slots: 2 that share roles" in out


def test_a_model_without_experts_or_memory_has_only_attention_workers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "--model.moe.leading_dense", "4", "--cluster.attention_workers", "2")
    assert code == 0
    assert [row[1] for row in table(out)[1:3]] == ["attention"] * 2
    assert "slots: 2" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster.expert_shards", "17"], ["cluster.expert_shards=17", "from 1 to 16"]),
        (["--cluster.replication", "9"], ["cluster.replication=9"]),
        (["--cluster.expert_shard", "2"], ["cluster.expert_shards"]),
        (["--data.path", "nowhere"], ["nowhere"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    code, out, err = run(capsys, *TINY, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and all(word in err for word in words), err


def test_a_terminal_gets_a_drawn_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = run(capsys, *TWO_EACH)
    assert code == 0 and "───" in out
    assert all(name in out for name in (*command.COLUMNS, "4 shards", "2,048 tokens"))


def test_shards_are_named_in_short() -> None:
    assert command.ranges([]) == "-"
    assert command.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


GPU_CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if "cuda" in path.read_text())


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_a_configuration_for_a_gpu_tells_what_is_taken_of_one(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    shares: list[dict[str, float]] = []
    for recompute in ("false", "true"):
        code, out, err = run(capsys, *file, "--train.recompute", recompute)
        assert (code, err) == (0, "")
        lines = {line.partition(":")[0]: line for line in out.splitlines()}
        told = re.findall(r"([A-Za-z ]+) (\d+\.\d)[,)]", lines["on the device"].partition("(")[2])
        shares.append({share.strip(): float(gib) for share, gib in told})
        assert {"weights", "moments", "gradients", "activations", "CUDA"} <= shares[-1].keys()
        total = float(lines["on the device"].split("about ")[1].split()[0])
        assert total == pytest.approx(sum(shares[-1].values()), abs=0.4)
        # Configurations of one GPU are for one of 80 GB, others for GPUs of 141.
        assert total < (80 if "slots: 1" in lines["slots"] else 141)
        assert "caches of the longest request" in lines["served from a GPU"]
    assert shares[1]["activations"] < 0.5 * shares[0]["activations"]


def test_what_the_fast_order_gains_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def line(name: str, *options: str) -> str:
        _, out, _ = run(capsys, "--config", str(ROOT / "configs" / f"{name}.yaml"), *options)
        return next(text for text in out.splitlines() if text.startswith("determinism"))

    assert "5.6 GiB less for sums over parts and cuDNN's backward pass" in line("1b")
    assert "bitwise; fast would gain nothing" in line("1b_nsa")
    assert "bitwise keeps them" in line("1b_full")
    assert "cuDNN" in line("1b_full", "--determinism", "bitwise")


def test_it_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    ray_before = "ray" in sys.modules
    assert run(capsys, *TINY)[0] == 0
    assert ray_before or "ray" not in sys.modules


def test_the_plan_of_a_job_that_goes_on_is_shown_by_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration.parse(TWO_EACH, prog="plan", description="")
    plan = replace(check_cluster(config.cluster, training_inventory(config)), generation=7)
    answers = [{"config": configuration.to_dict(config), "plan": to_plain(plan)}, None]
    monkeypatch.setattr(command, "connect", lambda job: job)
    monkeypatch.setattr(
        cluster, "ask", lambda job, what: answers.pop(0) if (job, what) == ("first", "plan") else 0
    )
    code, out, err = run(capsys, "first")
    assert (code, err) == (0, "") and out.startswith("generation 7\n")
    _, beginning, _ = run(capsys, *TWO_EACH)
    assert table(out.split("\n", 1)[1]) == table(beginning)
    code, out, err = run(capsys, "first")
    assert (code, out) == (2, "") and "first has no plan yet" in err
