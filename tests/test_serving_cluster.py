"""`sparseray serve` as a process: a checkpoint on shards, other weights, faults while streams go on, and Ctrl-C leaves nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from background import Background, end_leftovers, environment, free_ports, marked, sparseray
from local_cluster import tiny_run, train
from paged_runs import greedy
from processes import wait_until
from tokenizers import Tokenizer

from sparseray.jobs.serve import main
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer
from sparseray.platform.checks import check_cluster
from sparseray.platform.config import ClusterConfig, ServeConfig
from sparseray.platform.opening import open_serving, serving_inventory
from sparseray.platform.run import checkpoint

PROMPT = "rain river stone"


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of a run's two checkpoints, of the steps 2 and 4."""
    config = tiny_run(corpus, steps=4)
    every_two = replace(config, train=replace(config.train, checkpoint_every=2))
    return train(tmp_path_factory.mktemp("served"), every_two).folder.checkpoints / "step_2"


@dataclass
class Served:
    """A server, its port, and the environment by which its processes are known."""

    server: Background
    port: int
    env: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, timeout: float = 30.0) -> openai.OpenAI:
        """OpenAI's client of it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout)

    def told(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a command says that is given beside it."""
        return sparseray(*words, env=self.env)

    def settled(self) -> dict[str, Any]:
        """Its status once the plan is as wanted, with all replicas and a standby slot."""
        found: dict[str, Any] = {}

        def is_settled() -> bool:
            done = self.told("status", "--json")
            found.update(json.loads(done.stdout) if done.returncode == 0 else {})
            replicas, slots = found.get("replicas", {}), found.get("slots", [])
            is_full = bool(replicas) and replicas["actual"] >= replicas["target"]
            is_spare = any(slot["roles"] == ["standby"] for slot in slots)
            return done.returncode == 0 and found["settled"] and is_full and is_spare

        wait_until(is_settled, "all replicas and a standby slot", 60.0)
        return found


@contextmanager
def serving(checkpoint: Path, **cluster: int) -> Iterator[Served]:
    """Serve as a process; when the block ends nothing of it may be left."""
    env, (port,) = environment(), free_ports(1)
    options = [f"--cluster.{name}={value}" for name, value in cluster.items()]
    command = [
        sys.executable,
        "-m",
        "sparseray",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        str(port),
    ]
    server = Background([*command, *options], env)
    try:
        server.wait_for("Ctrl-C stops", 90.0)
        yield Served(server, port, env)
    finally:
        server.terminate()
        left = end_leftovers(env)
    assert not left


@pytest.fixture(scope="module")
def served(trained: Path) -> Iterator[Served]:
    """A server with two of each role; the last test that takes it ends it."""
    sizes = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2}
    with serving(trained, **sizes, replication=2, standby=1, hang_s=5) as found:
        yield found


def expected_text(directory: Path, tokenizer: Tokenizer, count: int) -> str:
    """Greedy continuation by the plain path in this process, from the checkpoint's tensors."""
    config = open_serving(directory, ServeConfig(), ClusterConfig()).model
    layout = DSELayout.load(directory)
    model, experts = Transformer(config, layout), LocalExperts(config)
    memory = LocalMemory(config, layout)
    with torch.no_grad():
        for part in (model, experts, memory):
            own = part.tensors() if part is experts else dict(part.named_parameters())
            own |= {name: b for name, b in part.named_buffers() if name.endswith("router_bias")}
            for name, tensor in checkpoint.read_tensors(str(directory), list(own)).items():
                own[name].copy_(tensor.view_as(own[name]))
    prompt = torch.tensor(tokenizer.encode(PROMPT).ids)
    tokens = greedy(model, prompt, count, experts=experts, memory=memory)
    return str(tokenizer.decode(tokens.tolist()))


def complete(ai: openai.OpenAI, **options: Any) -> Any:
    options = {"prompt": PROMPT, "max_tokens": 12, "seed": 3, "extra_body": {"ignore_eos": True}} | options
    return ai.completions.create(model="sparseray", **options)


