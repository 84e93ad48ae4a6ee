"""Prompts of a body as token ids: refused by their length in bytes before they are tokenised.

A token stands for at most as many bytes as the vocabulary's longest one, so a text of n bytes has at least
n / longest tokens: what cannot fit is refused in the time that it takes to count them.
"""

from __future__ import annotations

from typing import Any

from sparseray.jobs.http.api_error import ApiError
from sparseray.jobs.http.limits import ApiLimits
from sparseray.jobs.http.text_stream import Vocabulary


class PromptReader:
    """Turns the texts and ids of one body into prompts.

    Args:
        vocabulary: of the model.
        limits: of the server.
        truncate: keep this many last tokens of each prompt, -1 for as many as fit; None to refuse longer ones.
        num_answer: tokens that the answer needs beside what fits.
        begins: put before a text the token that the model's tokenizer has for that.

    Raises:
        ApiError: 400, nothing would be kept.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        limits: ApiLimits,
        truncate: int | None = None,
        num_answer: int = 0,
        *,
        begins: bool = True,
    ) -> None:
        if truncate == 0:
            message = "truncate_prompt_tokens must be -1, or at least 1"
            raise ApiError(400, message, param="truncate_prompt_tokens")
        self._vocabulary, self._limits = vocabulary, limits
        self._begin = vocabulary.begin if begins else ()
        # An answer that leaves no room for any prompt is refused by its length.
        self._truncate = max(1, limits.max_model_len - num_answer) if truncate == -1 else truncate

    def prompts(self, prompt: Any, suffix: str = "") -> list[tuple[int, ...]]:
        """Return the prompts of a completion: a text, ids, or a list of either.

        Args:
            prompt: from the body.
            suffix: text that comes after the completion; the model fills in what stands between.

        Raises:
            ApiError: 400, of another form, too many, longer than the context, or a suffix that nothing can be done with.
        """
        if suffix:
            return self._around(prompt, suffix)
        if isinstance(prompt, str):
            return [self.one(prompt, "prompt")]
        if _are_ids(prompt):
            return [self._known(prompt, "prompt")]
        if not isinstance(prompt, list) or not prompt:
            raise ApiError(
                400, "prompt must be a text, token ids, or a non-empty list of them", param="prompt"
            )
        if len(prompt) > self._limits.max_choices:
            message = f"prompt may hold at most {self._limits.max_choices} prompts"
            raise ApiError(400, message, param="prompt")
        return [self.one(item, "prompt") for item in prompt]

    def _around(self, prompt: Any, suffix: str) -> list[tuple[int, ...]]:
        """Return prompts that ask for what stands between each prompt and a suffix."""
        sentinels = self._vocabulary.infilling
        if sentinels is None:
            message = (
                "this model's tokenizer has no fill-in-the-middle tokens, so nothing can be written before a suffix; "
                "leave suffix out"
            )
            raise ApiError(400, message, param="suffix", code="unsupported")
        if self._truncate is not None:
            message = "truncate_prompt_tokens is not available with suffix; shorten the prompt"
            raise ApiError(400, message, param="truncate_prompt_tokens")
        after = self._vocabulary.encode(self.bounded(suffix, "suffix"))
        items = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
        begin, found = self._begin, []
        for before, item in zip(self.prompts(items), items):
            is_text = isinstance(item, str)
            # An empty text starts no document here: nothing stands before the gap.
            before = () if item == "" else before[len(begin) :] if is_text else before
            found.append((*(begin if is_text else ()), *sentinels.prompt(before, after)))
        return found

    def one(self, item: Any, where: str) -> tuple[int, ...]:
        """Return the ids of a text (an empty one starts a document) or of a list of ids."""
        if isinstance(item, str):
            ids = (*self._begin, *self._vocabulary.encode(self.bounded(item, where)))
            return self.cut(ids or (self._vocabulary.eos_id,))
        if not _are_ids(item):
            raise ApiError(400, "each prompt must be a text or a non-empty list of token ids", param=where)
        return self._known(item, where)

    def _known(self, item: list[int], where: str) -> tuple[int, ...]:
        """Return what is kept of a list of ids once they are known to be the vocabulary's."""
        if self._truncate is None and len(item) > self._limits.max_model_len:
            raise too_long(self._limits, len(item), where)
        return self.cut(self.ids(item, where))

    def ids(self, item: list[int], where: str) -> tuple[int, ...]:
        """Return token ids once they are known to be the vocabulary's."""
        if not 0 <= min(item, default=0) <= max(item, default=0) < self._limits.vocab_size:
            message = f"{where}: token ids must be from 0 to {self._limits.vocab_size - 1}"
            raise ApiError(400, message, param=where)
        return tuple(item)

    def bounded(self, text: str, where: str) -> str:
        """Return a text that is short enough to be tokenised; with truncation, the end that can matter.

        Raises:
            ApiError: 400, more bytes than the context's tokens can stand for, or no text.
        """
        longest = self._vocabulary.longest_token_bytes
        if self._truncate is not None:
            # A token never reaches over so many characters: the last tokens are those of the whole text.
            text = text[-(2 * self._truncate + 2) * longest :]
        elif len(text) > self._limits.max_model_len * longest:
            raise too_long(self._limits, -(-len(text) // longest), where, at_least=True)
        num_bytes = len(check_text(text, where).encode())
        if self._truncate is None and num_bytes > self._limits.max_model_len * longest:
            raise too_long(self._limits, -(-num_bytes // longest), where, at_least=True)
        return text

    def cut(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens that truncation keeps."""
        return tokens if self._truncate is None else tokens[-self._truncate :]


def too_long(
    limits: ApiLimits, num_prompt: int, where: str, *, asked: int | None = None, at_least: bool = False
) -> ApiError:
    """Return the error of a prompt that, with what is asked for, exceeds the context.

    Args:
        limits: of the server.
        num_prompt: tokens of the prompt; at_least: and perhaps more.
        where: field that holds it.
        asked: completion tokens that are asked for.
    """
    has = f"{'at least ' if at_least else ''}{num_prompt} tokens"
    message = f"This model's maximum context length is {limits.max_model_len} tokens. Your prompt has {has}"
    if asked is not None:
        message += f" and you asked for {asked} more ({num_prompt + asked} in all)"
    message += ". Shorten the prompt, or ask for fewer tokens."
    return ApiError(400, message, param=where, code="context_length_exceeded")


def check_text(text: str, where: str) -> str:
    """Refuse lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{where} holds a lone surrogate, which is no character", param=where) from error
    return text


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int}
