"""A `config.json` of the DeepSeek family becomes a `ModelConfig`, and the other way round.

What is read follows transformers' classes `DeepseekV2Config` and `DeepseekV3Config`, in the form of version 5
(`rope_parameters`) and of version 4 (`rope_theta`, `rope_scaling`). A setting that changes a logit and has no
counterpart here is refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparseray.errors import ConfigError
from sparseray.model.config import DSEConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from sparseray.model.yarn import rotary_scale

V2, V3 = "deepseek_v2", "deepseek_v3"
_COMMON: dict[str, Any] = {
    "num_key_value_heads": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "rope_interleave": True, "moe_layer_freq": 1,
    "initializer_range": 0.02, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "quantization_config": None,
}  # fmt: skip
# What transformers takes where a file does not say it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    V2: _COMMON | {
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "first_k_dense_replace": 0, "n_group": None,
        "n_routed_experts": 64, "n_shared_experts": 2, "routed_scaling_factor": 1.0, "topk_group": None,
        "topk_method": "greedy", "norm_topk_prob": False, "num_experts_per_tok": None,
        "moe_intermediate_size": 1407, "scoring_func": "softmax", "eos_token_id": 2,
    },
    V3: _COMMON | {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "max_position_embeddings": 4096, "first_k_dense_replace": 3, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "topk_group": 4,
        "topk_method": "noaux_tc", "norm_topk_prob": True, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "scoring_func": "sigmoid", "eos_token_id": 1,
    },
}  # fmt: skip
# The only values that we compute with.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    V2: {"topk_method": ("greedy", "group_limited_greedy"), "norm_topk_prob": (False,), "scoring_func": ("softmax",)},
    V3: {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)},
}  # fmt: skip
_ONLY_COMMON: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "rope_interleave": (True,),
    "moe_layer_freq": (1,),
}  # fmt: skip


def read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the model that a `config.json` describes.

    Args:
        raw: its content.
        where: its path, for messages.

    Raises:
        ConfigError: another architecture, or a setting that has no counterpart here.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ConfigError(
            f"{where}: model_type={kind!r} is not a family that can be imported; those are {V2} (V2, V2-Lite,"
            f" Coder-V2) and {V3} (V3, R1, Moonlight)"
        )
    found = {**_DEFAULTS[kind], **{k: v for k, v in raw.items() if k in _DEFAULTS[kind]}}
    for key, values in (_ONLY_COMMON | _ONLY[kind]).items():
        if found[key] not in values:
            known = " or ".join(repr(value) for value in values)
            raise ConfigError(f"{where}: {key}={found[key]!r} has no counterpart here, only {known} has")
    heads = found["num_attention_heads"]
    if found["num_key_value_heads"] not in (None, heads):
        raise ConfigError(
            f"{where}: num_key_value_heads={found['num_key_value_heads']} must be num_attention_heads={heads}: latent"
            " attention gives every head keys of its own"
        )
    for key in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(raw.get(key), Mapping | None):
            raise ConfigError(f"{where}: {key}={str(raw[key])[:80]!r} must hold keys, or be null")
    try:
        return ModelConfig(
            vocab_size=found["vocab_size"],
            hidden=found["hidden_size"],
            num_layers=found["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=heads,
            ffn_dim=found["intermediate_size"],
            attention=("mla",),
            max_seq_len=found["max_position_embeddings"],
            norm_eps=float(found["rms_norm_eps"]),
            tie_embeddings=found["tie_word_embeddings"],
            init_std=float(found["initializer_range"]),
            moe=_moe(kind, found),
            mla=_mla(found),
            mtp=MTPConfig(depth=_modules(kind, raw)),
            dse=DSEConfig(document_end_id=_end_of_text(found["eos_token_id"])),
            **_rope(raw, found["max_position_embeddings"], where),
        )
    except (ConfigError, TypeError, ValueError) as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from None


def _modules(kind: str, raw: Mapping[str, Any]) -> int:
    """Modules that predict further tokens, as the released files or as transformers call them."""
    given = raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers"))
    default = 1 if kind == V3 else 0
    found: int = default if given is None else given
    return found


def _end_of_text(given: int | list[int] | None) -> int:
    """The token that ends a text; the first of several, -1 for none."""
    if isinstance(given, list):
        given = given[0] if given else None
    return -1 if given is None else given


def _mla(found: Mapping[str, Any]) -> MLAConfig:
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return MLAConfig(**{name: found[name] for name in names})


def _moe(kind: str, found: Mapping[str, Any]) -> MoEConfig:
    is_limited = found["topk_method"] != "greedy"
    return MoEConfig(
        num_experts=found["n_routed_experts"],
        num_shared=found["n_shared_experts"],
        top_k=found["num_experts_per_tok"],
        expert_dim=found["moe_intermediate_size"],
        leading_dense=found["first_k_dense_replace"],
        router="v2" if kind == V2 else "v3",
        num_groups=(found["n_group"] or 1) if is_limited else 1,
        topk_groups=(found["topk_group"] or 1) if is_limited else 1,
        normalize=found["norm_topk_prob"],
        scaling=float(found["routed_scaling_factor"]),
    )


def _rope(raw: Mapping[str, Any], max_seq_len: int, where: str) -> dict[str, Any]:
    """`rope_theta` and `rope` of a model.

    Args:
        raw: content of `config.json`.
        max_seq_len: of the model, which says the factor where the file does not.
        where: its path, for messages.
    """
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope": RopeConfig()}
    if kind != "yarn" or given.get("truncate") is False:
        raise ConfigError(
            f"{where}: rope_type={kind!r} (truncate={given.get('truncate', True)}) has no counterpart here, only default"
            " and truncated yarn have"
        )
    length = given.get("original_max_position_embeddings") or 0
    rope = RopeConfig(
        scaling="yarn",
        factor=float(given.get("factor") or max_seq_len / max(1, length)),
        original_max_seq_len=length,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        mscale=float(given.get("mscale") or 0.0),
        mscale_all_dim=float(given.get("mscale_all_dim") or 0.0),
    )
    stated = given.get("attention_factor")
    if stated is not None and abs(stated - rotary_scale(rope)) > 1e-6:
        raise ConfigError(
            f"{where}: attention_factor={stated} is not what mscale and mscale_all_dim give"
            f" ({rotary_scale(rope):.6f}); leave it out, or give the two"
        )
    return {"rope_theta": theta, "rope": rope}


def hub_type(config: ModelConfig) -> str:
    """The `model_type` that says what a model is.

    Raises:
        ConfigError: none does; naming why.
    """
    if reason := next(_unsayable(config), ""):
        raise ConfigError(f"Hugging Face's DeepSeek format cannot say {reason}")
    return V2 if config.moe.router == "v2" else V3


def _unsayable(config: ModelConfig) -> Iterator[str]:
    """What of a model the format has no words for."""
    moe = config.moe
    if others := sorted(set(config.attention) - {"mla"}):
        yield f"model.attention={others}: it knows latent attention alone"
    if config.dse.layers:
        yield f"model.dse.layers={list(config.dse.layers)}: it has no conditional memory"
    if moe.router not in ("v2", "v3"):
        yield f"model.moe.router={moe.router!r}: it has v2 and v3"
    if config.mtp.depth and moe.router == "v2":
        yield f"model.mtp.depth={config.mtp.depth}: its V2 predicts the next token alone"
    if config.mtp.depth and moe.leading_dense >= config.num_layers:
        yield f"model.mtp.depth={config.mtp.depth} with dense layers alone: its modules always have experts"
    if not moe.num_shared:
        yield "model.moe.num_shared=0: it always has a shared expert"
    if moe.router == "v2" and moe.normalize:
        yield "model.moe.normalize=true: its V2 gate never divides by the sum"
    if moe.router == "v2" and config.hidden % config.num_heads:
        yield f"model.hidden={config.hidden}: its V2 wants a multiple of num_heads={config.num_heads}"
    if moe.router == "v3" and moe.topk_groups < moe.num_groups and moe.group_scores != 2:
        yield f"model.moe.group_scores={moe.group_scores}: its V3 gate adds up two scores of a group"
    if moe.router == "v3" and moe.num_experts < 2 * moe.num_groups:
        yield f"model.moe.num_groups={moe.num_groups}: its V3 gate wants two experts in a group"


def write_config(config: ModelConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Args:
        config: that `hub_type` knows.
        base: keys that say nothing of the network and are kept, as from an import.
    """
    kind, moe, mla = hub_type(config), config.moe, config.mla
    left_out = {
        "rope_scaling",
        "rope_theta",
        "quantization_config",
        "torch_dtype",
        "num_nextn_predict_layers",
        "num_mtp_layers",
    }
    found = {key: value for key, value in base.items() if key not in left_out}
    is_v3, is_limited = kind == V3, moe.num_groups > 1
    class_name = "DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"
    normalize = is_v3 if moe.normalize is None else moe.normalize
    ends = config.dse.document_end_id
    return found | {
        "model_type": kind, "architectures": [class_name], "vocab_size": config.vocab_size,
        "hidden_size": config.hidden, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_heads,
        "intermediate_size": config.ffn_dim, "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std, "hidden_act": "silu", "attention_bias": False,
        "q_lora_rank": mla.q_lora_rank, "kv_lora_rank": mla.kv_lora_rank, "v_head_dim": mla.v_head_dim,
        "qk_nope_head_dim": mla.qk_nope_head_dim, "qk_rope_head_dim": mla.qk_rope_head_dim,
        "n_routed_experts": moe.num_experts, "n_shared_experts": moe.num_shared,
        "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.expert_dim,
        "first_k_dense_replace": moe.leading_dense, "routed_scaling_factor": moe.scaling,
        "n_group": moe.num_groups, "topk_group": moe.topk_groups, "norm_topk_prob": normalize,
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if is_limited else "greedy",
        "scoring_func": "sigmoid" if is_v3 else "softmax", "rope_parameters": _rope_parameters(config),
        "eos_token_id": base.get("eos_token_id", ends if ends >= 0 else None),
    } | ({"num_nextn_predict_layers": config.mtp.depth, "rope_interleave": True} if is_v3 else {})  # fmt: skip


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if rope.scaling == "yarn":
        found |= {
            "rope_type": "yarn", "factor": rope.factor, "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow,
            "original_max_position_embeddings": rope.original_max_seq_len,
        }  # fmt: skip
        found |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    return found
