"""Import and export of a random model of DeepSeek-V2's shape: MB/s and peak memory, beside a plain copy of the files.

PYTHONPATH=. python -m benchmarks.hub --megabytes 400
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from sparseray.model.hub import entries
from sparseray.model.hub_config import read_config

HIDDEN, EXPERT, LAYER_BYTES = 1024, 512, 16 * 3 * 1024 * 512 * 2
SHARD_BYTES = 200 << 20


def make(folder: Path, megabytes: int) -> None:
    """Write a model in bfloat16 in several shards.

    Args:
        folder: to make.
        megabytes: of its weights, about.
    """
    folder.mkdir()
    config = {
        "model_type": "deepseek_v2", "vocab_size": 8192, "hidden_size": HIDDEN, "intermediate_size": 2048,
        "moe_intermediate_size": EXPERT, "num_hidden_layers": max(2, megabytes * 10**6 // LAYER_BYTES),
        "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 128, "q_lora_rank": None,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 16,
        "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "first_k_dense_replace": 1,
        "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def close() -> None:
        file = f"model-{len(set(where.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()

    for entry in entries(read_config(config, "config.json")):
        shard |= {name: torch.randn(entry.piece).to(torch.bfloat16) for name in entry.theirs}
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            close()
    close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


PROGRAM = """
import sys
from pathlib import Path
from sparseray.__main__ import main
sys.argv[0] = "sparseray"
try:
    sys.exit(main())
finally:
    print(*(x.split()[1] for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x), file=sys.stderr)
"""


def measured(words: list[str]) -> tuple[float, float]:
    """Run a command in a process of its own: (seconds, peak MB of its memory, files that it maps included)."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], check=True, capture_output=True, text=True, env=os.environ
    )
    return time.perf_counter() - begin, int(done.stderr.split()[-1]) / 1024


def main() -> None:
    """Measure and print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--folder", default=None, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        model, ckpt, out, copy = (Path(root) / name for name in ("model", "checkpoint", "out", "copy"))
        make(model, options.megabytes)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e6
        idle = measured(["import", "--help"])
        begin = time.perf_counter()
        shutil.copytree(model, copy)
        os.sync()
        print(f"copy and sync: {size / (time.perf_counter() - begin):.0f} MB/s of {size:.0f} MB")
        shutil.rmtree(copy)
        for name, words in (
            ("import", ["import", "--from", str(model), "--out", str(ckpt)]),
            ("export", ["export", "--checkpoint", str(ckpt), "--out", str(out)]),
        ):
            seconds, peak = measured(words)
            print(
                f"{name}: {size / seconds:.0f} MB/s in {seconds:.1f} s with start, peak {peak:.0f} MB"
                f" (help alone: {idle[0]:.1f} s, {idle[1]:.0f} MB)"
            )


if __name__ == "__main__":
    main()
