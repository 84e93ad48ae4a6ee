"""From token ids to streamed text: byte-level BPE, whole characters only, stop strings never shown.

The ingress's end of a request's path. A token of a byte-level BPE may be a part of a UTF-8 character, so
bytes go through an incremental decoder; text that may be the beginning of a stop string is held back until
the next tokens show whether it is one.
"""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from sparseray.actors.serving.text_request import TokenLogprobs
from sparseray.errors import ConfigError


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, other bytes from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}


class Vocabulary:
    """A byte-level tokenizer with the bytes of each of its tokens.

    Args:
        tokenizer: with a ByteLevel decoder. Text that spells a special token is made to stay plain text: it
            would forge the end of a document.
        eos_id: token that ends a document.

    Raises:
        ConfigError: the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
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

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, without special tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text: nothing for special tokens and unused ids."""
        added = self._added.get(token_id)
        return b"" if added is not None and added.special else self.label_bytes(token_id)

    def label_bytes(self, token_id: int) -> bytes:
        """Return a token's own bytes, special tokens written out."""
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
class Delta:
    """What one token released: text, the entries of its tokens, and the reason if it was the last."""

    text: str
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str | None = None


class TextStream:
    """The text of one choice.

    Args:
        vocabulary: of the model.
        stops: stop strings, none empty; the text ends before the first that occurs.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = ()) -> None:
        self._vocabulary, self._stops = vocabulary, tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._released = "", 0
        self._entries: deque[TokenEntry] = deque()

    def prompt(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> Delta:
        """Return the prompt's text (echo); stop strings are not looked for in it."""
        pieces, entries, offset = [], [], 0
        for index, token in enumerate(tokens):
            if logprobs:
                entries.append(TokenEntry(offset=offset, logprobs=logprobs[index]))
            pieces.append(self._decoder.decode(self._vocabulary.text_bytes(token)))
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
        if token_id is not None and finish_reason != "stop":
            if logprobs is not None:
                offset = self._released + len(self._held)
                self._entries.append(TokenEntry(offset=offset, logprobs=logprobs))
            self._held += self._decoder.decode(self._vocabulary.text_bytes(token_id))
        if finish_reason is not None:
            self._held += self._decoder.decode(b"", True)
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            text, finish_reason = self._held[: min(found)], "stop"
        else:
            keep = 0 if finish_reason is not None else self._num_held()
            text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self._released += len(text)
        ended = finish_reason is not None and not found
        entries = []
        while self._entries and (ended or self._entries[0].offset < self._released):
            entries.append(self._entries.popleft())
        return Delta(text=text, entries=tuple(entries), finish_reason=finish_reason)

    def _num_held(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
