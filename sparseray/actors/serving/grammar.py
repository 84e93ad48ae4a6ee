"""Texts that follow a grammar: which tokens may come next, by llguidance.

Beside the sampler: an engine makes one `GrammarState` for each request that has a grammar, asks it for the mask
of the next token and tells it the token that was drawn. The mask is made on the host from the grammar and the
tokens so far, so it is the same wherever the logits were computed, and another engine comes to the same state
from the same tokens. The ingress checks grammars with the same library before a request reaches an engine.

Shapes: V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from sparseray.errors import ConfigError

# White space that may stand between two parts of JSON: at most one character, or a weak model goes on for ever.
_WHITESPACE = r"[\x20\x0A]?"


class Grammars:
    """Grammars over one vocabulary.

    Args:
        tokenizer: the text of a tokenizer.json.
        vocab_size: V of the model, unused ids included.
        eos_id: token that may come where the grammar is complete.
    """

    def __init__(self, tokenizer: str, *, vocab_size: int, eos_id: int) -> None:
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_id)
        self.vocab_size = vocab_size

    @classmethod
    def load(cls, path: Path, *, vocab_size: int, eos_id: int) -> Grammars:
        """Read a tokenizer.json; see the class for the rest.

        Args:
            path: of the tokenizer.
            vocab_size: logits of a token.
            eos_id: token that ends a document.
        """
        return cls(path.read_text(encoding="utf-8"), vocab_size=vocab_size, eos_id=eos_id)

    def check(self, grammar: str) -> None:
        """See that a grammar can be followed.

        Raises:
            ConfigError: it cannot; the message is the library's.
        """
        error = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if error:
            raise ConfigError(" ".join(error.split())[:300])

    def start(self, grammar: str, tokens: Sequence[int] = ()) -> GrammarState:
        """Return the state of a text after its first tokens.

        Args:
            grammar: its text, as `GenerationRequest` has it.
            tokens: of the answer so far.
        """
        return GrammarState(LLMatcher(self._tokenizer, grammar, log_level=0), self.vocab_size, tokens)


class GrammarState:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, tokens: Sequence[int]) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._matcher.consume_tokens(list(tokens))

    def mask(self) -> NDArray[np.bool_]:
        """Return the tokens [V] that may come next; none where the grammar grew beyond the library's limits."""
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, dtype=np.bool_)
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(packed, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def add(self, token: int) -> None:
        """Go on by the token that was drawn from the mask."""
        self._matcher.consume_token(token)


def json_grammar(schema: str) -> str:
    """Return the grammar of the JSON texts that fit a schema (a JSON object as text)."""
    grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
    return grammar


def regex_grammar(pattern: str) -> str:
    """Return the grammar of the texts that a regular expression matches as a whole."""
    grammar: str = LLMatcher.grammar_from_regex(pattern)
    return grammar


def lark_grammar(text: str) -> str:
    """Return the grammar of a text in Lark's notation whose first rule is `start`."""
    grammar: str = LLMatcher.grammar_from_lark(text)
    return grammar


def choice_grammar(choices: Sequence[str]) -> str:
    """Return the grammar of some fixed texts."""
    return lark_grammar("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))
