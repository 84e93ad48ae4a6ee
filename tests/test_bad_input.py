"""What a user can get wrong when pretraining: exit code 2, one line that helps, nothing written or lost."""

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_corpus
from local_cluster import tiny_run, train

from sparseray.errors import CheckpointError
from sparseray.jobs import pretrain
from sparseray.jobs.tokens.prepare import prepare
from sparseray.platform.config import save_yaml
from sparseray.platform.run import checkpoint


class Command:
    """`sparseray pretrain` on a configuration file; it must fail before Ray starts."""

    def __init__(self, folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.file, self.run_dir = folder / "run.yaml", folder / "run"
        save_yaml(tiny_run(corpus, steps=4), self.file)

    def refuse(self, *options: str) -> str:
        before = contents(self.folder)
        code = pretrain.main(["--config", str(self.file), f"--run_dir={self.run_dir}", *options])
        line = self.capsys.readouterr().err.strip()
        assert code == 2, line
        assert line.startswith("sparseray: error: ")
        assert len(line.splitlines()) == 1
        assert contents(self.folder) == before, "a refused command wrote something"
        return line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def command(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    from sparseray.platform import cluster

    def no_ray(*_: object) -> None:
        raise AssertionError("Ray was started for a command that must be refused before")

    monkeypatch.setattr(cluster, "_connect", no_ray)
    return Command(tmp_path, corpus, capsys)


@pytest.fixture
def trained(command: Command, corpus: Path) -> Command:
    """A run with checkpoints of steps 2 and 3 that has one step to go."""
    config = tiny_run(corpus, steps=4)
    config = replace(config, train=replace(config.train, checkpoint_every=2))
    train(command.run_dir, config, stop_after=3)
    assert [p.name for p in checkpoint.list_finished(command.run_dir / "checkpoints")] == ["step_2", "step_3"]
    return command


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--train.stpes=3", ["--train.stpes", "'train.steps'"]),
        ("--cluster.expert_shard=3", ["'cluster.expert_shards'"]),
        ("--train.steps=many", ["train.steps", "many"]),
        ("--optim.lr=fast", ["optim.lr", "fast"]),
        ("--cluster.transport=pigeon", ["cluster.transport", "pigeon", "ipc"]),
        ("--train.steps=0", ["train.steps=0"]),
        ("--cluster.expert_shards=9", ["cluster.expert_shards=9", "8 experts", "1 to 8"]),
        ("--cluster.memory_shards=7", ["cluster.memory_shards=7", "6 buckets"]),
        ("--cluster.attention_workers=5", ["cluster.attention_workers=5", "4 logical shards"]),
        ("--cluster.attention_workers=0", ["cluster.attention_workers=0"]),
        ("--cluster.replication=4", ["cluster.replication=4", "1 to 3"]),
        ("--model.num_heads=3", ["num_heads=3", "num_kv_heads=2"]),
        ("--model.vocab_size=299", ["model.vocab_size=299", "300 tokens"]),
        ("--train.seq_len=65", ["train.seq_len=65", "max_seq_len=64"]),
        ("--train.sequences_per_shard=4000", ["sequences_per_shard"]),
        ("--data.path=/nowhere/at/all", ["/nowhere/at/all", "prepare"]),
        ("--data.path=", ["data.path is not set", "prepare"]),
        ("--serve.max_batch=0", ["serve.max_batch=0"]),
        ("--serve.port=70000", ["serve.port=70000", "at most 65535"]),
        ("--cluster.threads_per_slot=0", ["cluster.threads_per_slot=0"]),
        ("--cluster.max_slots=2", ["cluster.max_slots=2", "at least 3"]),
        ("--cluster.bind_host=192.0.2.1", ["cluster.bind_host=192.0.2.1", "127.0.0.1"]),
        ("--run_dir=/dev/null/run", ["run_dir=/dev/null/run", "cannot be written"]),
        ("--run_dir=/proc/run", ["run_dir=/proc/run", "cannot be written"]),
    ],
)
def test_impossible_value_is_refused_with_its_name(command: Command, option: str, words: list[str]) -> None:
    line = command.refuse(option)
    assert all(word in line for word in words), line


def test_unknown_key_in_the_file_names_file_and_nearest_key(command: Command) -> None:
    command.file.write_text(command.file.read_text().replace("top_k:", "topk:"))
    line = command.refuse()
    assert str(command.file) in line
    assert "'model.moe.topk'" in line
    assert "'model.moe.top_k'" in line


