"""How many bytes of each GPU a training run takes, or a server; pure arithmetic on the configuration.

Weights, moments, gradients and caches are exact, of several slots for the one that holds most. Activations are those that the
backward pass reads again, counted by layer from what the network keeps, and what one layer's backward pass needs beside
them; of experts in other slots, as many rows come as go. Of memory tables the rows of a few steps are there, as if no
two tokens read the same.
"""

from dataclasses import dataclass

from sparseray.actors.state.pieces import row_bytes
from sparseray.model.config import ModelConfig
from sparseray.model.counts import count_parameters
from sparseray.platform.config import RunConfig
from sparseray.platform.planning.inventory import Inventory, num_slots

GIB = 1 << 30
CONTEXT_BYTES = 700 << 20
"""CUDA's context with compiled kernels and the workspaces of its libraries."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on the GPU.

    Args:
        weights: fp32 masters and the copy that is computed with.
        moments: both.
        gradients: of the parts that are being summed.
        activations: of one part.
        exchange: what several slots lay open to each other, and keep of each other's tokens.
        rows: of memory tables, with their moments and the sums of their gradients.
        context: CUDA's own.
    """

    weights: int
    moments: int
    gradients: int
    activations: int
    exchange: int = 0
    rows: int = 0
    context: int = CONTEXT_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        held = self.weights + self.moments + self.gradients
        return held + self.activations + self.exchange + self.rows + self.context


@dataclass(frozen=True, kw_only=True)
class ServingMemory:
    """Bytes on the GPU of an engine.

    Args:
        weights: fp32 masters and the copy that is computed with.
        caches: pages for as many of the longest requests as are computed at once.
        least: of the caches, for one such request alone.
        working: of one step: rows of prompts on their way through a layer, and logits.
        context: CUDA's own.
    """

    weights: int
    caches: int
    least: int
    working: int
    context: int = CONTEXT_BYTES

    @property
    def total(self) -> int:
        """What is needed at least; the caches take of the rest what they can use."""
        return self.weights + self.least + self.working + self.context


