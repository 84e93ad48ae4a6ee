"""Imported models are models like all others: they are served, and training begins with their weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_transport import Faults, Sent
from hub_models import Ours, imported, make, save
from local_cluster import LocalFleet, tiny_run, train
from paged_runs import greedy
from test_hub_mtp import save_released

from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.errors import CheckpointError, IdentityError
from sparseray.jobs.export import export_model
from sparseray.jobs.http.chat import ChatTemplate
from sparseray.jobs.http.serving_model import read_served
from sparseray.jobs.tokens.prepare import prepare
from sparseray.jobs.tokens.progress import quiet
from sparseray.platform.config import ClusterConfig, RunConfig, ServeConfig, from_dict, load_yaml
from sparseray.platform.opening import open_serving, open_training
from sparseray.platform.run import checkpoint

STEPS = 2


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("v3")
    return imported(save(make("v3"), root / "theirs"), root / "checkpoint")


@pytest.fixture(scope="module")
def run(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that begins with the imported weights, on text of the imported tokenizer."""
    root = tmp_path_factory.mktemp("data")
    (root / "text").mkdir()
    for index in range(12):
        (root / "text" / f"{index}.txt").write_text(f"the {index} quick brown foxes jump over it. " * 30)
    prepare(
        [str(root / "text")], root / "data", tokenizer=str(ckpt / "tokenizer.json"), validation_fraction=0.2
    )
    model = from_dict(RunConfig, checkpoint.read_manifest(ckpt)["config"]).model
    return replace(tiny_run(root / "data", steps=STEPS), model=model, init_from=str(ckpt))


