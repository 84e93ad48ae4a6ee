"""The model's configuration: frozen dataclasses, checked when they are made.

Every command starts here: a YAML file becomes a `ModelConfig`, and each part of the network reads its own
section. Sources of the default choices: arXiv 2502.11089 (NSA), 2401.06066 and 2412.19437 (DeepSeekMoE),
2601.07372 (DSE), 2405.04434 (MLA), 2309.00071 (YaRN), 2412.19437 section 2.2 (MTP).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sparseray.errors import ConfigError
from sparseray.kernels.settings import ROUTERS, NSASizes
from sparseray.model.limits import LARGEST, check, count, within

ATTENTIONS = ("full", "nsa", "mla")
NO_ROUTER = "dense"
ROW_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Native sparse attention: compression, selection and window (arXiv 2502.11089 section 3.3).

    Args:
        block: tokens per compression block, l.
        stride: tokens between the starts of neighbouring compression blocks, d; divides both block sizes.
        select_block: tokens per selection block, l', at least `block`.
        num_selected: selected blocks per query, n, the forced ones included.
        num_initial: first blocks that are always selected.
        num_local: blocks, ending with the query's own, that are always selected.
        window: tokens of the sliding window, the query's own included.
        shared_kv: one key and value for all branches instead of one for each.
        compress_hidden: width of the compression MLP; 0 means twice the head size.
    """

    block: int = count(16)
    stride: int = count(8)
    select_block: int = count(16)
    num_selected: int = count(4)
    num_initial: int = count(1, 0)
    num_local: int = count(2, 0)
    window: int = count(32)
    shared_kv: bool = False
    compress_hidden: int = count(0, 0)

    def __post_init__(self) -> None:
        check("model.nsa", self)
        _ = self.sizes  # Checks them.

    @property
    def sizes(self) -> NSASizes:
        """The sizes as the operations take them.

        Raises:
            ConfigError: the paper's equations are not defined for them.
        """
        return NSASizes(
            block=self.block,
            stride=self.stride,
            select_block=self.select_block,
            num_selected=self.num_selected,
            window=self.window,
            num_initial=self.num_initial,
            num_local=self.num_local,
        )


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention: keys and values of all heads from one small vector (arXiv 2405.04434 section 2.1).

    Args:
        q_lora_rank: width of the compressed query; None for queries straight from the hidden states (V2-Lite).
        kv_lora_rank: width of the latent that keys and values come from.
        qk_nope_head_dim, qk_rope_head_dim: channels of a head's query and key without position, and with; the key's
            latter part is one for all heads.
        v_head_dim: size of a value head.
    """

    q_lora_rank: int | None = count(None, 1, 1 << 20)
    kv_lora_rank: int = count(64, 1, 1 << 20)
    qk_nope_head_dim: int = count(16, 1, 1 << 16)
    qk_rope_head_dim: int = count(8, 1, 1 << 16)
    v_head_dim: int = count(16, 1, 1 << 16)

    def __post_init__(self) -> None:
        check("model.mla", self)
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"mla.qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE turns pairs of channels"
            )

    @property
    def qk_head_dim(self) -> int:
        """Channels of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that a token keeps in a layer: the latent, and the part of its key that has a position."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions beyond the trained length are encoded (YaRN, arXiv 2309.00071, as DeepSeek released it).

    Args:
        scaling: "none" or "yarn".
        factor: new length over the trained one.
        original_max_seq_len: the trained length, tokens.
        beta_fast, beta_slow: turns within the trained length above which a channel keeps its frequency, and below
            which it is slowed down by `factor`.
        mscale, mscale_all_dim: of cosines and sines, and of the scores (V3: 1, 1; V2: 0.707, 0.707); where one of them
            is 0, cosines and sines have the paper's 0.1 ln(factor) + 1.
    """

    scaling: Literal["none", "yarn"] = "none"
    factor: float = within(1.0, 1.0, 1e6)
    original_max_seq_len: int = count(4096)
    beta_fast: float = within(32.0, above=0.0, at_most=1e6)
    beta_slow: float = within(1.0, above=0.0, at_most=1e6)
    mscale: float = within(1.0, 0.0, 1e3)
    mscale_all_dim: float = within(0.0, 0.0, 1e3)

    def __post_init__(self) -> None:
        check("model.rope", self)
        if self.beta_slow >= self.beta_fast:
            raise ConfigError(
                f"rope.beta_slow={self.beta_slow} must be below beta_fast={self.beta_fast}; the paper has 1 and 32"
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Fine-grained and shared experts (arXiv 2401.06066; V3 routing: arXiv 2412.19437 section 2.1.2).

    Args:
        num_experts: routed experts per layer.
        num_shared: shared experts, applied to every token as one MLP of num_shared * expert_dim.
        top_k: routed experts per token (2 for "gshard", 1 for "switch").
        expert_dim: inner width of one expert.
        leading_dense: first layers that keep a dense MLP of `ModelConfig.ffn_dim`.
        router: "v3", "v2", "gshard", "switch"; "dense" makes every layer an MLP of
            (num_shared + top_k) * expert_dim, the width a token would have used.
        num_groups: contiguous groups of experts (a property of the model, not of the cluster).
        topk_groups: groups that a token may use.
        group_scores: how many of its largest biased scores make a group's score (v3): 2 as in the released code,
            0 for top_k / topk_groups as in the paper.
        normalize: divide the chosen weights by their sum (v2, v3); null for what the papers do: v3 does, v2 does not.
        scaling: factor on the chosen weights (v2, v3).
        bias_update: step of the selection bias after an optimizer step (v3), gamma.
        balance_loss: coefficient of the balance loss, alpha.
    """

    num_experts: int = count(16, 1, 1 << 20)
    num_shared: int = count(1, 0, 1 << 20)
    top_k: int = count(4)
    expert_dim: int = count(64, 1, 1 << 20)
    leading_dense: int = count(1, 0)
    router: str = "v3"
    num_groups: int = count(1)
    topk_groups: int = count(1)
    group_scores: int = count(2, 0)
    normalize: bool | None = None
    scaling: float = within(1.0, above=0.0, at_most=1e6)
    bias_update: float = within(0.001, 0.0, 1e6)
    balance_loss: float = within(1e-4, 0.0, 1e6)

    def __post_init__(self) -> None:
        check("model.moe", self)
        if self.router not in (*ROUTERS, NO_ROUTER):
            raise ConfigError(
                f"moe.router={self.router!r} is unknown; use one of {', '.join(ROUTERS)} or {NO_ROUTER}"
            )
        if self.num_experts % self.num_groups or self.topk_groups > self.num_groups:
            raise ConfigError(
                f"moe.num_experts={self.num_experts} must be divisible by num_groups={self.num_groups}, and"
                f" topk_groups={self.topk_groups} must not exceed num_groups"
            )
        usable = self.topk_groups * (self.num_experts // self.num_groups)
        if self.top_k > usable:
            raise ConfigError(f"moe.top_k={self.top_k} exceeds the {usable} experts of the usable groups")
        needed = {"gshard": 2, "switch": 1}.get(self.router, self.top_k)
        if self.top_k != needed:
            raise ConfigError(f"moe.router={self.router!r} needs top_k={needed}, got top_k={self.top_k}")


@dataclass(frozen=True, kw_only=True)
class DSEConfig:
    """Conditional memory: hashed n-gram tables before the attention of some layers (arXiv 2601.07372).

    Args:
        layers: 0-based layers with a memory; empty for none. The id seeds the hash.
        orders: n-gram lengths, rising, at least 2.
        heads: hash heads of each order.
        rows_per_head: lower bound of each head's rows; the real number is the next unused prime.
        head_dim: width of a row.
        kernel_size: taps of the short convolution; its dilation is the largest order.
        seed: of the hash multipliers.
        pad_id: raw token id read before the start of a sequence or document.
        reset_at_document: n-grams and the convolution do not reach into an earlier document.
        document_end_id: token that ends a document, from which document starts are derived where the caller
            gives none (serving); -1 for none.
        row_dtype: dtype in which rows are stored and travel, float32 or bfloat16; moments are fp32.
        num_buckets: contiguous row ranges that a layer's table is divided into for placement.
        gate_eps: of the norms of hidden state and key in the gate; as released, torch's for fp32.
        conv_eps: of the norm before the convolution; as released.
    """

    layers: tuple[int, ...] = within((), 0, LARGEST)
    orders: tuple[int, ...] = within((2, 3), 2, 64)
    heads: int = count(4, 1, 1 << 16)
    rows_per_head: int = count(4096, 1, 1 << 36)
    head_dim: int = count(16, 1, 1 << 20)
    kernel_size: int = count(4, 1, 1 << 16)
    seed: int = count(0, 0)
    pad_id: int = 0
    reset_at_document: bool = True
    document_end_id: int = -1
    row_dtype: str = "float32"
    num_buckets: int = count(64, 1, 1 << 20)
    gate_eps: float = within(1.1920928955078125e-07, above=0.0, at_most=1.0)
    conv_eps: float = within(1e-5, above=0.0, at_most=1.0)

    def __post_init__(self) -> None:
        check("model.dse", self)
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"dse.layers={self.layers} must be rising 0-based layer numbers")
        if not self.orders or list(self.orders) != sorted(set(self.orders)):
            raise ConfigError(f"dse.orders={self.orders} must be rising n-gram lengths of at least 2")
        if self.row_dtype not in ROW_DTYPES:
            raise ConfigError(f"dse.row_dtype={self.row_dtype!r} is unknown; use {' or '.join(ROW_DTYPES)}")
        if self.num_buckets > self.rows_per_head:
            raise ConfigError(
                f"dse.num_buckets={self.num_buckets} exceeds rows_per_head={self.rows_per_head}; lower it"
            )

    @property
    def width(self) -> int:
        """Width of a token's concatenated rows."""
        return len(self.orders) * self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Modules that predict further tokens, one after another (arXiv 2412.19437 section 2.2).

    Args:
        depth: modules, D: the k-th predicts the token k places after the next one; 0 for none.
        loss_weight: of the mean of their losses in training, lambda.
        later_loss_weight: the same from step `later_from` on.
        later_from: that step; 0 for never.
    """

    depth: int = count(0, 0, 64)
    loss_weight: float = within(0.3, 0.0, 1e3)
    later_loss_weight: float = within(0.1, 0.0, 1e3)
    later_from: int = count(0, 0)

    def __post_init__(self) -> None:
        check("model.mtp", self)

    def weight_at(self, step: int) -> float:
        """Lambda of a step, which are counted from 1."""
        return self.later_loss_weight if 0 < self.later_from <= step else self.loss_weight


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A sparse language model.

    Args:
        vocab_size: rows of the embedding.
        hidden, num_layers, ffn_dim: width, depth and inner width of the leading dense layers.
        num_heads, num_kv_heads: query and key/value heads; the first is a multiple of the second.
        head_dim, v_head_dim: size of queries and keys, and of values (None: the same).
        attention: "full", "nsa" or "mla" per layer; one word stands for all layers.
        rope_theta: base of the rotary position encoding.
        max_seq_len: longest sequence.
        norm_eps: of every RMSNorm but those of the memory.
        tie_embeddings: the head shares the embedding.
        init_std: standard deviation of every initial matrix.
        rope: positions beyond the trained length.
        nsa, moe, dse: the three sparse parts.
        mla: sizes of the layers with latent attention; they have `num_heads` heads and no other of the sizes above.
        mtp: modules that predict further tokens. Each has a block like the last layer; module k's is layer
            num_layers + k - 1 to whoever counts layers.
    """

    vocab_size: int = count(2048, 1, 1 << 31)
    hidden: int = count(128, 1, 1 << 20)
    num_layers: int = count(4, 1, 1 << 16)
    num_heads: int = count(8, 1, 1 << 16)
    num_kv_heads: int = count(2, 1, 1 << 16)
    head_dim: int = count(16, 1, 1 << 16)
    v_head_dim: int | None = count(None, 1, 1 << 16)
    ffn_dim: int = count(384, 1, 1 << 24)
    attention: tuple[str, ...] = ("full",)
    rope_theta: float = within(10000.0, above=1.0, at_most=1e12)
    max_seq_len: int = count(512)
    norm_eps: float = within(1e-6, above=0.0, below=1.0)
    tie_embeddings: bool = True
    init_std: float = within(0.02, above=0.0, at_most=100.0)
    nsa: NSAConfig = field(default_factory=NSAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    dse: DSEConfig = field(default_factory=DSEConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    mla: MLAConfig = field(default_factory=MLAConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)

    def __post_init__(self) -> None:
        given: object = self.attention
        words = (given,) if isinstance(given, str) else tuple(self.attention)
        object.__setattr__(self, "attention", words)
        check("model", self)
        if len(words) == 1:
            object.__setattr__(self, "attention", words * self.num_layers)
        if len(self.attention) != self.num_layers or set(self.attention) - set(ATTENTIONS):
            raise ConfigError(
                f"model.attention={self.attention} must name {' or '.join(ATTENTIONS)} once, or once for each"
                f" of the num_layers={self.num_layers} layers"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} must be even: RoPE turns pairs of channels")
        if self.dse.layers and self.dse.layers[-1] >= self.num_layers:
            raise ConfigError(f"dse.layers={self.dse.layers} must be below num_layers={self.num_layers}")
        for name, token in (("pad_id", self.dse.pad_id), ("document_end_id", self.dse.document_end_id)):
            if not (0 if name == "pad_id" else -1) <= token < self.vocab_size:
                raise ConfigError(f"dse.{name}={token} is outside the vocabulary of {self.vocab_size}")

    @property
    def value_dim(self) -> int:
        """Size of a value head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def has_latent_layers(self) -> bool:
        """Whether some layer has latent attention."""
        return "mla" in self.attention

    @property
    def num_blocks(self) -> int:
        """Layers, and blocks of the modules that predict further tokens, which are numbered after them."""
        return self.num_layers + self.mtp.depth

    def like(self, block: int) -> int:
        """The layer whose kinds of attention and MLP a block has: its own number, or the last layer's."""
        return min(block, self.num_layers - 1)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based layers with routed experts, blocks of modules among them."""
        if self.moe.router == NO_ROUTER:
            return ()
        return tuple(i for i in range(self.num_blocks) if self.like(i) >= self.moe.leading_dense)

    def dense_width(self, layer: int) -> int:
        """Inner width of a layer's dense MLP: leading, or instead of experts ("dense" router)."""
        if self.like(layer) < self.moe.leading_dense:
            return self.ffn_dim
        return (self.moe.num_shared + self.moe.top_k) * self.moe.expert_dim
