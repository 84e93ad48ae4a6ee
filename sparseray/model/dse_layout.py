"""The identity of a conditional memory: which table rows a token sequence addresses.

A `DSELayout` holds the token map, the hash multipliers, the primes, the offsets and the document policy, and
a SHA-256 over all of them. Trainer, memory shards and server compare digests: a layout that differs in one
number would turn the table into noise. Follows arXiv 2601.07372 section 2.2 and its released code.

Shapes: B sequences, T tokens, N rows per token (orders x heads), L history length.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor

from sparseray.errors import ConfigError, IdentityError
from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.config import DSEConfig

FORMAT = 2
"""1 had no eps of its own for the norms: model.norm_eps was used for all three."""

LAYER_SEED_STEP = 10007
SPACE_SENTINEL = "\ue000"
NO_TOKEN = -1
"""Marks a position of the history before the sequence's or document's start."""


def token_normalizer() -> Any:
    """The normaliser that decides which tokens share a compressed id (a lone space survives stripping)."""
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), SPACE_SENTINEL),
            normalizers.Strip(),
            normalizers.Replace(SPACE_SENTINEL, " "),
        ]
    )


def build_token_map(tokenizer: Tokenizer) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Map every token to a compressed id, numbered in order of first appearance.

    Tokens are equal when their normalised texts are; one that is no whole UTF-8 text keeps its own id.

    Returns:
        int64 [largest id + 1], added tokens included; -1 for an id that no token has.

    Source: arXiv 2601.07372 section 2.2, as in its released code.
    """
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    texts = tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    normalizer = token_normalizer()
    ids: dict[str, int] = {}
    token_map = np.full(size, -1, dtype=np.int64)
    for token, text in enumerate(texts):
        name = tokenizer.id_to_token(token)
        if name is None:
            continue
        if "\ufffd" in text:
            key = name
        else:
            key = normalizer.normalize_str(text) or text
        token_map[token] = ids.setdefault(key, len(ids))
    return token_map


def is_prime(n: int) -> bool:
    """Whether n is prime (Miller-Rabin with bases that decide every n below 2^64)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def draw_primes(config: DSEConfig) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Distinct primes [layers][orders][heads], drawn in that order, each at least rows_per_head."""
    seen: set[int] = set()
    layers = []
    for _ in config.layers:
        orders = []
        for _ in config.orders:
            heads: list[int] = []
            candidate = config.rows_per_head - 1
            while len(heads) < config.heads:
                candidate += 1
                if candidate not in seen and is_prime(candidate):
                    seen.add(candidate)
                    heads.append(candidate)
            orders.append(tuple(heads))
        layers.append(tuple(orders))
    return tuple(layers)


