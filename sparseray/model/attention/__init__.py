"""The kinds of attention: here alone a kind's name becomes a class; see protocol.py for what each offers."""

from __future__ import annotations

from sparseray.model.attention.full import FullAttention
from sparseray.model.attention.mla import MLAttention
from sparseray.model.attention.nsa import NSAttention
from sparseray.model.attention.protocol import Attention, AttentionFlops, LayerCache
from sparseray.model.config import ModelConfig

__all__ = ["ATTENTIONS", "Attention", "AttentionFlops", "LayerCache", "attention_of"]

ATTENTIONS: dict[str, type[Attention]] = {"full": FullAttention, "nsa": NSAttention, "mla": MLAttention}
"""One class for each name in `config.ATTENTIONS`."""


def attention_of(config: ModelConfig, layer: int) -> type[Attention]:
    """The class of a layer's attention, or of that of a module's block."""
    return ATTENTIONS[config.attention[config.like(layer)]]