def test_missing_configuration_file_is_named(command: Command) -> None:
    command.file.unlink()
    assert str(command.file) in command.refuse()


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated"])
def test_damaged_token_shard_is_named(command: Command, corpus: Path, damage: str) -> None:
    copy = command.folder / "copy"
    shutil.copytree(corpus, copy)
    shard = next(copy.glob("train-*.parquet"))
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content if damage == "flipped" else content[:-9])
    assert str(shard) in command.refuse(f"--data.path={copy}", "--data.verify=true")


def test_empty_corpus_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseray.jobs import data

    (tmp_path / "text").mkdir()
    assert data.main(["prepare", "--source", str(tmp_path / "text"), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "text") in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text"]


def test_run_folder_of_another_configuration_names_the_keys(trained: Command) -> None:
    line = trained.refuse("--optim.lr=0.5", "--train.seed=9", "--model.init_std=0.5")
    assert "model.init_std (0.02 there, 0.5 here)" in line and "train.seed (0 there, 9 here)" in line
    assert "optim.lr (" not in line and "optim.*" in line


def test_folder_that_is_no_run_is_refused(command: Command) -> None:
    command.run_dir.mkdir()
    (command.run_dir / "thesis.txt").write_text("years of work")
    assert "not a run" in command.refuse()


def test_other_text_with_the_same_tokenizer_is_refused_on_resume(trained: Command, corpus: Path) -> None:
    other = trained.folder / "other"
    write_corpus(other / "text", seed=2)
    prepare([str(other / "text")], other / "data", tokenizer=str(corpus / "tokenizer.json"))
    assert "other token shards" in trained.refuse(f"--data.path={other / 'data'}")


def test_data_of_another_dse_identity_is_refused(trained: Command) -> None:
    other = trained.folder / "other"
    write_corpus(other / "text", seed=1)
    # Other merges, so other tokens stand for the same text.
    (other / "text" / "000.txt").write_text("entirely different letters: jazz quiz waltz fjord vex\n" * 400)
    prepare([str(other / "text")], other / "data", vocab_size=300, validation_fraction=0.1)
    assert "DSE identity" in trained.refuse(f"--data.path={other / 'data'}")


def newest_manifest(command: Command) -> tuple[Path, dict]:
    path = checkpoint.list_finished(command.run_dir / "checkpoints")[-1]
    return path, json.loads((path / "manifest.json").read_text())


def test_checkpoint_of_another_model_is_refused(trained: Command) -> None:
    path, manifest = newest_manifest(trained)
    manifest["config"]["model"]["moe"]["top_k"] = 4
    (path / "manifest.json").write_text(json.dumps(checkpoint.sealed(manifest)))
    line = trained.refuse()
    assert str(path) in line
    assert "model.moe.top_k" in line


def test_checkpoint_of_another_dse_identity_is_refused(trained: Command) -> None:
    path, manifest = newest_manifest(trained)
    manifest["dse_layout_sha256"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(checkpoint.sealed(manifest)))
    line = trained.refuse()
    assert str(path) in line
    assert "DSE identity" in line


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["dense_0_1.safetensors", "experts_1_1.safetensors", "manifest.json"])
def test_truncated_checkpoint_is_named_and_the_one_before_is_used_without_it(
    trained: Command, corpus: Path, name: str
) -> None:
    path, _ = newest_manifest(trained)
    (path / name).write_bytes((path / name).read_bytes()[:-100])
    assert str(path / name) in trained.refuse()
    shutil.rmtree(path)
    assert [r["step"] for r in train(trained.run_dir, tiny_run(corpus, steps=4)).records] == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["flipped bit", "missing tensor"])
def test_checkpoint_with_a_wrong_tensor_stops_the_run_and_loses_nothing(
    trained: Command, corpus: Path, damage: str
) -> None:
    path, manifest = newest_manifest(trained)
    if damage == "flipped bit":
        file = path / "experts_1_1.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    else:
        del manifest["tensors"]["embedding"]
        (path / "manifest.json").write_text(json.dumps(checkpoint.sealed(manifest)))
    before = (trained.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(
        Exception, match="SHA-256" if damage == "flipped bit" else "no tensor 'embedding'"
    ) as e:
        train(trained.run_dir, tiny_run(corpus, steps=4))
    assert isinstance(e.value, pretrain.UserError)
    assert not isinstance(e.value, CheckpointError)  # it comes from a slot, by message
    assert (trained.run_dir / "metrics.jsonl").read_bytes() == before
    assert newest_manifest(trained)[0] == path


# -- an external Ray ------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
