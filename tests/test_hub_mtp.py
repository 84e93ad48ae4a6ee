"""Modules that predict further tokens go in from released files and out again, and compute what transformers' do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import VOCABULARY, Ours, fill, imported, make, save, save_single, tensors_of
from torch import Tensor
from transformers.modeling_layers import MtpModel

from sparseray.errors import CheckpointError, ConfigError
from sparseray.jobs.export import export_model
from sparseray.jobs.tokens.prepare import quiet
from sparseray.model.config import MTPConfig
from sparseray.model.hub_config import hub_type
from sparseray.platform.config import RunConfig, from_dict
from sparseray.platform.run import checkpoint

DEPTH, LAYERS = 2, 3
IDS = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(3))
NAMES = {"post_norm": "shared_head.norm", "mtp_block.": ""}


def released(modules: Any) -> dict[str, Tensor]:
    """Tensors of the modules by their released names, one for each expert's matrix."""
    found: dict[str, Tensor] = {}
    for name, tensor in modules.layers.state_dict().items():
        index, _, rest = name.partition(".")
        for theirs, word in NAMES.items():
            rest = rest.replace(theirs, word)
        whole = f"model.layers.{LAYERS + int(index)}.{rest}"
        if whole.endswith("experts.gate_up_proj"):
            stem = whole.removesuffix("gate_up_proj")
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found |= {f"{stem}{expert}.gate_proj.weight": gate, f"{stem}{expert}.up_proj.weight": up}
        elif whole.endswith("experts.down_proj"):
            stem = whole.removesuffix("down_proj")
            found |= {f"{stem}{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            found[whole] = tensor
    return found


def save_released(kind: str, folder: Path) -> tuple[Any, Any]:
    """A model and its modules, written as DeepSeek-V3 is released: each module with embedding and head."""
    model = make(kind, num_mtp_layers=DEPTH)
    modules = MtpModel(model, DEPTH).eval()
    fill(modules.layers)
    save(model, folder)
    tensors = tensors_of(folder) | released(modules)
    for layer in range(LAYERS, LAYERS + DEPTH):
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = (
            model.model.embed_tokens.weight.detach().clone()
        )
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = model.lm_head.weight.detach().clone()
    save_single(tensors, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    config["num_nextn_predict_layers"] = DEPTH
    (folder / "config.json").write_text(json.dumps(config))
    return model, modules


@pytest.fixture(scope="module", params=["v3", "v3_tied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp(request.param)
    model, modules = save_released(request.param, root / "theirs")
    return model, modules, root / "theirs", imported(root / "theirs", root / "checkpoint")


@torch.no_grad()
def test_every_module_computes_what_transformers_computes(family: Any) -> None:
    model, modules, _, ckpt = family
    ours = Ours(ckpt)
    assert ours.config.mtp.depth == DEPTH
    main = ours.model(IDS, experts=ours.experts, memory=None).hidden_BTH
    hidden = model.model(IDS).last_hidden_state
    for index, out in enumerate(ours.model.predictions(IDS, main, ours.experts)):
        T = IDS.shape[1] - index - 1
        hidden = modules.forward_layer(
            index, hidden[:, :T], torch.arange(T)[None], None, input_ids=IDS[:, index + 1 :]
        )
        expected = model.lm_head(hidden)
        assert expected.std() > 0.3
        # Rounding of one more layer than the model has, then of two.
        assert (ours.model.logits(out.hidden_BTH) - expected).abs().max() < (1e-5, 2e-5)[index]


def test_the_way_in_and_out_changes_no_byte(family: Any, tmp_path: Path) -> None:
    _, _, theirs, ckpt = family
    export_model(ckpt, tmp_path / "out", "stored", quiet)
    before, after = tensors_of(theirs), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == DEPTH
    again = imported(tmp_path / "out", tmp_path / "again")
    assert checkpoint.read_manifest(again)["digest"] == checkpoint.read_manifest(ckpt)["digest"]


def test_a_module_with_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    save_released("v3", tmp_path / "theirs")
    tensors = tensors_of(tmp_path / "theirs")
    name = f"model.layers.{LAYERS + 1}.embed_tokens.weight"
    tensors[name] = tensors[name] + 1
    save_single(tensors, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=name) as refused:
        imported(tmp_path / "theirs", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    # The cure in the message.
    assert "num_nextn_predict_layers to 0" in str(refused.value)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    assert Ours(imported(tmp_path / "theirs", tmp_path / "checkpoint")).config.mtp.depth == 0


def test_modules_that_are_announced_and_lacking_are_done_without(tmp_path: Path) -> None:
    save(make("v3", num_mtp_layers=1), tmp_path / "theirs")
    assert Ours(imported(tmp_path / "theirs", tmp_path / "checkpoint")).config.mtp.depth == 0


def test_half_of_a_module_is_refused(tmp_path: Path) -> None:
    save_released("v3", tmp_path / "theirs")
    tensors = tensors_of(tmp_path / "theirs")
    del tensors[f"model.layers.{LAYERS}.eh_proj.weight"]
    save_single(tensors, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3\.eh_proj\.weight"):
        imported(tmp_path / "theirs", tmp_path / "checkpoint")


def test_what_the_format_cannot_say_of_modules_is_refused(family: Any) -> None:
    manifest = checkpoint.read_manifest(family[3])
    config = from_dict(RunConfig, manifest["config"]).model
    v2 = replace(config, moe=replace(config.moe, router="v2", normalize=None), mtp=MTPConfig(depth=1))
    with pytest.raises(ConfigError, match=r"model.mtp.depth=1"):
        hub_type(v2)
    dense = replace(config, moe=replace(config.moe, leading_dense=LAYERS))
    with pytest.raises(ConfigError, match="dense layers alone"):
        hub_type(dense)
