"""Small random models of the DeepSeek family, made by transformers on the spot, and ours loaded from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from sparseray.jobs.import_ import import_model
from sparseray.jobs.tokens.progress import quiet
from sparseray.kernels.compiled_ops import COMPILED
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer
from sparseray.platform.config import RunConfig, from_dict
from sparseray.platform.run import checkpoint

VOCABULARY = 272
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "kv_lora_rank": 20, "q_lora_rank": 28, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "eos_token_id": 270,
    "bos_token_id": 269,
}  # fmt: skip


def yarn(mscale: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "mscale": mscale,
        "mscale_all_dim": mscale, "original_max_position_embeddings": 16,
    }  # fmt: skip


V3: dict[str, dict[str, Any]] = {
    "v3": {"n_group": 4, "topk_group": 2, "rope_parameters": yarn(1.0), "num_mtp_layers": 0},
    "v3_tied": {
        "n_group": 1, "topk_group": 1, "q_lora_rank": None, "tie_word_embeddings": True, "first_k_dense_replace": 0,
        "norm_topk_prob": False, "num_mtp_layers": 0, "routed_scaling_factor": 1.5,
    },
    "v3_dense": {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 3, "num_mtp_layers": 0},
}  # fmt: skip
V2: dict[str, dict[str, Any]] = {
    "v2_lite": {"q_lora_rank": None, "rope_parameters": yarn(0.707), "topk_method": "greedy"},
    "v2": {
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
        "rope_parameters": yarn(0.707) | {"mscale_all_dim": 0.0}, "first_k_dense_replace": 2,
    },
}  # fmt: skip
KINDS = (*V3, *V2)


def make(kind: str, **changes: Any) -> Any:
    """A model with weights far from their initial ones, in eval mode."""
    if kind in V3:
        model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | V3[kind] | changes))
    else:
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES | V2[kind] | changes))
    return fill(model).eval()


def fill(model: Any) -> Any:
    """Give a model weights far from their initial ones."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
            elif name.endswith("e_score_correction_bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            elif p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model


def save_tokenizer(folder: Path) -> None:
    """Bytes without merges, and a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [f"<|{index}|>" for index in range(len(alphabet), VOCABULARY)]
    specials[SIZES["eos_token_id"] - len(alphabet)] = "<|endoftext|>"
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write a model as transformers does, with a tokenizer; in several shards."""
    model.save_pretrained(folder, **{"max_shard_size": "100KB"} | options)
    save_tokenizer(folder)
    return folder


def imported(folder: Path, out: Path) -> Path:
    import_model(folder, out, quiet)
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as archive:
            found |= {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    return found


def save_single(tensors: dict[str, Tensor], folder: Path) -> None:
    """Put tensors into one file instead of those that are there."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


class Ours:
    """A checkpoint's model with all its experts."""

    def __init__(self, directory: Path) -> None:
        manifest = checkpoint.read_manifest(directory)
        self.config = from_dict(RunConfig, manifest["config"]).model
        self.model, self.experts = Transformer(self.config, None, ops=COMPILED), LocalExperts(self.config)
        own = self.model.state_dict() | self.experts.tensors()
        read = checkpoint.read_tensors(directory, list(own))
        assert set(read) == set(manifest["tensors"])
        with torch.no_grad():
            for name, tensor in own.items():
                assert tensor.shape == read[name].shape, name
                tensor.copy_(read[name])

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        hidden = self.model(tokens_BT, experts=self.experts, memory=None).hidden_BTH
        return self.model.logits(hidden)
