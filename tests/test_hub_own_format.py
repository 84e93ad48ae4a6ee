"""What Hugging Face's format cannot say goes out as a type of our own, and the page beside it is enough to read it.

`Reader` below knows the page (FORMAT.md) and plain torch alone: no line of sparseray computes in it.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hub_models import tensors_of
from serving_parts import Parts, make_parts
from torch import Tensor

from sparseray.__main__ import main
from sparseray.errors import ConfigError
from sparseray.jobs.export import export_model
from sparseray.jobs.own_format import own_entries, page
from sparseray.jobs.tokens.progress import quiet
from sparseray.model.config import DSEConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from sparseray.platform.config import RunConfig, to_dict
from sparseray.platform.run import checkpoint

ROPE = RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=64, mscale=1.0, mscale_all_dim=0.7)
DSE = DSEConfig(layers=(1,), rows_per_head=512, num_buckets=4, document_end_id=0)
SIZES: dict[str, Any] = {
    "num_layers": 4, "attention": ("full", "nsa", "mla", "nsa"), "num_kv_heads": 2, "mla": MLAConfig(q_lora_rank=24),
    "moe": MoEConfig(num_experts=8, top_k=2, expert_dim=24, num_groups=4, topk_groups=2, scaling=1.5), "rope": ROPE,
    "dse": DSE, "mtp": MTPConfig(depth=2), "tie_embeddings": False,
}  # fmt: skip
IDS = torch.randint(1, 320, (150,), generator=torch.Generator().manual_seed(5))
IDS[70] = 0


def saved(parts: Parts, root: Path) -> Path:
    """The parts as a checkpoint of step 7, optimizer state beside."""
    config, layout = parts.model.config, parts.model.layout
    for name, buffer in parts.model.named_buffers():
        if name.endswith("router_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(len(name))))
    found = parts.model.state_dict() | parts.experts.tensors() | parts.memory.state_dict()
    folder = checkpoint.begin(root, 7)
    written = checkpoint.write_part(folder, "all", found | {"embedding@m": torch.zeros(3)})
    tensors = {name: vars(one) | {"shape": list(one.shape)} for name, one in written.items()}
    parts.tokenizer.save(str(folder / "tokenizer.json"))
    assert layout is not None
    layout.save(folder)
    identity = ("tokenizer.json", "dse_layout.json", "dse_token_map.bin")
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = {
        "format": checkpoint.FORMAT, "step": 7, "config": to_dict(RunConfig(model=config)), "files": files,
        "identity": {name: checkpoint.file_sha256(folder / name) for name in identity}, "tensors": tensors,
        "dse_layout_sha256": layout.sha256,
    }  # fmt: skip
    return checkpoint.finish(folder, manifest)


class Reader:
    """The network, written from the page."""

    def __init__(self, folder: Path) -> None:
        self.m = json.loads((folder / "config.json").read_text())["model"]
        self.w, self.folder = tensors_of(folder), folder

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        eps = self.m["norm_eps"] if eps is None else eps
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up = self.linear(x, f"{name}.gate_up").chunk(2, -1)
        return self.linear(F.silu(gate) * up, f"{name}.down")

    def s(self, x: float) -> float:
        return 0.1 * x * math.log(self.m["rope"]["factor"]) + 1

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """Channels i and i + D / 2 of [T, heads, D]."""
        rope, D = self.m["rope"], x.shape[-1]
        theta, length = self.m["rope_theta"], rope["original_max_seq_len"]
        plain = theta ** (-torch.arange(0, D, 2).double() / D)

        def pair(turns: float) -> float:
            return D * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair(rope["beta_fast"])), 0)
        high = min(math.ceil(pair(rope["beta_slow"])), D - 1)
        ramp = ((torch.arange(D // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        angles = positions.double()[:, None] * (plain * (1 - ramp) + plain / rope["factor"] * ramp)
        scale = self.s(rope["mscale"]) / self.s(rope["mscale_all_dim"])
        cos, sin = ((f(angles) * scale).float()[:, None] for f in (torch.cos, torch.sin))
        one, two = x.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    def scores(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """Softmax [heads, T, S] of q [T, heads, D] and k [S, heads, D]; none where nothing is seen."""
        scale = self.s(self.m["rope"]["mscale_all_dim"]) ** 2 / math.sqrt(q.shape[-1])
        x = torch.einsum("thd,shd->hts", q, k) * scale
        return torch.softmax(x.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)

    def split(self, x: Tensor, kinds: int) -> list[Tensor]:
        m, D = self.m, self.m["head_dim"]
        parts = x.split([m["num_heads"] * D] + [m["num_kv_heads"] * D] * kinds, -1)
        return [part.unflatten(-1, (-1, D)) for part in parts]

    def spread(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.m["num_heads"] // self.m["num_kv_heads"], 1)

    def full(self, x: Tensor, at: str) -> Tensor:
        q, k, v = self.split(self.linear(x, f"{at}.qkv"), 2)
        t = torch.arange(len(x))
        p = self.scores(self.turned(q, t), self.spread(self.turned(k, t)), t[:, None] >= t)
        return torch.einsum("hts,shd->thd", p, self.spread(v)).flatten(1)

    def compressed(self, x: Tensor, at: str) -> Tensor:
        l, d = self.m["nsa"]["block"], self.m["nsa"]["stride"]
        blocks = torch.stack([x[c : c + l] for c in range(0, len(x) - l + 1, d)])  # [C, block, heads, D]
        rows = (blocks + self.w[f"{at}.pos"][:, None]).transpose(1, 2).flatten(2)
        return self.linear(F.gelu(self.linear(rows, f"{at}.up")), f"{at}.down")

    def nsa(self, x: Tensor, at: str) -> Tensor:
        n, t, G = self.m["nsa"], torch.arange(len(x)), self.m["num_kv_heads"]
        q, k_slc, k_win, k_cmp, v_slc, v_win, v_cmp = self.split(self.linear(x, f"{at}.qkv"), 6)
        q, k_slc, k_win = (self.turned(one, t) for one in (q, k_slc, k_win))
        k, v = self.compressed(k_cmp, f"{at}.compress_k"), self.compressed(v_cmp, f"{at}.compress_v")
        first = torch.arange(len(k)) * n["stride"]
        p = self.scores(q, self.spread(self.turned(k, first)), t[:, None] >= first + n["block"] - 1)
        outs = [torch.einsum("htc,chd->thd", p, self.spread(v))]
        seen = torch.zeros(G, len(x), len(x), dtype=torch.bool)
        per, over = n["select_block"] // n["stride"], n["block"] // n["stride"]
        for g, probability in enumerate(p.unflatten(0, (G, -1)).sum(1)):
            for i in t.tolist():
                here = i // n["select_block"]
                best: dict[int, float] = {}
                for j in range(here + 1):
                    places = [per * j + a - b for a in range(per) for b in range(over)]
                    best[j] = sum(float(probability[i, c]) for c in places if 0 <= c < len(k))
                    if j < n["num_initial"] or j > here - n["num_local"]:
                        best[j] = math.inf
                for j in sorted(best, key=lambda j: (-best[j], j))[: n["num_selected"]]:
                    seen[g, i, j * n["select_block"] : (j + 1) * n["select_block"]] = True
        causal = t[:, None] >= t
        masks = (seen.repeat_interleave(len(q[0]) // G, 0) & causal, causal & (t[:, None] - t < n["window"]))
        for keys, values, mask in ((k_slc, v_slc, masks[0]), (k_win, v_win, masks[1])):
            outs.append(
                torch.einsum("hts,shd->thd", self.scores(q, self.spread(keys), mask), self.spread(values))
            )
        gates = torch.sigmoid(self.linear(x, f"{at}.gate")).unflatten(-1, (-1, 3))
        return sum(gates[..., i, None] * out for i, out in enumerate(outs)).flatten(1)  # type: ignore[union-attr]

    def mla(self, x: Tensor, at: str) -> Tensor:
        a, heads, t = self.m["mla"], self.m["num_heads"], torch.arange(len(x))
        q = self.linear(self.norm(self.linear(x, f"{at}.q_down"), f"{at}.q_norm", 1e-6), f"{at}.q_up")
        q_plain, q_turned = q.unflatten(-1, (heads, -1)).split(
            (a["qk_nope_head_dim"], a["qk_rope_head_dim"]), -1
        )
        latent, k_turned = self.linear(x, f"{at}.kv_down").split(
            (a["kv_lora_rank"], a["qk_rope_head_dim"]), -1
        )
        up = self.linear(self.norm(latent, f"{at}.kv_norm", 1e-6), f"{at}.kv_up").unflatten(-1, (heads, -1))
        k_plain, v = up.split((a["qk_nope_head_dim"], a["v_head_dim"]), -1)

        def pairs(one: Tensor) -> Tensor:
            return self.turned(torch.cat([one[..., ::2], one[..., 1::2]], -1), t)

        k = torch.cat([k_plain, pairs(k_turned[:, None]).expand(-1, heads, -1)], -1)
        p = self.scores(torch.cat([q_plain, pairs(q_turned)], -1), k, t[:, None] >= t)
        return torch.einsum("hts,shd->thd", p, v).flatten(1)

    def moe(self, x: Tensor, at: str) -> Tensor:
        m = self.m["moe"]
        scores = torch.sigmoid(self.linear(x, f"{at}.router"))
        groups = (scores + self.w[f"{at}.router_bias"]).unflatten(-1, (m["num_groups"], -1))
        rank = groups.sort(-1, descending=True).values[..., : m["group_scores"]].sum(-1)
        kept = torch.zeros_like(rank).scatter(1, rank.topk(m["topk_groups"]).indices, 1.0).bool()
        ids = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(m["top_k"]).indices
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * m["scaling"]
        y = self.mlp(x, f"{at}.shared")
        for token, row in enumerate(x):
            for expert, weight in zip(ids[token].tolist(), weights[token]):
                gate, up, down = (self.w[f"{at}.experts.{expert}.{part}"] for part in ("gate", "up", "down"))
                y[token] += weight * (down @ (F.silu(gate @ row) * (up @ row)))
        return y

    def memory(self, h: Tensor, ids: Tensor, layer: int) -> Tensor:
        d = self.m["dse"]
        layout = json.loads((self.folder / "dse_layout.json").read_text())
        ids_map = np.fromfile(self.folder / "dse_token_map.bin", "<i8")
        buckets = [name for name in self.w if name.startswith(f"dse.{layer}.bucket.")]
        table = torch.cat([self.w[name] for name in sorted(buckets, key=lambda one: int(one.split(".")[-1]))])
        place, text = d["layers"].index(layer), ids.tolist()
        begins = [
            max([0, *(i + 1 for i in range(t) if text[i] == d["document_end_id"])]) for t in range(len(text))
        ]
        rows = []
        for t, begin in enumerate(begins):
            offset, found = 0, []
            for order, primes in zip(d["orders"], layout["primes"][place]):
                mix = 0
                for back in range(order):
                    x = int(ids_map[text[t - back]]) if t - back >= begin else layout["pad"]
                    mix ^= x * layout["multipliers"][place][back]
                for prime in primes:
                    found.append(mix % prime + offset)
                    offset += prime
            rows.append(torch.cat([table[row] for row in found]))
        at = f"layers.{layer}.dse"
        key, value = self.linear(torch.stack(rows), f"{at}.key_value").chunk(2, -1)
        one, two = (
            self.norm(h, f"{at}.query_norm", d["gate_eps"]),
            self.norm(key, f"{at}.key_norm", d["gate_eps"]),
        )
        dot = (one * two).sum(-1, keepdim=True) / math.sqrt(h.shape[-1])
        v = torch.sigmoid(dot.sign() * dot.abs().clamp_min(1e-6).sqrt()) * value
        x, y, conv = (
            self.norm(v, f"{at}.value_norm", d["conv_eps"]),
            torch.zeros_like(v),
            self.w[f"{at}.conv.weight"],
        )
        for t, begin in enumerate(begins):
            for j in range(d["kernel_size"]):
                if t - j * max(d["orders"]) >= begin:
                    y[t] += conv[:, d["kernel_size"] - 1 - j] * x[t - j * max(d["orders"])]
        return v + F.silu(y)

    def block(self, h: Tensor, at: str, kind: str) -> Tensor:
        h = h + self.linear(
            getattr(self, kind)(self.norm(h, f"{at}.attention_norm"), f"{at}.attention"),
            f"{at}.attention.out",
        )
        x = self.norm(h, f"{at}.ffn_norm")
        return h + (
            self.moe(x, f"{at}.moe") if f"{at}.moe.router.weight" in self.w else self.mlp(x, f"{at}.ffn")
        )

    def logits(self, ids: Tensor) -> list[Tensor]:
        """Of the network, then of its modules."""
        h = self.w["embedding"][ids]
        for layer in range(self.m["num_layers"]):
            if layer in self.m["dse"]["layers"]:
                h = h + self.memory(h, ids, layer)
            h = self.block(h, f"layers.{layer}", self.m["attention"][layer])
        u = self.norm(h, "final_norm")
        found = [u @ self.w["head"].T]
        for k in range(self.m["mtp"]["depth"]):
            at, e = f"mtp.{k}", self.w["embedding"][ids[k + 1 :]]
            both = torch.cat(
                [self.norm(e, f"{at}.embedding_norm"), self.norm(u[:-1], f"{at}.hidden_norm")], -1
            )
            moe = self.m["attention"][-1]
            # Names of a module's experts are those of the layers after the last.
            self.w |= {
                name.replace(f"layers.{self.m['num_layers'] + k}.", f"{at}.block."): tensor
                for name, tensor in self.w.items()
            }
            u = self.norm(
                self.block(self.linear(both, f"{at}.projection"), f"{at}.block", moe), f"{at}.final_norm"
            )
            found.append(u @ self.w["head"].T)
        return found


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts(**SIZES)


@torch.no_grad()
def test_the_page_is_enough_to_compute_what_the_model_computes(parts: Parts, tmp_path: Path) -> None:
    export_model(saved(parts, tmp_path), tmp_path / "out", "stored", quiet, trust_own_format=True)
    out = parts.model(IDS[None], experts=parts.experts, memory=parts.memory)
    further = list(parts.model.predictions(IDS[None], out.hidden_BTH, parts.experts))
    found = Reader(tmp_path / "out").logits(IDS)
    assert len(found) == 3
    for theirs, ours in zip(found, (out, *further)):
        expected = parts.model.logits(ours.hidden_BTH[0])
        assert expected.std() > 0.1 and (theirs - expected).abs().max() < 1e-4


def test_the_page_names_every_tensor_with_its_shape(parts: Parts, tmp_path: Path) -> None:
    export_model(saved(parts, tmp_path), tmp_path / "out", "bfloat16", quiet, trust_own_format=True)
    text = (tmp_path / "out" / "FORMAT.md").read_text()
    rows = dict(re.findall(r"^\| `(\S+)` \| (.+?) \| \d+ \|$", text, re.M))
    stored = tensors_of(tmp_path / "out")
    for name, tensor in stored.items():
        shapes = rows[re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)]
        assert str(list(tensor.shape)) in shapes or shapes.count(" or ") == 3
        assert tensor.dtype == (torch.float32 if name.endswith("router_bias") else torch.bfloat16)
    assert sum(map(int, re.findall(r"\| (\d+) \|$", text, re.M))) == len(stored)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(stored) and not any("@" in name for name in index)


@pytest.mark.parametrize("change", [{"dse": DSEConfig()}, {"attention": ("full",) * 4, "mtp": MTPConfig()}])
def test_the_page_speaks_of_what_the_model_has(change: dict[str, Any]) -> None:
    config = ModelConfig(**{"vocab_size": 320, "hidden": 64, "num_heads": 4, "ffn_dim": 96} | SIZES | change)
    text = page(config, list(own_entries({})))
    assert ("## Memory" in text) == bool(config.dse.layers) and ("## Modules" in text) == bool(
        config.mtp.depth
    )
    assert ("nsa" in config.attention) == ("## Attention: nsa" in text)


def test_it_is_refused_unless_wanted_and_the_cure_works(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(parts, tmp_path)
    words = ["sparseray", "export", "--checkpoint", str(source), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "model.attention=['full', 'nsa']" in said and "with --trust_own_format it goes out" in said
    monkeypatch.setattr(sys, "argv", [*words, "--trust_own_format"])
    assert main() == 0 and "FORMAT.md says how it is read" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["sparseray", "import", "--from", str(tmp_path / "out"), "--out", str(tmp_path / "x")]
    )
    assert main() == 2 and "model_type='sparseray'" in capsys.readouterr().err


def test_what_their_format_can_say_goes_out_in_it(tmp_path: Path) -> None:
    latent = make_parts(**SIZES | {"attention": ("mla",) * 4, "mtp": MTPConfig()})
    with pytest.raises(ConfigError, match="conditional memory"):
        export_model(saved(latent, tmp_path / "a"), tmp_path / "out", "stored", quiet)
    assert not (tmp_path / "out").exists()
