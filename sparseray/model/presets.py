"""Three models by name: tiny (CPU, seconds), small and 1b."""

from __future__ import annotations

from dataclasses import replace

from sparseray.errors import ConfigError
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig, NSAConfig

_TINY = ModelConfig(
    attention=("full", "nsa", "nsa", "nsa"),
    # Ten times the papers' step: a run of some hundred steps must balance its experts too.
    moe=MoEConfig(bias_update=0.01),
    # One eps for all three norms, as when its golden losses were recorded.
    dse=DSEConfig(layers=(1, 2), num_buckets=16, gate_eps=1e-6, conv_eps=1e-6),
)
_SMALL = ModelConfig(
    vocab_size=32768,
    hidden=512,
    num_layers=8,
    num_heads=16,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=1408,
    attention=("full",) + ("nsa",) * 7,
    max_seq_len=8192,
    nsa=NSAConfig(block=32, stride=16, select_block=64, num_selected=16, window=512),
    moe=MoEConfig(num_experts=64, num_shared=1, top_k=6, expert_dim=176),
    dse=DSEConfig(layers=(1, 4), heads=8, rows_per_head=65536, head_dim=32),
)
_1B = replace(
    _SMALL,
    vocab_size=129280,
    hidden=1024,
    num_layers=16,
    num_heads=32,
    num_kv_heads=2,
    ffn_dim=4096,
    attention=("full",) + ("nsa",) * 15,
    max_seq_len=32768,
    tie_embeddings=False,
    moe=MoEConfig(num_experts=64, num_shared=2, top_k=6, expert_dim=320, scaling=2.5),
    dse=DSEConfig(layers=(1, 7), heads=8, rows_per_head=262144, head_dim=80, pad_id=2, document_end_id=1),
)
PRESETS = {"tiny": _TINY, "small": _SMALL, "1b": _1B}


def preset(name: str) -> ModelConfig:
    """Return a named configuration: tiny, small or 1b.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"model preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
