"""transformers' DeepseekV3ForCausalLM as a peer on one GPU: a training step of random weights and tokens.

python -m benchmarks.gpu_peers SHAPE STEPS WARMUP        (SHAPE: 1b, 1b_long, moonlight_6)
"""

import json
import sys
import time
from typing import Any

import torch

COMMON = {
    "vocab_size": 32768,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
}
SMALL = {
    **COMMON,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 12,
    "n_shared_experts": 1,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "1b": (SMALL, 8, 4096),
    "1b_long": (SMALL, 1, 32768),
    "moonlight_6": (
        {
            **COMMON,
            "hidden_size": 2048,
            "intermediate_size": 11264,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 6,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
        8,
        4096,
    ),
}


def main() -> int:
    """Train and print one line of JSON."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes, batch, length = SHAPES[sys.argv[1]]
    steps, warmup = int(sys.argv[2]), int(sys.argv[3])
    config = DeepseekV3Config(**sizes, max_position_embeddings=length, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds, loss = [], 0.0
    for _ in range(steps):
        tokens = torch.randint(0, 32768, (batch, length), device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        out = model(input_ids=tokens, labels=tokens, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        loss = float(out.loss.detach())
    print(
        json.dumps(
            {
                "tokens": batch * length,
                "seconds": seconds[warmup:],
                "gib": torch.cuda.max_memory_reserved() / 2**30,
                "loss": loss,
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