@pytest.fixture(scope="module")
def deep(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same with a model that has modules for further tokens."""
    root = tmp_path_factory.mktemp("deep")
    save_released("v3", root / "theirs")
    ckpt = imported(root / "theirs", root / "checkpoint")
    model = from_dict(RunConfig, checkpoint.read_manifest(ckpt)["config"]).model
    return replace(run, model=model, init_from=str(ckpt), train=replace(run.train, steps=9))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    names = [name for name in checkpoint.read_manifest(directory)["tensors"] if "@" not in name]
    return checkpoint.read_tensors(directory, names)


def test_an_imported_model_is_served(ckpt: Path) -> None:
    cluster = ClusterConfig(device="cpu")
    config = open_serving(ckpt, ServeConfig(), cluster)
    served = read_served(ckpt, config, ("v3",))
    assert served.template.source is not None and served.vocabulary.eos_id == 270
    ours = Ours(ckpt)
    engine = PagedEngine(ours.model, ours.experts, None, max_batch=4, max_model_len=64, prefill_chunk=16)
    prompts = [tuple(range(3, 3 + length)) for length in (5, 23, 40)]
    for index, prompt in enumerate(prompts):
        request = GenerationRequest(
            request_id=str(index), prompt_tokens=prompt, max_tokens=8, temperature=0.0
        )
        engine.add(request)
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            assert event.token_id is not None
            found.setdefault(event.request_id, []).append(event.token_id)
    for index, prompt in enumerate(prompts):
        twin = greedy(ours.model, torch.tensor(prompt), 8, experts=ours.experts, memory=None)
        assert found[str(index)] == twin.tolist()


def test_a_run_begins_with_imported_weights_and_is_as_elastic_as_any(
    ckpt: Path, run: RunConfig, tmp_path: Path
) -> None:
    one = train(tmp_path / "one", run)
    many = train(
        tmp_path / "many",
        replace(run, cluster=replace(run.cluster, attention_workers=2, expert_shards=2, replication=2)),
    )
    assert one.curve == many.curve and one.digest == many.digest
    before, newest = weights(ckpt), one.folder.newest_checkpoint()
    assert newest is not None
    after = weights(newest)
    assert set(before) == set(after)
    moved = {name: (after[name] - before[name]).abs().max() for name in before}
    assert all(0 < distance < 0.02 for distance in moved.values()), moved
    seeded = train(tmp_path / "seeded", replace(run, init_from=""))
    assert seeded.curve[0] != one.curve[0]
    assert ChatTemplate.load(newest).source == ChatTemplate.load(ckpt).source is not None
    export_model(newest, tmp_path / "out", "stored", quiet)
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (ckpt / name).read_bytes()
    keys = [
        json.loads(path.read_text()) for path in (ckpt / "hub_config.json", tmp_path / "out" / "config.json")
    ]
    assert keys[0]["bos_token_id"] == keys[1]["bos_token_id"] == 269


@pytest.mark.long
def test_an_imported_model_survives_kills_and_resizes_to_the_bit(deep: RunConfig, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", deep)
    assert set(whole.records[0]["losses"]) == {"mtp_1", "mtp_2"}
    spread = replace(
        deep.cluster, attention_workers=2, expert_shards=2, replication=2, standby=1, deadline_s=3.0
    )
    killed: set[int] = set()

    def kill(sent: Sent, fleet: LocalFleet) -> None:
        # A worker in the middle of a step, then an expert shard in another one.
        for slot, kind, step in ((0, "expert_forward", 2), (2, "expert_rows", 3)):
            if slot not in killed and (sent.source, sent.kind, sent.step) == (slot, kind, step):
                killed.add(slot)
                fleet.kill(slot)

    hit = train(tmp_path / "hit", replace(deep, cluster=spread), faults=Faults(on_send=kill))
    assert killed == {0, 2} and hit.events.count("lost") == 2

    def resize(step: int, run: Any, fleet: LocalFleet) -> None:
        for role, count in {1: (("experts", 3),), 5: (("attention", 1), ("experts", 1))}.get(step, ()):
            run.reconciler.request(role, count)

    resized = train(tmp_path / "resized", replace(deep, cluster=replace(spread, standby=0)), at_step=resize)
    assert resized.events.count("resized") >= 2
    assert whole.curve == hit.curve == resized.curve
    assert whole.digest == hit.digest == resized.digest


def test_a_template_in_the_settings_of_the_tokenizer_goes_along_too(run: RunConfig, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(run.init_from, tmp_path / "origin"))
    template = origin / "chat_template.jinja"
    settings = {"eos_token": "<|270|>", "chat_template": template.read_text(), "add_bos_token": True}
    manifest = json.loads((origin / "manifest.json").read_text())
    template.unlink()
    (origin / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        manifest["identity"].pop(name), manifest["files"].pop(name)
    manifest.pop("sha256", None)
    (origin / "manifest.json").write_text(json.dumps(checkpoint.sealed(manifest)))
    found = train(tmp_path / "run", replace(run, init_from=str(origin), train=replace(run.train, steps=1)))
    newest = found.folder.newest_checkpoint()
    assert newest is not None and ChatTemplate.load(newest).source == settings["chat_template"]
    stated = json.loads((newest / "tokenizer_config.json").read_text())
    assert stated["add_bos_token"] and stated["eos_token"] == "<|endoftext|>"


def test_a_run_that_has_a_checkpoint_goes_on_from_that(ckpt: Path, run: RunConfig, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", replace(run, train=replace(run.train, checkpoint_every=1)))
    train(tmp_path / "cut", run, stop_after=1)
    again = train(tmp_path / "cut", run)
    assert (again.curve, again.digest) == (whole.curve, whole.digest)


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"hidden": 64}, CheckpointError, r"model.hidden is 48 there and 64 here"),
        ({"num_layers": 2, "attention": ("mla",)}, CheckpointError, r"model.attention"),
    ],
)
def test_weights_of_another_model_are_refused_before_anything_starts(
    run: RunConfig, tmp_path: Path, change: dict[str, Any], kind: type[Exception], named: str
) -> None:
    config = replace(run, run_dir=str(tmp_path / "run"), model=replace(run.model, **change))
    with pytest.raises(kind, match=named):
        open_training(config)
    assert not (tmp_path / "run").exists()


def test_a_longer_context_may_begin_with_weights_of_a_shorter_one(run: RunConfig, tmp_path: Path) -> None:
    rope = replace(run.model.rope, factor=16.0)
    longer = replace(run.model, max_seq_len=256, rope=rope)
    found = open_training(replace(run, run_dir=str(tmp_path / "run"), model=longer))
    assert found.config.model.rope.factor == 16.0


def test_the_configuration_beside_an_imported_model_is_that_of_its_run(ckpt: Path, run: RunConfig) -> None:
    assert load_yaml(ckpt / "config.yaml").model == run.model


def test_data_of_another_tokenizer_is_refused(run: RunConfig, corpus: Path, tmp_path: Path) -> None:
    model = replace(run.model, vocab_size=300, norm_eps=1e-3)
    config = replace(run, run_dir=str(tmp_path / "run"), data=replace(run.data, path=str(corpus)))
    with pytest.raises(CheckpointError, match=r"model.norm_eps is .* there and 0.001 here"):
        open_training(replace(config, model=model))
    prepare([str(corpus.parent / "text")], tmp_path / "small", vocab_size=260, validation_fraction=0.1)
    config = replace(config, data=replace(run.data, path=str(tmp_path / "small")))
    with pytest.raises(IdentityError, match=r"another tokenizer .* --tokenizer .*checkpoint/tokenizer.json"):
        open_training(config)
