"""Limits of what HTTP requests may ask for: the one place where they stand.

Everything that can be refused is refused by these before it is read, tokenised or computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What a connection may take of any of the package's HTTP servers.

    Args:
        header_timeout_s: from the first byte of a request, or from the connection's begin, to the end of its head.
        idle_timeout_s: between two requests of a connection.
    """

    header_timeout_s: float = 10.0
    idle_timeout_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class ApiLimits:
    """Limits of one request, and of all.

    Args:
        max_model_len: prompt and completion tokens of one choice.
        vocab_size: token ids are below it.
        max_requests: requests that are open at once, in the batch or waiting; more get 429.
        max_choices: prompts times n of one request.
        max_body_bytes: of one body; max_buffered_bytes: of all bodies that are being read.
        max_stops, max_stop_chars: stop strings, and characters of each; the same for bad words.
        max_named_tokens: entries of logit_bias, stop_token_ids and allowed_token_ids.
        max_logprobs: most alternatives of a token.
        max_messages, max_tools: of a conversation.
        max_grammar_bytes: of a schema, an expression or a grammar.
        connection: time that a connection may take.
        body_timeout_s: from the end of a request's head to the end of its body.
        send_timeout_s: that a client may leave a piece of a stream unread.
    """

    max_model_len: int
    vocab_size: int
    max_requests: int = 256
    max_choices: int = 32
    max_body_bytes: int = 4 * MEBIBYTE
    max_buffered_bytes: int = 256 * MEBIBYTE
    max_stops: int = 16
    max_stop_chars: int = 256
    max_named_tokens: int = 1024
    max_logprobs: int = 20
    max_messages: int = 1024
    max_tools: int = 128
    max_grammar_bytes: int = 65536
    connection: ConnectionLimits = field(default_factory=ConnectionLimits)
    body_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