def draw_multipliers(config: DSEConfig, num_ids: int) -> tuple[tuple[int, ...], ...]:
    """Odd multipliers [layers][look-back distance], such that id * multiplier stays below 2^63."""
    half = max(1, int(np.iinfo(np.int64).max // num_ids) // 2)
    layers = []
    for layer in config.layers:
        generator = np.random.default_rng(config.seed + LAYER_SEED_STEP * layer)
        drawn = generator.integers(low=0, high=half, size=(max(config.orders),), dtype=np.int64)
        layers.append(tuple(int(r) * 2 + 1 for r in drawn))
    return tuple(layers)


@dataclass(frozen=True, kw_only=True, eq=False)
class DSELayout:
    """Row addresses of every memory layer, with the digest of all that decides them.

    Args:
        config: the memory's settings.
        token_map: int64 [vocab] -> compressed id.
        num_ids: number of compressed ids, V'.
        pad: compressed pad id.
        multipliers: [layers][distance].
        primes: [layers][orders][heads], rows of each head's table.
        sha256: hex digest of the above.
    """

    config: DSEConfig
    token_map: np.ndarray[Any, np.dtype[np.int64]]
    num_ids: int
    pad: int
    multipliers: tuple[tuple[int, ...], ...]
    primes: tuple[tuple[tuple[int, ...], ...], ...]
    sha256: str

    @classmethod
    def build(cls, config: DSEConfig, tokenizer: Tokenizer, *, vocab_size: int | None = None) -> DSELayout:
        """Derive the layout from the settings and the tokenizer.

        Args:
            config: the memory's settings.
            tokenizer: whose tokens are mapped.
            vocab_size: of the model; ids that the tokenizer lacks are mapped to the pad. None: the
                tokenizer's own size.

        Raises:
            ConfigError: the vocabulary is smaller than the tokenizer's, or lacks the pad id.
        """
        return cls.from_token_map(config, build_token_map(tokenizer), vocab_size=vocab_size)

    @classmethod
    def from_token_map(
        cls,
        config: DSEConfig,
        token_map: np.ndarray[Any, np.dtype[np.int64]],
        *,
        vocab_size: int | None = None,
    ) -> DSELayout:
        """Derive the layout from a ready token map (int64, every id from 0 to its maximum in use; -1: no token)."""
        size = len(token_map)
        if config.pad_id >= size or token_map[config.pad_id] < 0:
            raise ConfigError(
                f"dse.pad_id={config.pad_id} is none of the tokenizer's tokens, whose largest id is {size - 1}"
            )
        if vocab_size is not None and vocab_size < size:
            raise ConfigError(f"model.vocab_size={vocab_size} is less than the tokenizer's {size} ids")
        num_ids, pad = int(token_map.max()) + 1, int(token_map[config.pad_id])
        token_map = np.where(token_map < 0, pad, token_map).astype(np.int64)
        if vocab_size is not None:
            token_map = np.concatenate([token_map, np.full(vocab_size - size, pad, dtype=np.int64)])
        token_map.setflags(write=False)
        multipliers, primes = draw_multipliers(config, num_ids), draw_primes(config)
        content = _content(config, num_ids, pad, multipliers, primes)
        return cls(
            config=config,
            token_map=token_map,
            num_ids=num_ids,
            pad=pad,
            multipliers=multipliers,
            primes=primes,
            sha256=_digest(content, token_map),
        )

    def __post_init__(self) -> None:
        # Not fields: what `rows` would otherwise build on every call.
        object.__setattr__(self, "_map_V", torch.from_numpy(self.token_map.copy()))
        object.__setattr__(self, "_index", {layer: i for i, layer in enumerate(self.config.layers)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DSELayout) and other.sha256 == self.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def _layer(self, layer: int) -> int:
        index: dict[int, int] = self._index  # type: ignore[attr-defined]
        if layer not in index:
            raise ConfigError(f"layer {layer} has no memory; dse.layers={self.config.layers}")
        return index[layer]

    def offsets(self, layer: int) -> list[list[int]]:
        """First row of each head's table in the layer's table, [orders][heads]."""
        flat = [0]
        for order in self.primes[self._layer(layer)]:
            for prime in order:
                flat.append(flat[-1] + prime)
        heads = self.config.heads
        return [flat[i * heads : (i + 1) * heads] for i in range(len(self.config.orders))]

    def num_rows(self, layer: int) -> int:
        """Rows of the layer's table, all heads together."""
        return sum(sum(order) for order in self.primes[self._layer(layer)])

    def compress(self, tokens: Tensor) -> Tensor:
        """Compressed ids of int64 tokens; `NO_TOKEN` becomes the compressed pad id."""
        map_V: Tensor = self._map_V  # type: ignore[attr-defined]
        if map_V.device != tokens.device:
            map_V = map_V.to(tokens.device)
            object.__setattr__(self, "_map_V", map_V)
        return torch.where(tokens < 0, self.pad, map_V[tokens.clamp_min(0)])

    def rows(
        self,
        layer: int,
        tokens_BT: Tensor | np.ndarray[Any, Any],
        history: Tensor | np.ndarray[Any, Any] | None = None,
        document_starts: Tensor | np.ndarray[Any, Any] | None = None,
        ops: Ops = REFERENCE,
    ) -> Tensor:
        """Rows of every token in one layer's table.

        Args:
            layer: 0-based model layer.
            tokens_BT: raw token ids, int64.
            history: raw tokens before the chunk [B, L], `NO_TOKEN` where there is none; at least
                max(orders) - 1 of them count. None at a sequence's start.
            document_starts: bool [B, T], True at a document's first token; obeyed if the layout's
                policy says so, ignored otherwise.
            ops: what hashes.

        Returns:
            int64 [B, T, N] in (order, head) order.
        """
        index, look_back = self._layer(layer), max(self.config.orders) - 1
        tokens = torch.as_tensor(tokens_BT)
        history_BL = None
        if history is not None:
            history_BL = self.compress(torch.as_tensor(history).long())
            missing = look_back - history_BL.shape[1]
            if missing > 0:
                history_BL = torch.nn.functional.pad(history_BL, (missing, 0), value=self.pad)
        starts = None
        if document_starts is not None and self.config.reset_at_document:
            starts = torch.as_tensor(document_starts)
        return ops.ngram_rows(
            self.compress(tokens.long()),
            multipliers=self.multipliers[index],
            orders=self.config.orders,
            primes=self.primes[index],
            offsets=self.offsets(layer),
            pad=self.pad,
            history_BL=history_BL,
            document_starts_BT=starts,
        )

    def document_starts(self, tokens_BT: Tensor, previous_B: Tensor | None = None) -> Tensor | None:
        """Where documents start, from the end-of-document tokens; None when the policy does not ask.

        Args:
            tokens_BT: raw tokens.
            previous_B: the token before each, `NO_TOKEN` for none.
        """
        if not self.config.reset_at_document or self.config.document_end_id < 0:
            return None
        if previous_B is None:
            previous_B = torch.full_like(tokens_BT[:, 0], NO_TOKEN)
        before_BT = torch.cat([previous_B[:, None], tokens_BT[:, :-1]], dim=1)
        return before_BT == self.config.document_end_id

    def save(self, directory: str | Path) -> None:
        """Write dse_layout.json and dse_token_map.bin (int64, little-endian) into a folder, made if missing."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        content = _content(self.config, self.num_ids, self.pad, self.multipliers, self.primes)
        self.token_map.astype("<i8").tofile(folder / "dse_token_map.bin")
        text = json.dumps({**content, "sha256": self.sha256}, indent=1, sort_keys=True)
        (folder / "dse_layout.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> DSELayout:
        """Read a layout and check its digest.

        Raises:
            IdentityError: a file is missing, unreadable, or was changed.
        """
        path = Path(directory) / "dse_layout.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                raise IdentityError(
                    f"{path} has format {stored['format']}, this version reads {FORMAT}: the identity now holds"
                    " dse.gate_eps and dse.conv_eps; start a new run, or use the version that wrote it"
                )
            # Not numpy's own format: its header is parsed by `ast`, which fails at random in CPython 3.11
            # when several threads parse at once.
            token_map = np.fromfile(Path(directory) / "dse_token_map.bin", "<i8").astype(np.int64)
            settings: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in stored["config"].items()
            }
            layout = cls(
                config=DSEConfig(**settings),
                token_map=token_map,
                num_ids=stored["num_ids"],
                pad=stored["pad"],
                multipliers=tuple(tuple(row) for row in stored["multipliers"]),
                primes=tuple(tuple(tuple(heads) for heads in layer) for layer in stored["primes"]),
                sha256=stored["sha256"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IdentityError(f"{path} is missing or unreadable ({error}); restore the folder") from error
        content = _content(layout.config, layout.num_ids, layout.pad, layout.multipliers, layout.primes)
        if _digest(content, token_map) != layout.sha256:
            raise IdentityError(f"{path} does not match its own sha256 {layout.sha256}; it was changed")
        return layout


def _content(
    config: DSEConfig,
    num_ids: int,
    pad: int,
    multipliers: tuple[tuple[int, ...], ...],
    primes: tuple[tuple[tuple[int, ...], ...], ...],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "config": asdict(config),
        "num_ids": num_ids,
        "pad": pad,
        "multipliers": multipliers,
        "primes": primes,
    }


def _digest(content: dict[str, Any], token_map: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical + b"\0" + token_map.astype("<i8").tobytes()).hexdigest()
