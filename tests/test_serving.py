"""The HTTP server answers OpenAI clients: same text whatever the load, whole characters, stops never in part."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from local_server import CHUNK, MAX_BATCH, LocalClient, Net, ScriptedClient, serving, text_tokenizer, wait_for
from tokenizers import Tokenizer

from sparseray.actors.engine import Engine
from sparseray.actors.generation import GenerationRequest, TokenEvent
from sparseray.model.decode import greedy

LONG = {"ignore_eos": True}
PROMPT = "rain river stone under winter"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return text_tokenizer()


@pytest.fixture(scope="module")
def net(tokenizer: Tokenizer) -> Net:
    return Net(tokenizer)


@pytest.fixture(scope="module")
def local(net: Net) -> Iterator[LocalClient]:
    client = LocalClient(net.engine())
    yield client
    client.close()


@pytest.fixture(scope="module")
def url(local: LocalClient, tokenizer: Tokenizer) -> Iterator[str]:
    with serving(local, tokenizer) as address:
        yield address


@pytest.fixture(scope="module")
def ai(url: str) -> Iterator[openai.OpenAI]:
    with connect(url) as client:
        yield client


@pytest.fixture(scope="module")
def scripted(tokenizer: Tokenizer) -> Iterator[tuple[ScriptedClient, openai.OpenAI]]:
    client = ScriptedClient()
    with serving(client, tokenizer) as address, connect(address) as ai:
        yield client, ai


@pytest.fixture(autouse=True)
def nothing_stays_open(local: LocalClient) -> Iterator[None]:
    yield
    wait_for(lambda: local.num_open == 0)


def connect(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20.0)


def complete(ai: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "extra_body": LONG} | options
    return ai.completions.create(model="tiny", prompt=prompt, **options)


def chat(ai: openai.OpenAI, **options: Any) -> Any:
    options = {"max_tokens": 12, "seed": 5, "extra_body": LONG} | options
    return ai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "rain river"}], **options
    )


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    """Step an engine until the requests are done."""
    found: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].append(event)
    return found


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


# -- the engine alone --------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 3])
def test_the_engine_gives_the_tokens_of_greedy_decoding_and_of_the_full_forward(
    net: Net, length: int
) -> None:
    prompt = prompt_of(length)
    request = GenerationRequest(
        request_id="a", prompt=prompt, max_tokens=10, temperature=0.0, num_logprobs=0, prompt_logprobs=True
    )
    events = run(net.engine(), request)["a"]
    tokens = [event.token for event in events]
    seams = {"experts": net.experts, "memory": net.memory}
    assert tokens == greedy(net.model, torch.tensor(prompt), 10, chunk=CHUNK, **seams).tolist()
    assert [event.finish_reason for event in events] == [None] * 9 + ["length"]
    text = torch.tensor([*prompt, *tokens])
    with torch.no_grad():
        hidden_TH = net.model(text[None], experts=net.experts, memory=net.memory).hidden_BTH[0]
        logprobs_TV = torch.log_softmax(net.model.logits(hidden_TH).double(), -1)
    scores = [*events[0].prompt_logprobs, *(event.logprobs for event in events)]
    assert [score.token for score in scores] == text[1:].tolist()
    expected = logprobs_TV[:-1].gather(1, text[1:, None])[:, 0]
    found = torch.tensor([score.logprob for score in scores], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    best = logprobs_TV[length - 1 : -1].max(-1).values
    torch.testing.assert_close(found[length - 1 :], best, rtol=1e-4, atol=1e-4)


def test_a_request_has_the_same_bits_alone_and_among_others_that_come_and_go(net: Net) -> None:
    request = GenerationRequest(request_id="a", prompt=prompt_of(21), max_tokens=15, seed=3, num_logprobs=4)
    alone = run(net.engine(), request)["a"]
    others = [
        GenerationRequest(request_id=f"b{i}", prompt=prompt_of(1 + 9 * i, i), max_tokens=2 + 5 * i, seed=i)
        for i in range(5)
    ]
    engine = net.engine(max_batch=4)
    assert run(engine, *others[:3], request, *others[3:])["a"] == alone
    assert engine.largest_batch == 4
    assert len({event.token for event in alone}) > 3, "a text of one token shows nothing"


def test_the_seed_and_nothing_else_decides_a_draw(net: Net) -> None:
    texts = []
    for seed in (1, 1, 2):
        request = GenerationRequest(request_id="a", prompt=prompt_of(5), max_tokens=12, seed=seed)
        texts.append([event.token for event in run(net.engine(), request)["a"]])
    assert texts[0] == texts[1] != texts[2]


def test_the_engine_refuses_what_cannot_fit(net: Net) -> None:
    engine = net.engine()
    for prompt, max_tokens in (((), 3), (prompt_of(200), 1)):
        with pytest.raises(ValueError, match="do not fit"):
            engine.add(GenerationRequest(request_id="a", prompt=prompt, max_tokens=max_tokens))
    assert not engine.has_work


# -- what a client sees ------------------------------------------------------------------------


def test_models_health_and_metrics(ai: openai.OpenAI, url: str) -> None:
    assert [model.id for model in ai.models.list()] == ["tiny"]
    assert httpx.get(f"{url}/health").status_code == 200
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE sparseray_requests_running gauge" in answer.text


def test_a_completion_carries_text_reason_and_usage(ai: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = complete(ai)
    count = len(tokenizer.encode(PROMPT).ids)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == (
        "text_completion",
        "tiny",
        "length",
    )
    assert answer.choices[0].text and answer.choices[0].logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (count, 12, count + 12)


def test_a_chat_answer_is_the_completion_of_its_readable_lines(ai: openai.OpenAI) -> None:
    answer = chat(ai)
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    assert answer.choices[0].message.content == complete(ai, "user: rain river\nassistant:").choices[0].text
    parts = [{"type": "text", "text": "rain "}, {"type": "text", "text": "river"}]
    again = ai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_completion_tokens=12, seed=5, extra_body=LONG
    )  # fmt: skip
    assert again.choices[0].message.content == answer.choices[0].message.content


@pytest.mark.parametrize(
    "options", [{}, {"n": 3}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1}]
)
def test_a_streamed_completion_equals_the_whole_one(ai: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = complete(ai, **options)
    text, reasons, logprobs = {}, {}, {}
    chunks = list(complete(ai, stream=True, stream_options={"include_usage": True}, **options))
    for chunk in chunks[:-1]:
        assert chunk.id == chunks[0].id and chunk.usage is None
        (choice,) = chunk.choices
        text[choice.index] = text.get(choice.index, "") + choice.text
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        if choice.logprobs:
            into = logprobs.setdefault(choice.index, {})
            for name, values in choice.logprobs.model_dump().items():
                into.setdefault(name, []).extend(values)
    for choice in whole.choices:
        assert text[choice.index] == choice.text
        assert reasons[choice.index] == choice.finish_reason
        assert logprobs.get(choice.index) == (choice.logprobs.model_dump() if choice.logprobs else None)
    assert len(text) == len(whole.choices)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_a_streamed_chat_equals_the_whole_one(ai: openai.OpenAI) -> None:
    whole = chat(ai, logprobs=True, top_logprobs=2, n=2)
    text, content = {0: "", 1: ""}, {0: [], 1: []}
    chunks = list(chat(ai, logprobs=True, top_logprobs=2, n=2, stream=True))
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert {chunk.choices[0].delta.role for chunk in chunks[:2]} == {"assistant"}
    for chunk in chunks:
        (choice,) = chunk.choices
        text[choice.index] += choice.delta.content or ""
        content[choice.index] += choice.logprobs.content if choice.logprobs else []
    for choice in whole.choices:
        assert text[choice.index] == choice.message.content
        assert content[choice.index] == choice.logprobs.content
        assert len(choice.logprobs.content) == 12 and len(choice.logprobs.content[0].top_logprobs) == 2


def test_logprobs_are_those_of_the_tokens_most_probable_first(ai: openai.OpenAI) -> None:
    choice = complete(ai, temperature=0.0, logprobs=3).choices[0]
    scores = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 12
    for logprob, top in zip(scores.token_logprobs, scores.top_logprobs):
        assert logprob == max(top.values()) and list(top.values()) == sorted(top.values(), reverse=True)
    assert scores.text_offset[0] == 0


def test_echo_scores_the_prompt_without_generating(ai: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = complete(ai, echo=True, logprobs=1, max_tokens=0)
    ids = tokenizer.encode(PROMPT).ids
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (PROMPT, "length", 0)
    assert "".join(choice.logprobs.tokens) == PROMPT and len(choice.logprobs.tokens) == len(ids)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert all(score < 0 for score in choice.logprobs.token_logprobs[1:])
    longer = complete(ai, echo=True, logprobs=1, max_tokens=3).choices[0].logprobs
    assert longer.token_logprobs[: len(ids)] == choice.logprobs.token_logprobs
    assert len(longer.tokens) == len(ids) + 3
    assert complete(ai, echo=True, max_tokens=4).choices[0].text.startswith(PROMPT)


def test_prompts_may_be_texts_ids_and_lists_of_either(ai: openai.OpenAI, tokenizer: Tokenizer) -> None:
    second = "green"
    one, two = (tokenizer.encode(text).ids for text in (PROMPT, second))
    expected = [complete(ai, text).choices[0].text for text in (PROMPT, second)]
    assert complete(ai, one).choices[0].text == expected[0]
    for prompts in ([PROMPT, second], [one, two]):
        answer = complete(ai, prompts)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == len(one) + len(two)
    answer = complete(ai, [PROMPT, PROMPT], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[2].text != answer.choices[1].text
    assert answer.usage.prompt_tokens == 2 * len(one) and answer.usage.completion_tokens == 48


def test_a_text_is_the_same_alone_and_under_load_and_requests_share_a_batch(
    ai: openai.OpenAI, local: LocalClient
) -> None:
    alone = complete(ai, logprobs=2)
    others = [alone.choices[0].text + "stone " * i for i in range(1, MAX_BATCH)]
    with ThreadPoolExecutor(MAX_BATCH) as pool:
        with local.held(until_open=MAX_BATCH):
            loaded: Future[Any] = pool.submit(complete, ai, logprobs=2)
            rest = [
                pool.submit(complete, ai, text, seed=i, stream=i % 2 == 0) for i, text in enumerate(others)
            ]
        assert loaded.result().choices == alone.choices
        for future in rest:
            assert future.result()
    assert local.engine.largest_batch == MAX_BATCH


# -- text --------------------------------------------------------------------------------------


def stream_of(ai: openai.OpenAI, **options: Any) -> tuple[list[str], str | None]:
    """The streamed pieces of text and the last finish reason."""
    chunks = list(complete(ai, stream=True, **options))
    return [chunk.choices[0].text for chunk in chunks], chunks[-1].choices[0].finish_reason


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("rain; river; stone", ";", "rain"),
        ("rain\n\nriver", "\n\n", "rain"),
        ("a§§§b", "§§§", "a"),
        ("a§§b§§§c", "§§§", "a§§b"),
        ("rain river stone", ["ver st", "stone"], "rain ri"),
        ("xxxxy", "xxy", "xx"),
        ("rain riv", "river", "rain riv"),
        ("日本語です", "語で", "日本"),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_never_sent_in_part(
    scripted: tuple[ScriptedClient, openai.OpenAI],
    tokenizer: Tokenizer,
    text: str,
    stop: str | list[str],
    expected: str,
) -> None:
    client, ai = scripted
    client.tokens = tokenizer.encode(text).ids
    is_found = expected != text
    choice = complete(ai, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (expected, "stop" if is_found else "length")
    assert client.sent < len(client.tokens) or text.endswith(stop[-1]) or not is_found
    pieces, reason = stream_of(ai, stop=stop)
    assert ("".join(pieces), reason) == (expected, choice.finish_reason)


def test_characters_that_are_split_over_tokens_are_streamed_whole(
    scripted: tuple[ScriptedClient, openai.OpenAI], tokenizer: Tokenizer
) -> None:
    client, ai = scripted
    text = "é日本 👩‍👩‍👧 naïve ∀x"
    client.tokens = tokenizer.encode(text).ids
    assert len(client.tokens) > len(text) + 5, "the characters must be split"
    pieces, _ = stream_of(ai)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10
    # An answer that ends in the middle of a character says so, once.
    client.tokens = client.tokens[:1] + tokenizer.encode("日").ids[:2]
    pieces, _ = stream_of(ai)
    assert "".join(pieces) == complete(ai).choices[0].text
    assert "".join(pieces).endswith("\ufffd")


def test_the_end_of_text_token_stops_and_is_not_text(
    net: Net, ai: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    prompt = prompt_of(9)
    for seed in range(40):
        request = GenerationRequest(
            request_id="a", prompt=prompt, max_tokens=30, temperature=3.0, seed=seed, stop_token_ids=(0,)
        )
        tokens = [event.token for event in run(net.engine(), request)["a"]]
        if tokens[-1] == 0:
            break
    assert tokens[-1] == 0, "no seed drew the end of text"
    options = {"max_tokens": 30, "temperature": 3.0, "seed": seed, "extra_body": {}}
    answer = complete(ai, list(prompt), **options)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == tokenizer.decode(tokens[:-1])
    assert answer.usage.completion_tokens == len(tokens)
    assert complete(ai, list(prompt), **options | {"extra_body": LONG}).choices[0].finish_reason == "length"
