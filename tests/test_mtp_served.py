"""A server that drafts: the same texts over any placement, through the loss of slots, and over HTTP with counts of drafts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_cluster import tiny_run, train
from local_server import LocalServer
from serving_parts import Parts, Service, make_parts, request_of, serving

from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.speculative_engine import SpeculativeEngine
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.errors import ConfigError
from sparseray.model.config import MTPConfig
from sparseray.platform.config import ClusterConfig, ServeConfig
from sparseray.platform.opening import open_serving, serving_inventory
from sparseray.platform.versions import Identity, check_same_model

DRAFTING = ServeConfig(prefill_chunk=8, speculate="mtp")
PLAIN = replace(DRAFTING, speculate="none")
WIDE = ClusterConfig(attention_workers=2, expert_shards=2, memory_shards=2, replication=2, deadline_s=3.0)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a memory and one module, after some steps."""
    config = tiny_run(corpus, steps=12)
    config = replace(config, model=replace(config.model, mtp=MTPConfig(depth=1)))
    found = train(tmp_path_factory.mktemp("trained") / "run", config).folder.newest_checkpoint()
    assert found is not None
    return found


def asked() -> list[GenerationRequest]:
    def prompt(seed: int) -> tuple[int, ...]:
        return tuple(np.random.default_rng(seed).integers(1, 256, 20).tolist())

    return [
        request_of(f"r{seed}", prompt(seed // 2), temperature=(0.0, 0.9)[seed % 2], seed=seed, max_tokens=30)
        for seed in range(6)
    ]


def answers(folder: Path, trained: Path, cluster: ClusterConfig, serve: ServeConfig, **options: Any) -> Any:
    server = LocalServer(folder, trained, cluster, serve=serve)
    try:
        return server.ask(asked(), **options)
    finally:
        server.close()


@pytest.fixture(scope="module")
def expected(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return answers(tmp_path_factory.mktemp("plain") / "s", trained, ClusterConfig(colocated=True), PLAIN)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "cluster", [ClusterConfig(colocated=True), WIDE], ids=["one slot", "two of each role"]
)
def test_texts_are_those_of_a_server_that_drafts_nothing(
    cluster: ClusterConfig, trained: Path, expected: Any, tmp_path: Path
) -> None:
    assert answers(tmp_path / "s", trained, cluster, DRAFTING) == expected


@pytest.mark.long
def test_slots_that_die_change_no_token(trained: Path, expected: Any, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(count: int, server: LocalServer) -> None:
        for at, slot in ((25, 0), (70, 2)):
            if count >= at and slot not in killed:
                killed.append(slot)
                server.fleet.kill(slot)

    assert answers(tmp_path / "s", trained, replace(WIDE, standby=2), DRAFTING, at=kill) == expected
    assert killed == [0, 2], "an engine and an expert shard"


def test_a_server_that_does_not_draft_loads_no_module(trained: Path) -> None:
    with_modules = open_serving(trained, DRAFTING, ClusterConfig(device="cpu"))
    without = open_serving(trained, PLAIN, ClusterConfig(device="cpu"))
    assert (with_modules.model.mtp.depth, without.model.mtp.depth) == (1, 0)
    assert serving_inventory(with_modules).moe_layers == serving_inventory(without).moe_layers + 1
    for config in (with_modules, without):
        check_same_model(trained, config, Identity.of(trained))


def test_drafting_is_refused_where_nothing_can_draft_or_judge(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    plain = train(tmp_path / "run", tiny_run(corpus, steps=1)).folder.newest_checkpoint()
    assert plain is not None
    with pytest.raises(ConfigError, match=r"serve.speculate=mtp: .*model.mtp.depth=0"):
        open_serving(plain, DRAFTING, ClusterConfig())
    config = replace(tiny_run(corpus, steps=1), kernels="reference")
    config = replace(config, model=replace(config.model, mtp=MTPConfig(depth=1)))
    reference = train(tmp_path / "reference", config).folder.newest_checkpoint()
    assert reference is not None
    with pytest.raises(ConfigError, match=r"kernels=reference; .*kernels=auto"):
        open_serving(reference, DRAFTING, ClusterConfig(device="cpu"))


@dataclass
class Drafting(Parts):
    """Parts whose engines draft."""

    def engine(self, **options: Any) -> Engine:
        options = {"max_batch": 8, "prefill_chunk": 16, **options}
        return SpeculativeEngine(self.model, self.experts, self.memory, grammars=self.grammars, **options)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Service, Service]]:
    """A service that drafts, and one that does not."""
    parts = make_parts(mtp=MTPConfig(depth=2))
    with serving(Drafting(**vars(parts))) as drafts, serving(parts) as plain:
        yield drafts, plain


def test_usage_counts_accepted_and_rejected_drafts(pair: tuple[Service, Service]) -> None:
    # A token that nothing can beat: every draft is accepted, and none is made beyond the limit.
    forced = {"logit_bias": {"70": 100}, "max_tokens": 12, "temperature": 0}
    answer = pair[0].complete(**forced)
    details = answer.usage.completion_tokens_details
    assert answer.usage.completion_tokens == 12
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (7, 0)
    chunks = list(pair[0].complete(**forced, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == answer.usage
    assert pair[1].complete(**forced).usage.completion_tokens_details is None
    drawn = pair[0].complete(max_tokens=24, temperature=1.0, seed=4, ignore_eos=True).usage
    details = drawn.completion_tokens_details
    accepted, rejected = details.accepted_prediction_tokens, details.rejected_prediction_tokens
    # Every step has at most two drafts, and one token that is none.
    assert rejected > 10 and accepted + rejected <= 2 * (24 - accepted)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "max_tokens": 24, "logprobs": 3, "echo": True},
        {"temperature": 1.0, "seed": 3, "max_tokens": 40, "stop": ["e", "o"]},
        {"temperature": 0.7, "seed": 5, "max_tokens": 20, "n": 2, "presence_penalty": 0.5, "min_tokens": 3},
        {"temperature": 1.0, "seed": 6, "max_tokens": 30, "guided_regex": "[a-f0-9]{4,12}"},
    ],
    ids=["logprobs", "stop strings", "several", "grammar"],
)
def test_answers_over_http_are_the_same(pair: tuple[Service, Service], fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "the dog", **fields}
    found, expected = (service.post(body).json() for service in pair)
    assert found["choices"] == expected["choices"]
