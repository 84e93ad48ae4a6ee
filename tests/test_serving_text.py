"""From tokens to text: whole characters, stop strings, special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from serving_parts import make_tokenizer
from tokenizers import Tokenizer, models

from sparseray.errors import ConfigError
from sparseray.jobs.http.text_stream import TextStream, Vocabulary


def pieces_of(
    vocabulary: Vocabulary, tokens: list[int], stops: tuple[str, ...] = (), **options: Any
) -> tuple[list[str], str]:
    stream, pieces = TextStream(vocabulary, stops, **options), []
    for index, token in enumerate(tokens):
        delta = stream.push(token, None, "length" if index == len(tokens) - 1 else None)
        pieces.append(delta.text)
        if delta.finish_reason:
            return pieces, delta.finish_reason
    raise AssertionError("unreachable")


def test_only_whole_characters_are_streamed() -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    text = "🦊 über 東京"
    tokens = list(vocabulary.encode(text))
    assert len(tokens) > len(text)
    pieces, reason = pieces_of(vocabulary, tokens)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert reason == "length"
    broken, _ = pieces_of(vocabulary, tokens[:2])
    assert "".join(broken) == "\ufffd"


@pytest.mark.parametrize("size", [1, 3, 7])
def test_tokens_that_are_added_together_give_the_text_of_one_by_one(size: int) -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    text = "🦊 über 東京, and more"
    *tokens, last = vocabulary.encode(text)
    stream = TextStream(vocabulary)
    deltas = [stream.extend(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    deltas.append(stream.push(last, None, "length"))
    assert "".join(delta.text for delta in deltas) == text
    assert [token for delta in deltas for token in delta.tokens] == [*tokens, last]


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one two three", ("two",), "one "),
        ("one tw", ("two",), "one tw"),
        ("aab aabaac rest", ("aabaac",), "aab "),
        ("x\n\nuser: y", ("\nuser:",), "x\n"),
        ("日本語 東京 end", ("京 e",), "日本語 東"),
        ("abcd", ("bcdX", "cd"), "ab"),
        ("stop", ("stop",), ""),
    ],
)
def test_stop_strings_are_found_across_tokens_and_never_shown(
    text: str, stops: tuple[str, ...], kept: str
) -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    single_bytes = [
        token
        for byte in text.encode()
        for token in range(1, 320)
        if vocabulary.label_bytes(token) == bytes([byte])
    ]
    for tokens in (single_bytes, list(vocabulary.encode(text))):
        pieces, reason = pieces_of(vocabulary, tokens, stops)
        assert "".join(pieces) == kept
        shown, _ = pieces_of(vocabulary, tokens, stops, keep_stop=True)
        assert "".join(shown) in [kept + stop for stop in stops] if kept != text else kept
        assert reason == ("length" if kept == text else "stop")


def test_tokenizer_that_is_not_byte_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="not ByteLevel"):
        Vocabulary(Tokenizer(models.BPE()), 0)


def test_text_that_spells_a_special_token_stays_text() -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    tokens = vocabulary.encode("<|endoftext|>")
    assert 0 not in tokens
    assert b"".join(map(vocabulary.text_bytes, tokens)) == b"<|endoftext|>"


def test_a_stop_string_counts_only_after_min_tokens() -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    tokens = [token for char in "abcabc" for token in vocabulary.encode(char)]
    assert pieces_of(vocabulary, tokens, ("c",))[0] == ["a", "b", ""]
    assert "".join(pieces_of(vocabulary, tokens, ("c",), min_tokens=3)[0]) == "abcab"
    assert "".join(pieces_of(vocabulary, tokens, ("c",), min_tokens=6)[0]) == "abcabc"


@pytest.mark.parametrize(
    "text", ["a<|endoftext|>b", "<|endoftext|>", "x <|end", "<<|endoftext|>|endoftext|>"]
)
def test_special_tokens_are_meant_by_a_template_and_spelled_by_a_message(text: str) -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    mark = "\ue123\ue456"
    broken = vocabulary.break_names(text, mark)
    tokens = vocabulary.encode_marked(f"<|endoftext|>{broken}<|endoftext|>", mark)
    assert (tokens[0], tokens[-1], tokens.count(0)) == (0, 0, 2)
    assert tokens[1:-1] == vocabulary.encode(text)


def test_no_text_has_fewer_tokens_than_its_bytes_over_the_longest_token() -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    for text in ("the quick brown fox" * 9, "東京" * 40, " " * 300, "the lazy dog; the dog sleeps" * 7):
        assert len(vocabulary.encode(text)) >= len(text.encode()) / vocabulary.longest_token_bytes
