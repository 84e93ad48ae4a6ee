"""Other people's clients, each run by the Python that has them: `python client_programs.py NAME URL FOLDER`.

They are installed in an environment of their own (`make clients`), for their requirements are not ours. A program
prints one line of JSON that the test reads.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

SCHEMA = {"type": "object", "properties": {"to": {"enum": ["A", "B"]}}, "required": ["to"]}
TOOLS = [{"type": "function", "function": {"name": "go", "description": "Go.", "parameters": SCHEMA}}]
USER = [{"role": "user", "content": "hi"}]
TEXT = "the quick brown fox jumps over the lazy dog; " * 2


def litellm(url: str, _: pathlib.Path) -> dict[str, Any]:
    """Chats, streams, completions, parameters of vLLM, a required call, and the error of a long prompt."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm as lib

    common: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": 6, "num_retries": 0}
    chat = lib.completion(
        model="openai/tiny", messages=USER, seed=1, presence_penalty=0.1, user="me", **common
    )
    options = {"include_usage": True}
    stream = lib.completion(model="openai/tiny", messages=USER, seed=1, presence_penalty=0.1, stream=True, stream_options=options, **common)  # fmt: skip
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    vllm = lib.completion(model="hosted_vllm/tiny", messages=USER, top_k=5, min_p=0.1, **common)
    text = lib.text_completion(
        model="text-completion-openai/tiny", prompt="hi", echo=True, logprobs=1, **common
    )
    called = lib.completion(model="openai/tiny", messages=USER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **{**common, "max_tokens": 99})  # fmt: skip
    try:
        lib.completion(model="openai/tiny", messages=[{"role": "user", "content": "hi " * 5000}], **common)
        refused = ""
    except lib.ContextWindowExceededError as error:
        refused = type(error).__name__
    return {
        "same": "".join(pieces) == chat.choices[0].message.content,
        "tokens": vllm.usage.completion_tokens,
        "echo": text.choices[0].text[:2],
        "call": json.loads(called.choices[0].message.tool_calls[0].function.arguments)["to"] in "AB",
        "refused": refused,
    }


def langchain(url: str, _: pathlib.Path) -> dict[str, Any]:
    """Invokes, streams, structured outputs by schema and by call, and a history with calls and answers."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="tiny", max_tokens=99, temperature=0, max_retries=0
    )
    schema = {"title": "where", "description": "where", **SCHEMA}
    bound = chat.bind_tools(TOOLS, tool_choice="any", parallel_tool_calls=False)
    called = bound.invoke("go")
    answers = [ToolMessage("done", tool_call_id=call["id"]) for call in called.tool_calls]
    after = chat.invoke([HumanMessage("go"), called, *answers])
    return {
        "same": "".join(str(piece.content) for piece in chat.stream("hi")) == chat.invoke("hi").content,
        "schema": chat.with_structured_output(schema, method="json_schema").invoke("where?")["to"] in "AB",
        "function": chat.with_structured_output(schema, method="function_calling").invoke("where?")["to"]
        in "AB",
        "calls": [call["name"] for call in called.tool_calls],
        "after": bool(after.content),
    }


def lm_eval(url: str, folder: pathlib.Path) -> dict[str, Any]:
    """Log-likelihoods, rolling ones and generation, with tasks of a file and the checkpoint's tokenizer."""
    rows = [{"q": "the dog", "choices": [" sleeps", " jumps over"], "gold": 0, "text": TEXT}] * 3
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = f"dataset_path: json\ndataset_kwargs:\n  data_files: {folder / 'rows.jsonl'}\ntest_split: train\n"
    tasks = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list:\n- metric: acc\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n- metric: bits_per_byte\n",
        "generate": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: x\ngeneration_kwargs:\n  until: ['e']\n  max_gen_toks: 8\n  do_sample: false\nmetric_list:\n- metric: exact_match\n",
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: our_{name}\n{base}{task}")
    model = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={folder},max_length=256"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
    command += ["--include_path", str(folder), "--tasks", ",".join(f"our_{name}" for name in tasks)]
    command += ["--output_path", str(folder / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HOME": str(folder)}
    subprocess.run(
        command, check=True, env={**os.environ, **offline}, stdout=subprocess.DEVNULL, stderr=sys.stderr
    )
    (report,) = (folder / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    return {
        "acc": results["our_choice"]["acc,none"],
        "bits_per_byte": results["our_rolling"]["bits_per_byte,none"],
        "generated": "exact_match,none" in results["our_generate"],
    }


def guidellm(url: str, folder: pathlib.Path) -> dict[str, Any]:
    """A load of twelve streams, four at a time, without a tokenizer."""
    rows = [{"prompt": f"the dog {i}", "output_tokens_count": 8} for i in range(12)]
    (folder / "load.jsonl").write_text("\n".join(map(json.dumps, rows)))
    program = str(pathlib.Path(sys.executable).with_name("guidellm"))
    command = [program, "run", "--backend", f"kind=openai_http,target={url},model=tiny"]
    command += ["--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12"]
    command += ["--data", f"kind=json_file,path={folder / 'load.jsonl'}"]
    command += ["--output", f"kind=json,path={folder / 'load.json'}"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    (run,) = json.loads((folder / "load.json").read_text())["benchmarks"]
    totals = run["metrics"]["request_totals"]
    return {"successful": totals["successful"], "errored": totals["errored"]}


def generated(url: str, folder: pathlib.Path) -> dict[str, Any]:
    """A client that openapi-python-client makes of the server's own description."""
    program = str(pathlib.Path(sys.executable).with_name("openapi-python-client"))
    command = [program, "generate", "--url", f"{url}/openapi.json", "--meta", "none"]
    made = subprocess.run([*command, "--output-path", str(folder / "made")], check=True, capture_output=True)
    sys.path.insert(0, str(folder))
    import importlib

    def call(operation: str, *given: Any, **named: Any) -> Any:
        found = importlib.import_module(f"made.api.default.{operation}")
        return found.sync(*given, client=client, **named)

    models, client = importlib.import_module("made.models"), importlib.import_module("made").Client(url)
    body = models.CompletionRequest(prompt="hi", max_tokens=6, seed=1, stop=["zz"])
    text = call("create_completion", body=body)
    raw = {"prompt": "hi", "max_tokens": 6, "seed": 1, "stop": ["zz"]}
    message = models.ChatRequestMessagesType0Item.from_dict(USER[0])
    chat = call("create_chat_completion", body=models.ChatRequest(messages=[message], max_tokens=6))
    tokens = call("tokenize", body=models.TokenizeRequest(prompt=TEXT))
    return {
        "left out": b"WARNING" in made.stdout + made.stderr,
        "same": text.choices[0].text == _post(f"{url}/v1/completions", raw)["choices"][0]["text"],
        "chat": chat.choices[0].message.role,
        "back": call("detokenize", body=models.DetokenizeRequest(tokens=tokens.tokens)).prompt == TEXT,
        "models": [model.id for model in call("list_models").data],
        "refused": call("create_completion", body=models.CompletionRequest(prompt=[])).error.type_,
    }


def _post(url: str, body: dict[str, Any]) -> Any:
    import urllib.request

    head = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), head)) as answer:
        return json.load(answer)


if __name__ == "__main__":
    program = {f.__name__: f for f in (litellm, langchain, lm_eval, guidellm, generated)}[sys.argv[1]]
    print(json.dumps(program(sys.argv[2], pathlib.Path(sys.argv[3]))))
