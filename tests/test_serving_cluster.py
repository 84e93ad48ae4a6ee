"""`sparseray serve` as a process: a checkpoint on two expert and two memory shards, and Ctrl-C leaves nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from background import Background, end_leftovers, environment, free_ports
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
    """The checkpoint of a run of two steps."""
    folder = train(tmp_path_factory.mktemp("served"), tiny_run(corpus, steps=2)).folder
    newest = folder.newest_checkpoint()
    assert newest is not None
    return newest


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
def test_a_checkpoint_is_served_over_shards_and_ctrl_c_leaves_nothing_running(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env, (port,) = environment(), free_ports(1)
    shards = ["--cluster.expert_shards", "2", "--cluster.memory_shards", "2"]
    command = [sys.executable, "-m", "sparseray", "serve", "--checkpoint", str(trained), "--port", str(port)]
    server = Background([*command, *shards], env)
    try:
        server.wait_for("Ctrl-C stops", 60.0)
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, server)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30.0) as ai:
            check_answers(ai, trained)
            metrics = httpx.get(f"{url}/metrics").text
            long = complete(ai, max_tokens=48, stream=True)
            next(iter(long))
            long.response.close()
        for line in (
            "request_latency_seconds_count 8.0",
            "prompt_tokens_total",
            "first_token_seconds_bucket",
        ):
            assert line in metrics
        assert main(["--checkpoint", str(trained), "--port", str(port)]) == 2
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
        # Ctrl-C cuts nothing that is in flight.
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30.0) as ai,
            ThreadPoolExecutor(1) as pool,
        ):
            stream = complete(ai, max_tokens=48, stream=True)
            next(iter(stream))
            ended = pool.submit(server.interrupt)
            assert list(stream)[-1].choices[0].finish_reason == "length"
            assert ended.result() == 0, server.output
        assert server.output.rstrip().endswith("stopped")
        assert "Traceback" not in server.output and "ERROR" not in server.output, server.output
    finally:
        server.terminate()
        left = end_leftovers(env)
    assert not left


@pytest.mark.ray
def test_engines_and_shards_are_killed_or_hang_and_are_scaled_while_streams_go_on(trained: Path) -> None:
    env, (port,) = environment(), free_ports(1)
    sizes = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 1}
    spare = {"replication": 2, "standby": 1, "hang_s": 5}
    options = [f"--cluster.{name}={value}" for name, value in (sizes | spare).items()]
    command = [sys.executable, "-m", "sparseray", "serve", "--checkpoint", str(trained), "--port", str(port)]
    server = Background([*command, *options], env)
    try:
        server.wait_for("Ctrl-C stops", 90.0)
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60.0
        ) as ai:
            expected = [complete(ai, max_tokens=40, seed=seed).choices[0].text for seed in range(4)]
            for round_, (number, experts) in enumerate(((signal.SIGKILL, 1), (signal.SIGSTOP, 2)), start=1):
                streams = [complete(ai, max_tokens=40, seed=seed, stream=True) for seed in range(4)]
                assert hurt_while_they_go_on(streams, number, experts, env) == expected
                assert httpx.get(f"http://127.0.0.1:{port}/ready").json() == {"status": "ok"}
                wait_until(lambda n=round_: server.output.count("*** recovered") >= n, "the recovery", 60.0)
        assert "*** lost" in server.output
        assert server.interrupt() == 0, server.output
    finally:
        server.terminate()
        left = end_leftovers(env)
    assert not left


def hurt_while_they_go_on(streams: list[Any], number: int, experts: int, env: dict[str, str]) -> list[str]:
    """Hurt an engine and an expert shard and scale the experts while streams are read; returns their texts."""
    command = [sys.executable, "-m", "sparseray"]
    status = subprocess.run([*command, "status", "--json"], env=env, check=True, capture_output=True).stdout
    begun = [next(iter(stream)).choices[0].text for stream in streams]
    for role in ("attention", "expert"):
        victim = next(slot for slot in json.loads(status)["slots"] if slot["roles"][:1] == [role])
        os.kill(victim["pid"], number)
    scale = [*command, "scale", "experts", str(experts)]
    with ThreadPoolExecutor(len(streams) + 1) as pool:
        scaled = pool.submit(subprocess.run, scale, env=env, check=True, capture_output=True)
        rest = list(pool.map(lambda stream: "".join(chunk.choices[0].text for chunk in stream), streams))
        scaled.result()
    return [first + later for first, later in zip(begun, rest, strict=True)]


def wait_until_healthy(url: str, server: Background) -> None:
    for _ in range(200):
        assert server.process.poll() is None, server.output
        try:
            assert httpx.get(f"{url}/health").status_code == 200
            return
        except httpx.ConnectError:
            pass
    raise AssertionError("the server does not listen")


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
