"""From token ids to streamed text: byte-level BPE, whole characters only, stop strings never shown.

The ingress's end of a request's path. A token of a byte-level BPE may be a part of a UTF-8 character, so
bytes go through an incremental decoder; text that may be the beginning of a stop string is held back until
the next tokens show whether it is one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tokenizers import AddedToken, Tokenizer

from sparseray.actors.serving.text_request import TokenLogprobs
from sparseray.errors import ConfigError
from sparseray.jobs.tokens.infilling import find_sentinels


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, other bytes from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_TAG = re.compile(r"</?\w+>")


def _one_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of names, the longest that fits; grouped by their beginnings, as there may be a thousand."""
    groups: dict[str, list[str]] = {}
    for name in sorted(filter(None, names), key=len, reverse=True):
        groups.setdefault(name[:2], []).append(re.escape(name))
    heads = sorted(groups, key=len, reverse=True)
    return re.compile("|".join(f"(?:{'|'.join(groups[head])})" for head in heads) or r"(?!)")


class Vocabulary:
    """A byte-level tokenizer with the bytes of each of its tokens.

    Args:
        tokenizer: with a ByteLevel decoder. Text that spells a special token is made to stay plain text: it
            would forge the end of a document. Other added tokens are found here instead of by the library, so that a
            chat can keep them out of what people write: DeepSeek's marks of turns are such.
        eos_id: token that ends a document.
        begin: name of the added token that stands before every text; empty for none.

    Raises:
        ConfigError: the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer, eos_id: int, begin: str = "") -> None:
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]
        if "ByteLevel" not in kinds:
            raise ConfigError(
                f"the tokenizer's decoder is {decoder.get('type')}, not ByteLevel; serve a model whose"
                " tokenizer.json is a byte-level BPE"
            )
        tokenizer.encode_special_tokens = True
        self._tokenizer, self.eos_id = tokenizer, eos_id
        self._added = tokenizer.get_added_tokens_decoder()
        self._alphabet = _byte_of_character()
        self._ids = {str(one.content): token for token, one in self._added.items()}
        self.begin = (self._ids[begin],) if begin in self._ids else ()
        plain = [str(one.content) for one in self._added.values() if not one.special]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in plain])
        self._every_name, self._plain_name = _one_of(self._ids), _one_of(plain)
        self._tags = {name for name in plain if _TAG.fullmatch(name)}
        names = tokenizer.get_vocab(with_added_tokens=True)
        self.infilling, ids = find_sentinels(names), names.values()
        # A normalizer may compose characters: three of a decomposed syllable, nine bytes, become one of three.
        factor = 1 if tokenizer.normalizer is None else 4
        self._bytes = {token: self._read_bytes(token) for token in ids}
        self.longest_token_bytes = factor * max(map(len, self._bytes.values()))

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text: what spells a special token is text, what spells another added one is that."""
        return self._encode(text, self._plain_name)

    def break_names(self, text: str, mark: str, *, but_tags: bool = False) -> str:
        """Return a text in which a mark stands inside the name of every added token, special or not.

        Args:
            text: that may spell some.
            mark: of characters that no name has.
            but_tags: leave those alone that look like tags (`</think>`) and are not special: templates look for them in
                what a model said.
        """

        def broken(found: re.Match[str]) -> str:
            name = found[0]
            return name if but_tags and name in self._tags else name[0] + mark + name[1:]

        before = ""
        while before != text:  # A name may begin inside another one.
            before, text = text, self._every_name.sub(broken, text)
        return text

    def encode_marked(self, text: str, mark: str) -> tuple[int, ...]:
        """Return the token ids of a text whose added tokens are meant, except those with a mark inside.

        Without a mark, no special one is meant.
        """
        return self._encode(text, self._every_name, mark) if mark else self.encode(text)

    def _encode(self, text: str, names: re.Pattern[str], mark: str = "") -> tuple[int, ...]:
        """Ids of a text: names become tokens, marks are taken out of the rest."""
        tokens: list[int] = []
        start = 0
        for found in names.finditer(text):
            tokens += self._plain_ids(text[start : found.start()], mark)
            tokens.append(self._ids[found[0]])
            start = found.end()
        return (*tokens, *self._plain_ids(text[start:], mark))

    def _plain_ids(self, text: str, mark: str) -> list[int]:
        text = text.replace(mark, "") if mark else text
        return self._tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def token_text(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens written out."""
        return b"".join(self.label_bytes(token) for token in tokens).decode("utf-8", "replace")

    def text_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text: nothing for special tokens and unused ids."""
        added = self._added.get(token_id)
        return b"" if added is not None and added.special else self.label_bytes(token_id)

    def label_bytes(self, token_id: int) -> bytes:
        """Return a token's own bytes, special tokens written out."""
        return self._bytes.get(token_id, b"")

    def _read_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return bytes(added.content.encode())
        token = self._tokenizer.id_to_token(token_id) or ""
        return b"".join(
            bytes([self._alphabet[char]]) if char in self._alphabet else char.encode() for char in token
        )

    def label(self, token_id: int) -> str:
        """Return a token as one string; a part of a character is written `bytes:\\xe2\\x82`."""
        data = self.label_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True, kw_only=True)
