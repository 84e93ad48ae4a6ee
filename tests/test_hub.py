"""Models go in from Hugging Face's format and out again without a change of a bit, and compute what transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import KINDS, VOCABULARY, Ours, imported, make, save, save_single, tensors_of
from paged_runs import Served
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from sparseray.jobs.export import export_model
from sparseray.jobs.hub_folder import dequantized
from sparseray.jobs.tokens.progress import quiet
from sparseray.model.hub import entries
from sparseray.platform.run import checkpoint


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A model of transformers, its folder, and the checkpoint made of that."""
    root = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param)
    save(theirs, root / "theirs")
    return theirs, root / "theirs", imported(root / "theirs", root / "checkpoint")


def test_logits_are_those_of_transformers(pair: tuple[Any, Path, Path]) -> None:
    ids = tokens(2, 100)
    with torch.no_grad():
        expected = pair[0](ids).logits
    found = Ours(pair[2]).logits(ids)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < 1e-5


def test_greedy_text_is_that_of_transformers(pair: tuple[Any, Path, Path]) -> None:
    prompt, ours = tokens(1, 21), Ours(pair[2])
    served = Served(ours.model, ours.experts, None, page=16)
    with torch.no_grad():
        found = [ours.model.logits(served.text(prompt[0], [8, 8, 5])[-1:]).argmax(-1)]
    for _ in range(63):
        found.append(served.decode([(1, found[-1])]).argmax(-1))
    pair[0].generation_config = GenerationConfig(do_sample=False, max_new_tokens=64)
    expected = pair[0].generate(prompt)
    assert torch.cat(found).tolist() == expected[0, 21:].tolist()


def test_the_way_in_and_out_changes_no_byte_and_no_setting(
    pair: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    _, theirs, ckpt = pair
    export_model(ckpt, tmp_path / "out", "stored", quiet)
    before, after = tensors_of(theirs), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (theirs / name).read_bytes()
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (theirs, tmp_path / "out")]
    assert {k: configs[0][k] for k in configs[0] if k not in NOT_COMPARED} == {
        k: configs[1][k] for k in configs[1] if k not in NOT_COMPARED
    }
    again = imported(tmp_path / "out", tmp_path / "again")
    assert checkpoint.read_manifest(again)["digest"] == checkpoint.read_manifest(ckpt)["digest"]


NOT_COMPARED = ("_name_or_path", "topk_method", "scoring_func", "n_group", "topk_group", "rope_parameters")
"""Named by the released files alone, or with another word for the same (no groups: null or 1)."""


def test_transformers_loads_an_export_and_computes_the_same(
    pair: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    export_model(pair[2], tmp_path / "out", "stored", quiet)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    ids = tokens(1, 100)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, pair[0](ids).logits)


def test_experts_in_one_tensor_are_the_same_model(tmp_path: Path) -> None:
    theirs = make("v3")
    one = imported(save(theirs, tmp_path / "one"), tmp_path / "from_one")
    fused = save(theirs, tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors_of(fused))
    other = imported(fused, tmp_path / "from_fused")
    assert checkpoint.read_manifest(one)["digest"] == checkpoint.read_manifest(other)["digest"]


def test_bfloat16_stays_bfloat16_and_the_selection_bias_fp32(tmp_path: Path) -> None:
    theirs = make("v3").to(torch.bfloat16)
    for layer in theirs.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float()
    folder = save(theirs, tmp_path / "theirs")
    ckpt = imported(folder, tmp_path / "checkpoint")
    dtypes = {name: entry["dtype"] for name, entry in checkpoint.read_manifest(ckpt)["tensors"].items()}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} >= {"layers.1.moe.router_bias"}
    assert dtypes["embedding"] == dtypes["layers.1.moe.experts.0.up"] == "bfloat16"
    export_model(ckpt, tmp_path / "out", "stored", quiet)
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(t, after[name]) for name, t in tensors_of(folder).items())
    export_model(ckpt, tmp_path / "wide", "float32", quiet)
    wide = tensors_of(tmp_path / "wide")
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert all(torch.equal(t.float(), wide[name]) for name, t in after.items())


def test_fp8_weights_are_read_block_by_block(tmp_path: Path) -> None:
    folder = save(make("v3", hidden_size=160, moe_intermediate_size=144), tmp_path / "theirs")
    exact = tensors_of(folder)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in exact.items():
        if tensor.dim() == 2 and "_proj" in name:
            scale = torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)) + 0.01
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scale
        else:
            stored[name] = tensor
    save_single(stored, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    ours = Ours(imported(folder, tmp_path / "checkpoint"))
    read = checkpoint.read_tensors(tmp_path / "checkpoint", ["layers.1.moe.experts.3.down"])
    (matrix,) = read.values()
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    weight, scale = stored[name], stored[name + "_scale_inv"]
    assert matrix.shape == (160, 144) and scale.shape == (2, 2)
    for row, column in ((0, 0), (127, 127), (128, 127), (127, 128), (159, 143)):
        factor = scale[row // 128, column // 128]
        assert matrix[row, column] == (weight[row, column].float() * factor).to(torch.bfloat16)
    assert torch.equal(dequantized(weight, scale), matrix)
    assert torch.isfinite(ours.logits(tokens(1, 9))).all()


def test_the_table_names_every_tensor_of_the_network_once(pair: tuple[Any, Path, Path]) -> None:
    ours = Ours(pair[2])
    found = [(entry.name, entry.shape) for entry in entries(ours.config)]
    own = ours.model.state_dict() | ours.experts.tensors()
    assert len(found) == len(own) and dict(found) == {n: tuple(t.shape) for n, t in own.items()}
