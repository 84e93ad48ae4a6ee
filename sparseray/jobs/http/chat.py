r"""Conversations as token ids: by the checkpoint's chat template, or by a plain one.

A checkpoint's template is Jinja, as Hugging Face writes it (`chat_template.jinja`, or in tokenizer_config.json);
it runs in a sandbox, for so many steps (template.py). Added tokens that the template writes are such, those that a
message spells are text; in what the assistant said `</think>` and the like stay, as templates look for them.

The plain template: the messages joined by line feeds as `role: content`, then `assistant:`, so
`system: ...\nuser: ...\nassistant:`. Calls of an assistant follow its content as one line of JSON, and tools are a
first line of their own. A line of a message that begins like a role's is indented, so that no message can forge
a turn. Unless `ignore_eos` is set, an answer also ends before `\nuser:`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from sparseray.errors import CheckpointError
from sparseray.jobs.http.api_error import ApiError
from sparseray.jobs.http.fields import Values, check_members
from sparseray.jobs.http.prompts import check_text
from sparseray.jobs.http.template import Template, to_json
from sparseray.jobs.http.text_stream import Vocabulary
from sparseray.platform.run.texts import CHAT_TEMPLATE, HUB_CONFIG, TOKENIZER_CONFIG

ROLES = ("system", "developer", "user", "assistant", "tool")
CHAT_STOP = "\nuser:"
_TURN = re.compile(rf"(?im)^(?=({'|'.join(ROLES)})[ \t]*:)")
MEMBERS = ("role", "content", "name", "tool_calls", "tool_call_id")
EMPTY_MEMBERS = ("refusal", "annotations", "audio", "function_call", "reasoning", "reasoning_content")
"""Members of a message that are read, and those that an answer given back may have where nothing is in them."""
Message = dict[str, Any]
LACKING = (
    f"this model came without a chat template; ask /v1/completions, or have {CHAT_TEMPLATE} put into the checkpoint's "
    "folder and the server started again"
)
REFUSALS = (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, AttributeError)
"""What an expression of a template may raise."""


class ChatTemplate:
    """How a conversation becomes text.

    Args:
        source: a Jinja template; None for the plain one.
        special_tokens: name to text (bos_token, eos_token, ...), for the template.
        is_lacking: refuse every conversation: how the model was taught to hold one is not known.
        begin: name of the token that stands before every text that is no conversation; empty for none.

    Raises:
        CheckpointError: the template is not Jinja, or reads files.
    """

    def __init__(
        self,
        source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        *,
        is_lacking: bool = False,
        begin: str = "",
    ) -> None:
        self.begin = begin
        self.source, self._special_tokens, self._is_lacking = source, dict(special_tokens or {}), is_lacking
        self.stops = (CHAT_STOP,) if source is None else ()
        self._template = None if source is None else Template(source)

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate:
        """Read a checkpoint's template; the plain one where it has none, but for a model that was trained elsewhere.

        Args:
            directory: of a checkpoint, or of a model that is to be imported.

        Raises:
            CheckpointError: what is there cannot be read, or runs without end.
        """
        config: Any = {}
        try:
            if (directory / TOKENIZER_CONFIG).exists():
                config = json.loads((directory / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
            own = directory / CHAT_TEMPLATE
            source = own.read_text(encoding="utf-8") if own.exists() else config.get("chat_template")
            if isinstance(source, list):  # named templates: the one called default
                source = next((one["template"] for one in source if one.get("name") == "default"), None)
            names = ("bos_token", "eos_token", "pad_token", "unk_token")
            tokens = {name: config[name] for name in names if config.get(name)}
            texts = {name: one["content"] if isinstance(one, dict) else one for name, one in tokens.items()}
            if not isinstance(source, str | None) or not all(isinstance(one, str) for one in texts.values()):
                raise ValueError(f"{TOKENIZER_CONFIG} has a template or a token that is no text")
            begin = texts.get("bos_token", "") if config.get("add_bos_token") else ""
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"cannot read the chat template of {directory} ({error}); mend {TOKENIZER_CONFIG} or {CHAT_TEMPLATE}"
            ) from error
        is_lacking = source is None and (directory / HUB_CONFIG).exists()
        try:
            found = cls(source, texts, is_lacking=is_lacking, begin=begin)
            found._try()
        except (CheckpointError, SecurityError) as error:
            raise CheckpointError(
                f"the chat template of {directory} cannot be used: {error}; mend it, or leave it out"
            ) from error
        return found

    def _try(self) -> None:
        """See that a short conversation ends; that the template refuses it says nothing.

        Raises:
            SecurityError: it does not, or reaches for what it may not have.
        """
        try:
            if self._template is not None:
                self._template.render(**self._given([{"role": "user", "content": "hello"}]))
        except SecurityError:
            raise
        except REFUSALS:
            pass

    def _run(self, given: Message) -> str:
        """The text of a conversation; calls have their arguments as objects, or as JSON where a template adds them to text.

        Args:
            given: variables of the template.
        """
        assert self._template is not None
        try:
            return self._template.render(**given)
        except TypeError:
            with_texts = [_with_texts(message) for message in given["messages"]]
            if with_texts == given["messages"]:
                raise
        return self._template.render(**given | {"messages": with_texts})

    def _given(
        self, messages: Sequence[Message], tools: Sequence[Message] = (), begin: bool = True
    ) -> Message:
        """Variables of a template."""
        given = {"messages": messages, "tools": tools or None, "add_generation_prompt": begin}
        return given | self._special_tokens

    @property
    def takes_tools(self) -> bool:
        """Whether tools and their calls have a place in the text."""
        return self.source is None or "tools" in self.source

    def write(
        self,
        messages: Sequence[Message],
        vocabulary: Vocabulary,
        *,
        tools: Sequence[Message] = (),
        begin_answer: bool = True,
        go_on: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, str]:
        """Return the text of a conversation, and the mark that stands in names of tokens which are plain text.

        The mark is empty where no added token is meant.

        Args:
            messages: from `read_messages`.
            vocabulary: of the model.
            tools: that may be called.
            begin_answer: end with the beginning of the assistant's turn.
            go_on: end inside the last message.
            variables: further ones of the template.

        Raises:
            ApiError: 400, the template refuses the conversation.
        """
        if self._is_lacking:
            raise ApiError(400, LACKING, param="messages", code="unsupported")
        if self._template is None:
            return _plain(messages, tools, begin_answer, go_on), ""
        # Names of added tokens in messages are broken by a mark of private characters, and mended after the
        # template's own were found.
        mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(8))
        end = f"{mark}{mark}"
        marked = [_marked_message(message, vocabulary, mark) for message in messages]
        if go_on:
            marked[-1]["content"] = f"{marked[-1].get('content') or ''}{end}"
        given = self._given(marked, [_marked(tool, vocabulary, mark) for tool in tools], begin_answer)
        if twice := given.keys() & (variables or {}).keys():
            message = f"chat_template_kwargs.{min(twice)} is what the request or the model says already; leave it out"
            raise ApiError(400, message, param="chat_template_kwargs")
        given |= _marked(dict(variables or {}), vocabulary, mark)
        try:
            text = self._run(given)
        except REFUSALS as error:
            message = f"the checkpoint's chat template refuses the conversation: {error}"[:300]
            raise ApiError(400, message, param="messages") from error
        if go_on:
            if end not in text:
                raise ApiError(
                    400, "the chat template drops the last message", param="continue_final_message"
                )
            text = text[: text.rindex(end)]
        return text, mark


def read_messages(values: Values, limit: int, template: ChatTemplate) -> list[Message]:
    """Check a conversation and return its messages, contents as one text each.

    Args:
        values: of a body with messages.
        limit: most messages.
        template: that will write them.

    Raises:
        ApiError: 400, messages of another form.
    """
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a non-empty list", param="messages")
    if len(messages) > limit:
        raise ApiError(400, f"messages must be at most {limit}", param="messages")
    if not values.ignores_unknown:
        for index, message in enumerate(messages):
            if isinstance(message, dict):
                given = {name: part for name, part in message.items() if part or name not in EMPTY_MEMBERS}
                check_members(given, MEMBERS, f"messages[{index}]")
    return [_message(message, f"messages[{index}]", template) for index, message in enumerate(messages)]


def _message(message: Any, where: str, template: ChatTemplate) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}", param=where)
    role, calls = message["role"], message.get("tool_calls")
    found: Message = {"role": role}
    if role == "tool" and isinstance(message.get("tool_call_id"), str):
        found["tool_call_id"] = check_text(message["tool_call_id"], where)
    if isinstance(message.get("name"), str):
        found["name"] = check_text(message["name"], where)
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise ApiError(
                400, f"{where}.tool_calls must be a list in a message of the assistant", param=where
            )
        if not template.takes_tools:
            raise ApiError(400, f"{where}.tool_calls: this model's chat template has no tools", param=where)
        found["tool_calls"] = [_call(call, f"{where}.tool_calls") for call in calls]
    if message.get("content") is None and calls:
        return found | {"content": None if template.source is not None else ""}
    return found | {"content": _content(message.get("content"), where)}


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}: each call needs a function with a name", param=where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(check_text(arguments, where) or "{}")
        except ValueError as error:
            raise ApiError(400, f"{where}: arguments must be JSON", param=where) from error
    check_text(to_json([function["name"], arguments]), where)
    return {
        "id": call.get("id") if isinstance(call.get("id"), str) else "",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return check_text(content, where)
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content must be a string or a list of text parts", param=where)
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            message = f'{where}.content: only {{"type": "text", "text": ...}} parts are supported'
            raise ApiError(400, message, param=where)
        parts.append(check_text(part["text"], where))
    return "".join(parts)


def _plain(messages: Sequence[Message], tools: Sequence[Message], begin_answer: bool, go_on: bool) -> str:
    lines = [f"system: tools {to_json(list(tools))}"] if tools else []
    for message in messages:
        content = _guarded(message["content"])
        if message.get("tool_calls"):
            calls = to_json([call["function"] for call in message["tool_calls"]])
            content = f"{content}\n{calls}" if content else calls
        lines.append(f"{message['role']}: {content}")
    return "\n".join([*lines, *(["assistant:"] if begin_answer and not go_on else [])])


def _guarded(content: str) -> str:
    """Indent the lines after the first that begin like a turn."""
    first, *rest = content.split("\n", 1)
    return "\n".join([first, *(_TURN.sub(" ", text) for text in rest)])


def _with_texts(message: Message) -> Message:
    """A message whose calls have JSON as arguments, as DeepSeek-V3's own template wants them."""
    calls = [
        call | {"function": call["function"] | {"arguments": to_json(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message


def _marked_message(message: Message, vocabulary: Vocabulary, mark: str) -> Message:
    """Break the added tokens in a message."""
    found: Message = _marked(message, vocabulary, mark)
    if message["role"] == "assistant" and message["content"]:
        found["content"] = vocabulary.break_names(message["content"], mark, but_tags=True)
    return found


def _marked(value: Any, vocabulary: Vocabulary, mark: str) -> Any:
    """Break the added tokens in every text of a value."""
    if isinstance(value, str):
        return vocabulary.break_names(value, mark)
    if isinstance(value, list):
        return [_marked(item, vocabulary, mark) for item in value]
    if isinstance(value, dict):
        return {
            _marked(key, vocabulary, mark): _marked(item, vocabulary, mark) for key, item in value.items()
        }
    return value