class TokenEntry:
    """A token's log probabilities and the offset in the choice's text where it begins, in characters."""

    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class PromptTokens:
    """The prompt of a choice, with its first delta: token ids, and their log probabilities if asked for."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one token released: text, the entries of its tokens, its id, and why it was the last if it was.

    `stop_reason` is the stop string, or the stop token other than the end of a document, that ended the text.
    """

    text: str
    entries: tuple[TokenEntry, ...] = ()
    tokens: tuple[int, ...] = ()
    prompt: PromptTokens | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def joined(self, later: Delta, prompt: PromptTokens) -> Delta:
        """Return this delta and the one after it as one, with the prompt that they begin."""
        return replace(
            later, text=self.text + later.text, entries=self.entries + later.entries, prompt=prompt
        )


class TextStream:
    """The text of one choice.

    Args:
        vocabulary: of the model.
        stops: stop strings, none empty; the text ends before the first that occurs.
        min_tokens: tokens before stop strings are looked for.
        keep_stop: the text ends after a stop string, and a stop token is part of it.
        keep_specials: special tokens are part of the text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stops: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        keep_stop: bool = False,
        keep_specials: bool = False,
    ) -> None:
        self._vocabulary, self._stops = vocabulary, tuple(stops)
        self._min_tokens, self._keep_stop, self._num_tokens = min_tokens, keep_stop, 0
        self._bytes = vocabulary.label_bytes if keep_specials else vocabulary.text_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._released = "", 0
        self._entries: deque[TokenEntry] = deque()

    def prompt(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = (), top: int | None = None
    ) -> Delta:
        """Return the prompt's text (echo); stop strings are not looked for in it.

        Args:
            tokens: of the prompt.
            logprobs: of each; empty for none.
            top: alternatives that are shown, at most as many as the log probabilities have.
        """
        pieces, entries, offset = [], [], 0
        for index, token in enumerate(tokens):
            if logprobs:
                shown = replace(logprobs[index], top=logprobs[index].top[:top])
                entries.append(TokenEntry(offset=offset, logprobs=shown))
            pieces.append(self._decoder.decode(self._bytes(token)))
            offset += len(pieces[-1])
        self._released = offset
        return Delta(text="".join(pieces), entries=tuple(entries))

    def push(
        self, token_id: int | None, logprobs: TokenLogprobs | None = None, finish_reason: str | None = None
    ) -> Delta:
        """Add a token; a token that ends the text with "stop" is no part of it.

        Args:
            token_id: None where there is only a finish_reason.
            logprobs: of the token.
            finish_reason: of the engine, with its last token.

        Returns:
            The text that is safe to send; its finish_reason is "stop" if a stop string occurred.
        """
        is_stop = token_id is not None and finish_reason == "stop"
        if token_id is not None and (self._keep_stop or not is_stop):
            if logprobs is not None:
                offset = self._released + len(self._held)
                self._entries.append(TokenEntry(offset=offset, logprobs=logprobs))
            self._held += self._decoder.decode(self._bytes(token_id))
        self._num_tokens += token_id is not None
        if finish_reason is not None:
            self._held += self._decoder.decode(b"", True)
        stop_reason: int | str | None = token_id if is_stop and token_id != self._vocabulary.eos_id else None
        found = self._find_stop()
        if found is not None:
            at, stop = found
            text, finish_reason, stop_reason = self._held[:at], "stop", stop
        else:
            keep = 0 if finish_reason is not None else self._num_held()
            text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self._released += len(text)
        ended = finish_reason is not None and found is None
        entries = []
        while self._entries and (ended or self._entries[0].offset < self._released):
            entries.append(self._entries.popleft())
        return Delta(
            text=text,
            entries=tuple(entries),
            tokens=() if token_id is None else (token_id,),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def extend(self, tokens: Sequence[int]) -> Delta:
        """Add tokens none of which is the last, where there are neither stop strings nor log probabilities."""
        assert not self._stops
        text = self._decoder.decode(b"".join(map(self._bytes, tokens)))
        self._num_tokens += len(tokens)
        self._released += len(text)
        return Delta(text=text, tokens=tuple(tokens))

    def _find_stop(self) -> tuple[int, str] | None:
        """Where the text ends, and the stop string that occurs first."""
        if self._num_tokens <= self._min_tokens:
            return None
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        return at + len(stop) * self._keep_stop, stop

    def _num_held(self) -> int:
        """Characters at the end that may begin a stop string."""
        if self._num_tokens < self._min_tokens:
            return 0
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
