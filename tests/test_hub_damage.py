"""What can be wrong with a model that is brought or taken away: exit code 2, what, where and a cure; nothing is left."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import imported, make, save, save_single, tensors_of
from tokenizers import Tokenizer, models

from sparseray.__main__ import main
from sparseray.jobs import export, hub_folder
from sparseray.model.config import ModelConfig
from sparseray.model.presets import preset
from sparseray.platform.config import RunConfig, to_dict
from sparseray.platform.run import checkpoint

NORM, EXPERT = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.experts.5.up_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("v3"), tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


class Refused:
    """Runs a command that must be refused, and sees that it leaves everything as it was."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._root, self._monkeypatch, self._capsys = root, monkeypatch, capsys

    def _contents(self) -> dict[str, int]:
        return {str(p): p.stat().st_size for p in self._root.rglob("*") if p.exists()}

    def __call__(self, *words: object) -> str:
        before = self._contents()
        self._monkeypatch.setattr(sys, "argv", ["sparseray", *map(str, words)])
        self._capsys.readouterr()
        code, err = main(), self._capsys.readouterr().err
        lines = [line for line in err.splitlines() if not line.startswith(("import: ", "export: "))]
        assert code == 2, err
        assert len(lines) == 1 and lines[0].startswith("sparseray: error: "), err
        assert self._contents() == before, "something was left"
        return lines[0]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(tmp_path, monkeypatch, capsys)


def set_config(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | keys))

    return change


def set_tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """Replace tensors, or take them away."""

    def change(folder: Path) -> None:
        found: dict[str, Any] = tensors_of(folder) | changes
        save_single({name: t for name, t in found.items() if t is not None}, folder)

    return change


