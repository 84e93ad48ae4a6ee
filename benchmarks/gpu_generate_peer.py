"""transformers' DeepseekV3ForCausalLM as a peer on one GPU: greedy generation from random weights.

python -m benchmarks.gpu_generate_peer BATCH PROMPT NEW
"""

import json
import sys
import time

import torch

from benchmarks.gpu_peers import SMALL


def main() -> int:
    """Generate and print one line of JSON."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    prompt, new = int(sys.argv[2]), int(sys.argv[3])
    config = DeepseekV3Config(**SMALL, max_position_embeddings=4096, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    for batch in map(int, sys.argv[1].split(",")):
        tokens = torch.randint(0, 32768, (batch, prompt), device="cuda")
        options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
        with torch.no_grad():
            model.generate(tokens, max_new_tokens=4, min_new_tokens=4, **options)
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **options)
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        print(json.dumps({"batch": batch, "seconds": seconds, "rate": batch * new / seconds}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