def serving_memory(config: RunConfig) -> ServingMemory:
    """Estimate the bytes that an engine takes on its GPU.

    Args:
        config: of the checkpoint's run, with the server's sections.
    """
    import torch

    from sparseray.actors.serving.cache_sizes import PAGE, CacheSizes
    from sparseray.actors.serving.paged_engine import PREFILL_ROWS

    model, serve, element = config.model, config.serve, _bytes_of(config.serve.dtype)
    longest = serve.max_model_len or model.max_seq_len
    caches = CacheSizes.of(
        model,
        page=PAGE,
        dtype=getattr(torch, serve.dtype),
        places=serve.max_batch,
        prompt_rows=PREFILL_ROWS,
    )
    # A page of nobody besides.
    pages = -(-longest // PAGE)
    full = caches.bytes(1 + serve.max_batch * pages)
    return ServingMemory(
        weights=_held(config, config.cluster.expert_shards) * (4 + (element if element < 4 else 0)),
        caches=min(full, int(serve.cache_gib * GIB) or full),
        least=caches.bytes(1 + pages),
        working=PREFILL_ROWS * _working(model, element) + 2 * serve.max_batch * 4 * model.vocab_size,
    )


def device_memory(config: RunConfig) -> DeviceMemory:
    """Estimate the bytes that a run takes on its GPU."""
    parameters, element = count_parameters(config.model), _bytes_of(config.train.dtype)
    slots = num_devices(config)
    count, copies = _held(config, slots), element if element < 4 else 0
    return DeviceMemory(
        weights=count * (4 + copies),
        moments=count * 2 * _bytes_of(config.optim.moments),
        gradients=_gradients(config, element, parameters["dense"], count - parameters["dense"]),
        activations=_activations(config, element),
        exchange=_exchange(config, element, slots, parameters["dense"]) if slots > 1 else 0,
        rows=_rows(config),
    )


def snapshot_bytes(config: RunConfig) -> int:
    """Bytes of host memory that a checkpoint takes, of all slots together, where it is written beside the next steps."""
    parameters, dse = count_parameters(config.model), config.model.dse
    trained = parameters["dense"] + parameters["experts"]
    rows = parameters["memory"] // dse.head_dim if dse.layers else 0
    return trained * (4 + 2 * _bytes_of(config.optim.moments)) + rows * row_bytes(dse)


def _held(config: RunConfig, slots: int) -> int:
    """Weights of the slot that holds most: all dense ones, and of several slots a share of the experts with its replicas."""
    parameters, cluster, count = count_parameters(config.model), config.cluster, config.model.moe.num_experts
    mine = -(-count // cluster.expert_shards) * min(cluster.replication, slots)
    return parameters["dense"] + parameters["experts"] * (min(mine, count) if slots > 1 else count) // count


def num_devices(config: RunConfig) -> int:
    """Slots with a device each, as the configuration wants them."""
    roles = Inventory.of(config.model, parts=config.train.logical_shards).roles(config.cluster)
    return num_slots(roles, colocated=config.cluster.colocated)


def _exchange(config: RunConfig, element: int, slots: int, dense: int) -> int:
    """Regions for tokens and rows (actors/peers/regions.py), the dense sum, and others' tokens in each MoE layer."""
    model, train = config.model, config.train
    tokens, top_k = train.sequences_per_shard * train.seq_len, model.moe.top_k
    of_tokens = slots * (element * model.hidden + 8 * top_k) + top_k * (element * model.hidden + 4)
    # Of layers that are computed again one at a time keeps the tokens of all.
    layers = 1 if train.recompute else len(model.moe_layers)
    kept = slots * element * model.hidden * layers
    # Each slot's nodes are cut in slices, and flat before that.
    return tokens * (of_tokens + kept) + 4 * 3 * dense


def _bytes_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _gradients(config: RunConfig, element: int, dense: int, experts: int) -> int:
    """Parts' own gradients, and the fp32 sums that wait for their siblings.

    A slot sums dense gradients over its own parts. Experts get those of all slots' parts: in "fast" a round's at once, in
    "bitwise" each part's apart.

    Args:
        config: of the run.
        element: bytes of a number in `train.dtype`.
        dense, experts: weights of a slot.
    """
    parts = config.train.logical_shards
    at_once = min(parts, config.cluster.attention_workers)
    own = rounds = -(-parts // at_once)
    if config.determinism == "fast":
        return dense * (element + 4 * _sums(config, own)) + experts * (element + 4 * _sums(config, rounds))
    return dense * (element + 4 * _sums(config, own)) + experts * (
        element * at_once + 4 * _sums(config, parts)
    )


def _sums(config: RunConfig, parts: int) -> int:
    """Sums over so many parts that wait for their siblings; one part is its own sum."""
    if config.determinism == "fast":
        return min(1, parts - 1)
    return (parts - 1).bit_length()


def _rows(config: RunConfig) -> int:
    """Staged for the step before, the open one and the next; places and where sums begin are int32, the rest int64."""
    dse, train = config.model.dse, config.train
    heads = len(dse.orders) * dse.heads
    addresses = train.logical_shards * train.sequences_per_shard * train.seq_len * heads
    distinct = min(addresses, heads * dse.rows_per_head)
    staged = distinct * (row_bytes(dse) + 8 + 4 * train.logical_shards) + addresses * 8
    return len(dse.layers) * (
        3 * staged + distinct * dse.head_dim * 4 * max(1, _sums(config, train.logical_shards))
    )


def _activations(config: RunConfig, element: int) -> int:
    model, train = config.model, config.train
    tokens = train.sequences_per_shard * train.seq_len
    kept = [_layer(model, layer, element) for layer in range(model.num_blocks)]
    if train.recompute:
        # Every layer's input and routing; one layer at a time has the rest.
        kept = [model.hidden * element + 12 * model.moe.top_k] * model.num_blocks + [max(kept)]
    working = _working(model, element)
    ends = 3 * model.hidden * element
    return tokens * (sum(kept) + working + ends)


def _layer(model: ModelConfig, layer: int, element: int) -> int:
    """Bytes that a token leaves in a layer for the backward pass."""
    hidden, moe = model.hidden, model.moe
    # Two residual sums with their norms.
    found = element * 4 * hidden + _attention(model, layer, element)
    if layer in model.dse.layers:
        found += element * (model.dse.width + 5 * hidden)
    if layer not in model.moe_layers:
        return found + element * 3 * model.dense_width(layer)
    # The router's input in fp32, its scores, the chosen experts' pre-activations and the shared experts'.
    found += 4 * hidden + 12 * moe.num_experts + 20 * moe.top_k
    return found + element * (2 * moe.top_k * moe.expert_dim + 3 * moe.num_shared * moe.expert_dim)


def _attention(model: ModelConfig, layer: int, element: int) -> int:
    """Of it queries, keys, values, the attention's output and its statistics."""
    heads, kind = model.num_heads, model.attention[model.like(layer)]
    if kind == "mla":
        mla = model.mla
        compressed = 2 * (mla.q_lora_rank or 0) + 2 * mla.cache_width
        return element * (2 * heads * (mla.qk_head_dim + mla.v_head_dim) + compressed) + 4 * heads
    branches = 3 if kind == "nsa" and not model.nsa.shared_kv else 1
    keys = branches * model.num_kv_heads * (model.head_dim + model.value_dim)
    found = element * (heads * (model.head_dim + model.value_dim) + keys) + 4 * branches * heads
    return found if branches == 1 else found + element * 2 * heads * model.value_dim + 12 * heads


def _working(model: ModelConfig, element: int) -> int:
    """Bytes of a token that one layer's backward pass needs beside what is kept."""
    moe = model.moe
    experts = moe.top_k * (3 * moe.expert_dim + 2 * model.hidden) if model.moe_layers else 0
    dense = 4 * max(model.dense_width(layer) for layer in range(model.num_layers))
    return element * (max(experts, dense) + 4 * model.hidden)
