"""Fill-in-the-middle: documents rearranged so that a model learns to write what stands between two texts.

Second pass of `data prepare`, before documents are packed: prefix, suffix, middle (PSM) with a sentinel before each,
as in DeepSeek-Coder-V2 (section 3.1.2; arXiv 2207.14255). Where a document is cut follows from its own hash, so the
same text is cut alike in every preparation. Cuts lie between characters, not between tokens: a cursor in an editor
knows nothing of tokens. Serving builds its prompts with the same sentinels.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer

FAMILIES = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)
"""Names of the sentinels before prefix, suffix and middle: ours, DeepSeek's, Qwen's, StarCoder's, SantaCoder's."""


@dataclass(frozen=True, kw_only=True)
class Sentinels:
    """Ids of the tokens before prefix, suffix and middle."""

    prefix: int
    suffix: int
    middle: int

    def prompt(self, before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
        """Ask for what stands between two texts; what a model answers ends with the end of the document.

        Args:
            before, after: token ids of the texts.
        """
        return (self.prefix, *before, self.suffix, *after, self.middle)

    def are_in(self, ids: Sequence[int]) -> bool:
        """Whether a text spells one of them."""
        return not {self.prefix, self.suffix, self.middle}.isdisjoint(ids)


def find_sentinels(vocabulary: Mapping[str, int]) -> Sentinels | None:
    """Return the sentinels of a vocabulary (name to id), the first family that it has whole; None without one."""
    for family in FAMILIES:
        found = [vocabulary.get(name) for name in family]
        if None not in found:
            prefix, suffix, middle = (one for one in found if one is not None)
            return Sentinels(prefix=prefix, suffix=suffix, middle=middle)
    return None


def with_sentinels(tokenizer: Tokenizer) -> Sentinels:
    """Return a tokenizer's sentinels; where it has none they are added, with new ids at its end."""
    if found := find_sentinels(tokenizer.get_vocab()):
        return found
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in FAMILIES[0]])
    added = find_sentinels(tokenizer.get_vocab())
    assert added is not None
    return added


def cut(text: str, digest: bytes, rate: float) -> tuple[str, str, str] | None:
    """Return prefix, middle and suffix of a document, or None where it stays as it is.

    Args:
        text: of the document.
        digest: its SHA-256, which decides.
        rate: share of documents that are cut, in [0, 1].
    """
    draws = hashlib.blake2b(digest, digest_size=24, person=b"infilling").digest()
    chance, one, other = (int.from_bytes(draws[at : at + 8], "big") for at in (0, 8, 16))
    if chance >= rate * 2**64:
        return None
    first, second = sorted(draw % (len(text) + 1) for draw in (one, other))
    return text[:first], text[first:second], text[second:]