def check_answers(ai: openai.OpenAI, directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert [model.id for model in ai.models.list()] == ["sparseray"]
    greedy_text = complete(ai, temperature=0.0).choices[0].text
    assert greedy_text == expected_text(directory, tokenizer, 12)
    alone = complete(ai, logprobs=1).choices[0]
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(complete, ai, prompt="green " * i, seed=i) for i in (1, 2, 3)]
        assert pool.submit(complete, ai, logprobs=1).result().choices[0] == alone
        assert all(other.result().usage.completion_tokens == 12 for other in others)
    stream = complete(ai, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == alone.text
    assert chunks[-1].usage.completion_tokens == 12
    chat = ai.chat.completions.create(
        model="sparseray", messages=[{"role": "user", "content": "rain"}], max_tokens=4, temperature=0
    )
    assert chat.choices[0].message.role == "assistant"


@pytest.mark.ray
def test_a_checkpoint_is_served_over_shards(
    served: Served, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert httpx.get(f"{served.url}/health").status_code == 200
    with served.client() as ai:
        check_answers(ai, trained)
        metrics = httpx.get(f"{served.url}/metrics").text
        long = complete(ai, max_tokens=48, stream=True)
        next(iter(long))
        long.response.close()
    for line in (
        "request_latency_seconds_count 8.0",
        "prompt_tokens_total",
        "first_token_seconds_bucket",
    ):
        assert line in metrics
    assert main(["--checkpoint", str(trained), "--port", str(served.port)]) == 2
    assert f"cannot listen on 127.0.0.1:{served.port}" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.ray
def test_a_server_takes_other_weights_and_its_answers_name_them(
    served: Served, trained: Path, tmp_path: Path
) -> None:
    other = str(trained.with_name("step_4"))
    with served.client() as ai:
        assert complete(ai).system_fingerprint.startswith("step_2-")
        done = served.told("publish", "--checkpoint", str(tmp_path))
        assert done.returncode == 2 and "is not a checkpoint" in done.stderr, done.stderr
        done = served.told("publish", "--checkpoint", other)
        assert done.returncode == 0 and done.stdout.startswith("step_4-"), done.stdout + done.stderr
        served.server.wait_for("*** published: step_4-", 30.0)
        assert complete(ai).system_fingerprint.startswith("step_4-")
    (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert model["version"].startswith("step_4-")
    status = json.loads(served.told("status", "--json").stdout)
    assert [name.partition("-")[0] for name in status["versions"]] == ["step_4"]
    output = served.server.output
    assert "Traceback" not in output and "ERROR" not in output, output


BLOWS = (
    (signal.SIGKILL, ("attention", "expert"), 1),
    (signal.SIGSTOP, ("attention", "expert"), 2),
    (signal.SIGKILL, ("memory", "standby"), 1),
)
"""A signal, the roles that get it, and the expert shards that are wanted meanwhile."""


@pytest.mark.ray
def test_every_role_is_killed_or_hangs_and_is_scaled_and_the_scheduler_dies_while_streams_go_on(
    served: Served,
) -> None:
    with served.client(60.0) as ai:
        expected = [complete(ai, max_tokens=40, seed=seed).choices[0].text for seed in range(4)]
        for round_, (number, roles, experts) in enumerate(BLOWS, start=1):
            assert hurt_while_they_go_on(served, ai, number, roles, experts) == expected
            assert httpx.get(f"{served.url}/ready").json() == {"status": "ok"}
            wait_until(
                lambda n=round_: served.server.output.count("*** recovered") >= n, "the recovery", 60.0
            )
        streams = [complete(ai, max_tokens=40, seed=seed, stream=True) for seed in range(4)]
        begun = [next(iter(stream)).choices[0].text for stream in streams]
        (scheduler,) = [p for p in marked(served.env) if "ray::Scheduler" in " ".join(p.cmdline())]
        scheduler.kill()
        rest = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
        assert [first + later for first, later in zip(begun, rest, strict=True)] == expected
        served.settled()
        assert complete(ai, max_tokens=40, seed=0).choices[0].text == expected[0]
    assert "*** lost" in served.server.output


def hurt_while_they_go_on(
    served: Served, ai: openai.OpenAI, number: int, roles: tuple[str, ...], experts: int
) -> list[str]:
    """Hurt a slot of each of some roles and scale the experts while streams are read; returns the streams' texts."""
    slots = served.settled()["slots"]
    streams = [complete(ai, max_tokens=40, seed=seed, stream=True) for seed in range(4)]
    begun = [next(iter(stream)).choices[0].text for stream in streams]
    for role in roles:
        victim = next(slot for slot in slots if slot["roles"][:1] == [role])
        os.kill(victim["pid"], number)
    with ThreadPoolExecutor(len(streams) + 1) as pool:
        scaled = pool.submit(served.told, "scale", "experts", str(experts))
        rest = list(pool.map(lambda stream: "".join(chunk.choices[0].text for chunk in stream), streams))
        assert scaled.result().returncode == 0, scaled.result().stderr
    return [first + later for first, later in zip(begun, rest, strict=True)]


@pytest.mark.ray
def test_ctrl_c_cuts_nothing_that_is_in_flight_and_leaves_nothing_running(
    served: Served, trained: Path
) -> None:
    before = len(served.server.output)
    with served.client() as ai, ThreadPoolExecutor(1) as pool:
        stream = complete(ai, max_tokens=48, stream=True)
        next(iter(stream))
        ended = pool.submit(served.server.interrupt)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert ended.result() == 0, served.server.output
    output = served.server.output[before:]
    assert output.rstrip().endswith("stopped")
    # Ray has words of its own about the slots that were killed before.
    assert "Traceback" not in output and " ERROR sparseray" not in output, output
    assert not end_leftovers(served.env)
    done = served.told("publish", "--checkpoint", str(trained))
    assert done.returncode == 2 and "no server runs" in done.stderr, done.stderr


def test_what_cannot_be_served_is_told_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "step_2"
    shutil.copytree(trained, copy)
    (copy / "tokenizer.json").unlink()
    for path in (tmp_path / "nowhere", tmp_path, copy):
        assert main(["--checkpoint", str(path)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and str(path) in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cluster.expert_shards", "99"], ["cluster.expert_shards=99", "8 experts", "1 to 8"]),
        (["--cluster.memory_shards", "7"], ["cluster.memory_shards=7", "6 buckets"]),
        (["--cluster.attention_workers", "0"], ["cluster.attention_workers=0", "at least 1"]),
        (["--cluster.replication", "4"], ["cluster.replication=4", "1 to 3"]),
        (["--serve.max_batch", "0"], ["serve.max_batch=0", "at least 1"]),
        (["--serve.prefill_chunk", "0"], ["serve.prefill_chunk=0"]),
        (["--port", "70000"], ["port=70000", "65535"]),
        (["--host", "192.0.2.1"], ["192.0.2.1"]),
        (["--host", "nowhere.invalid"], ["nowhere.invalid"]),
        (["--port", "-1"], ["port=-1"]),
        (["--serve.max_waiting", "-3"], ["serve.max_waiting=-3"]),
        (["--serve.drain_s", "-1"], ["serve.drain_s=-1"]),
        (["--serve.max_model_len", "100000"], ["serve.max_model_len=100000"]),
        (["--serve.max_model_len", "-2"], ["serve.max_model_len=-2"]),
        (["--tls_certificate", "/nowhere"], ["/nowhere"]),
        (["--root_path", "x"], ["--root_path"]),
        (["--serve.ignore_unknown_fields", "no"], ["ignore_unknown_fields must be true or false", "'no'"]),
    ],
)
def test_what_cannot_be_started_is_told_before_ray(
    trained: Path,
    options: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparseray.platform import cluster

    monkeypatch.setattr(cluster, "_connect", lambda *_, **__: pytest.fail("Ray was started"))
    assert main(["--checkpoint", str(trained), *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and all(word in err for word in words), err


def test_a_server_may_have_more_engines_than_training_had_parts(trained: Path) -> None:
    """The run had 4 logical shards; they say nothing about how many engines may answer."""
    serve, cluster = ServeConfig(), ClusterConfig(attention_workers=7, expert_shards=2)
    config = open_serving(trained, serve, cluster)
    plan = check_cluster(cluster, serving_inventory(config))
    assert plan.attention == plan.part_owners == tuple(range(7))


def test_a_checkpoint_names_the_token_that_ends_a_text(trained: Path) -> None:
    config = json.loads((trained / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    model = open_serving(trained, ServeConfig(), ClusterConfig()).model
    assert tokenizer.token_to_id(config["eos_token"]) == model.dse.document_end_id
    assert config["model_max_length"] == model.max_seq_len