def poison(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = tensors_of(folder)
        found[name].view(-1)[-1] = value
        save_single(found, folder)

    return change


def set_template(source: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(source)

    return change


def set_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return apply


def cut_off(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def another_tokenizer(folder: Path, size: int = 300) -> None:
    words = {f"w{index}": index for index in range(size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def without_factors(folder: Path) -> None:
    found = tensors_of(folder)
    save_single(found | {EXPERT: found[EXPERT].to(torch.float8_e4m3fn)}, folder)


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a missing tensor": (set_tensors(**{EXPERT: None}), ["lacks", EXPERT, "download it again"]),
    "an extra tensor": (
        set_tensors(**{"model.layers.1.mlp.extra": torch.ones(3)}),
        ["has tensors", "model.layers.1.mlp.extra", "mend config.json"],
    ),
    "a wrong shape": (
        set_tensors(**{NORM: torch.ones(47)}), [NORM, "[47]", "[48]", "model.safetensors"],
    ),
    "a type that cannot be read": (
        set_tensors(**{NORM: torch.ones(48, dtype=torch.int32)}), [NORM, "I32", "BF16"],
    ),
    "another architecture": (
        set_config(model_type="llama"), ["config.json", "model_type='llama'", "deepseek_v3"],
    ),
    "no architecture": (set_config(model_type=None), ["model_type=None"]),
    "a half-downloaded shard": (cut_off, ["model-00002-of", "cut off", "download it again"]),
    "an index that lies": (
        set_index(lambda where: where.__setitem__(NORM, min(where.values()))), [INDEX, "is wrong", NORM],
    ),
    "an index without a tensor": (
        set_index(lambda where: where.pop(NORM)), [INDEX, "does not name", NORM],
    ),
    "an index of a missing file": (
        set_index(lambda where: where.__setitem__(NORM, "absent.safetensors")), ["absent.safetensors", "missing"],
    ),
    "an index that leads out": (
        set_index(lambda where: where.__setitem__(NORM, "../x.safetensors")), [INDEX, "no file of this folder"],
    ),
    "an index that is none": (lambda f: (f / INDEX).write_text("[]"), [INDEX, "download it again"]),
    "a tokenizer of another vocabulary": (
        another_tokenizer, ["tokenizer.json", "ids up to 299", "vocab_size=272", "use its own"],
    ),
    "a tokenizer without the end of a text": (
        lambda f: another_tokenizer(f, 200), ["tokenizer.json", "no id 270", "eos_token_id"],
    ),
    "a tokenizer that is none": (
        lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json", "is not a tokenizer.json"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json", "save_pretrained"]),
    "NaN in a weight": (poison(EXPERT, float("nan")), [EXPERT, "NaN", "another copy"]),
    "infinity in a bias": (poison(BIAS, float("inf")), [BIAS, "infinity"]),
    "no configuration": (lambda f: (f / "config.json").unlink(), ["no config.json", "download"]),
    "a configuration that is cut off": (
        lambda f: (f / "config.json").write_text('{"model_type": '), ["config.json", "cannot be read"],
    ),
    "pickles": (only_pickles, ["neither model.safetensors nor", "saved as safetensors"]),
    "FP8 without factors": (without_factors, [EXPERT, "FP8", "_scale_inv is None", "[1, 1]"]),
    "other quantization": (
        set_config(quantization_config={"quant_method": "awq"}), ["quantization_config", "'awq'", "bfloat16"],
    ),
    "another activation": (set_config(hidden_act="gelu"), ["hidden_act='gelu'", "only 'silu'"]),
    "biases": (set_config(attention_bias=True), ["attention_bias=True"]),
    "another rotary scaling": (
        set_config(rope_parameters={"rope_type": "linear", "factor": 2.0}), ["rope_type='linear'"],
    ),
    "a rotary scaling that is text": (set_config(rope_scaling="yarn"), ["rope_scaling='yarn'", "must hold keys"]),
    "a quantization that is text": (set_config(quantization_config="fp8"), ["quantization_config='fp8'"]),
    "an architecture that is a list": (set_config(model_type=["deepseek_v3"]), ["model_type=['deepseek_v3']"]),
    "YaRN without its lengths": (
        set_config(rope_parameters={"rope_type": "yarn"}, max_position_embeddings=64), ["original_max_seq_len=0"],
    ),
    "a template that loops": (
        set_template("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"),
        ["chat template of", "steps", "mend it, or leave it out"],
    ),
    "a template that reads files": (
        set_template("{% include '/etc/passwd' %}"), ["chat template of", "reads other files", "leave it out"],
    ),
    "a template that is none": (set_template("{% if %}"), ["chat template of", "not Jinja", "leave it out"]),
    "tokenizer settings that are cut off": (
        lambda f: (f / "tokenizer_config.json").write_text("{"), ["tokenizer_config.json", "cannot read"],
    ),
    "fewer heads of keys": (set_config(num_key_value_heads=2), ["num_key_value_heads=2"]),
    "experts that fit no group": (set_config(n_group=3), ["config.json", "num_groups=3"]),
    "a size that is text": (set_config(hidden_size="48"), ["config.json", "hidden='48'", "whole number"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_imported_is_refused(damage: str, folder: Path, refused: Refused) -> None:
    apply, named = DAMAGES[damage]
    apply(folder)
    line = refused("import", "--from", folder, "--out", folder.parent / "out")
    for part in named:
        assert part in line, line


def test_a_target_that_cannot_be_written_is_refused(folder: Path, refused: Refused) -> None:
    (folder.parent / "file").write_text("")
    line = refused("import", "--from", folder, "--out", folder.parent / "file" / "out")
    assert "cannot be written" in line and "name a folder that you may write" in line
    (folder.parent / "taken").mkdir()
    line = refused("import", "--from", folder, "--out", folder.parent / "taken")
    assert "taken exists already; give a new folder" in line
    assert "absent is not a folder" in refused(
        "import", "--from", folder.parent / "absent", "--out", folder.parent / "out"
    )


def test_names_that_no_file_can_have_are_refused(folder: Path, refused: Refused) -> None:
    for long in (folder.parent / ("x" * 300), folder.parent / ("x/" * 3000)):
        assert "give another name" in refused("import", "--from", folder, "--out", long)
        assert "is not a folder" in refused("import", "--from", long, "--out", folder.parent / "out")
        assert "give another name" in refused("export", "--checkpoint", folder, "--out", long)


def test_a_disk_without_room_is_seen_before_or_while_writing(
    folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("import", "--from", folder, "--out", folder.parent / "out")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(folder)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "free space or name another disk" in refused(*words)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert "No space left on device" in refused(*words)


def test_an_interrupted_import_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter([False] * 20 + [True])
    read = hub_folder.HubFolder.read

    def interrupted(self: Any, entry: Any) -> torch.Tensor:
        if next(reads):
            raise KeyboardInterrupt
        return read(self, entry)

    monkeypatch.setattr(hub_folder.HubFolder, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imported(folder, folder.parent / "out")
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def a_checkpoint(root: Path, model: ModelConfig) -> Path:
    """One without tensors: what cannot be said is refused before they are looked for."""
    config = to_dict(RunConfig(model=model))
    manifest = {"format": checkpoint.FORMAT, "step": 1, "config": config, "files": {}, "identity": {}}
    return checkpoint.finish(checkpoint.begin(root, 1), manifest | {"tensors": {}})


LATENT = replace(preset("tiny"), attention=("mla",) * 4, dse=replace(preset("tiny").dse, layers=()))
UNSAYABLE: dict[str, tuple[ModelConfig, str]] = {
    "NSA": (replace(LATENT, attention=("mla", "nsa", "mla", "full")), "model.attention=['full', 'nsa']"),
    "DSE": (replace(LATENT, dse=preset("tiny").dse), "model.dse.layers=[1, 2]"),
    "another router": (
        replace(LATENT, moe=replace(LATENT.moe, router="switch", top_k=1)), "model.moe.router='switch'",
    ),
    "V2 with normalised weights": (
        replace(LATENT, moe=replace(LATENT.moe, router="v2", normalize=True)), "model.moe.normalize=true",
    ),
    "no shared expert": (replace(LATENT, moe=replace(LATENT.moe, num_shared=0)), "model.moe.num_shared=0"),
    "the paper's scores of a group": (
        replace(LATENT, moe=replace(LATENT.moe, num_groups=4, topk_groups=2, group_scores=0)), "group_scores=0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSAYABLE)
def test_what_the_format_cannot_say_is_refused_with_the_reason(
    kind: str, tmp_path: Path, refused: Refused
) -> None:
    model, reason = UNSAYABLE[kind]
    line = refused("export", "--checkpoint", a_checkpoint(tmp_path, model), "--out", tmp_path / "out")
    assert "cannot say" in line and reason in line


def test_a_checkpoint_that_cannot_be_exported_is_refused(
    whole: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = imported(whole, tmp_path / "checkpoint")
    words = ("export", "--checkpoint", made, "--out", tmp_path / "out")
    assert "not a checkpoint" in refused(*words[:2], tmp_path, *words[3:])
    assert "exists already" in refused(*words[:-1], tmp_path)
    weights = made / "weights_00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(export, "SHARD_BYTES", 50_000)
    assert "differs from its SHA-256" in refused(*words)
    weights.write_bytes(content[:-1])
    assert f"instead of {len(content)}" in refused(*words)
