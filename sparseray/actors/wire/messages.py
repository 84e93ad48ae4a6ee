"""What slots say to each other: a frozen dataclass for each kind of message.

Bodies that carry a value of a higher floor stand there: InstallPlan in actors/installation.py, Pull, PullOn and Chunk in
actors/exchange/chunks.py, those of serving in actors/serving/messages.py. A part is one of those that the global batch is cut into, whatever the number of workers.
  scheduler -> slot: InstallPlan, Settled, RunStep, Commit, Evaluate, SaveCheckpoint, Offer, Withdraw, Drain, Ping
  slot -> scheduler: Installed, Stale, PartDone, Prepared, Evaluated, Saved, StillWriting, Offered, Draining, Pong, Silent, Failed
  ingress -> slot:   Generate, Cancel, Ping; slot -> ingress: Tokens, Moved, Pong; scheduler -> ingress: Routes
  slot -> slot:      ExpertForward, ExpertBackward, FetchRows, Pull, PullOn (answered by ExpertRows, MemoryRows, Chunk);
                     FinishPart, ExpertPart, DenseNodes, DenseReduced, ExpertReduced, RowsReduced
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseray.actors.wire.envelope import Body

Key = tuple[int, int]

# -- scheduler to slot ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settled(Body):
    """All slots have entered the generation: forget what it does not give you. In training a commit says so."""


@dataclass(frozen=True, kw_only=True)
class RunStep(Body):
    """Run your parts of the step."""


@dataclass(frozen=True, kw_only=True)
class Commit(Body):
    """Apply the update of a step.

    Args:
        step: that was journalled.
        lr, memory_lr: learning rates of this step.
        scale: factor on the gradients (clipping).
        counts_LE: int64, tokens per moe layer and expert over the whole global batch.
        is_skipped: drop the gradients instead; the step counts, and no weight changes.
    """

    step: int
    lr: float
    memory_lr: float
    scale: float
    counts_LE: Tensor
    is_skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluate(Body):
    """Compute validation losses: (batch, slot that computes it)."""

    batches: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class SaveCheckpoint(Body):
    """Write what is primary at you into the folder.

    Args:
        directory: the folder.
        in_background: go on training meanwhile; the answer comes between two later steps.
    """

    directory: str
    in_background: bool = False


@dataclass(frozen=True, kw_only=True)
class Offer(Body):
    """Keep the weights that are primary at you aside for servers, as they are now; answered by Offered."""


@dataclass(frozen=True, kw_only=True)
class Withdraw(Body):
    """Forget what you keep for servers."""

    is_of_any_generation: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Ping(Body):
    """Give a sign of life.

    Args:
        address: to give it to; empty for who is known by the plan.
    """

    is_of_any_generation: ClassVar[bool] = True

    address: str = ""


# -- slot to scheduler ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Installed(Body):
    """The plan's roles and state are taken."""


@dataclass(frozen=True, kw_only=True)
class Stale(Body):
    """What is held here is of another step and was dropped."""


@dataclass(frozen=True, kw_only=True)
class PartDone(Body):
    """What one part of a step gave.

    Args:
        loss_sum: loss summed over its tokens, each times its weight; nats.
        weight: sum of these weights.
        aux_loss: balance loss.
        metrics: further losses by name, means over the part.
        tokens: number of targets.
        seconds: spent by phase, in this step so far.
        counts_LE: int64, tokens per moe layer and expert.
        device_bytes: most memory that the slot has had reserved on its GPU; 0 without one.
    """

    loss_sum: float
    weight: float
    aux_loss: float
    metrics: dict[str, float]
    tokens: int
    seconds: dict[str, float]
    counts_LE: Tensor
    device_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared(Body):
    """A role has all its reduced gradients.

    Args:
        role: dense, expert or memory.
        norms: squared norm of the gradient of each logical tensor that is primary here; or, where nobody else has
            any, a few numbers of the same exact sum.
        digests: CRC-32 of each gradient that has replicas.
    """

    role: str
    norms: dict[str, float]
    digests: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Evaluated(Body):
    """Validation batch to (loss sum in nats, sum of weights)."""

    losses: dict[int, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """Where a tensor of a checkpoint is: its file, shape, dtype and SHA-256."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Saved(Body):
    """What was written into a checkpoint.

    Args:
        tensors: by logical name.
        error: why it could not be written in the background; empty if it was.
    """

    tensors: dict[str, SavedTensor]
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class StillWriting(Body):
    """Host memory holds a checkpoint that was given up still: another one would wait for it, and a step for that."""


@dataclass(frozen=True, kw_only=True)
class Offered(Body):
    """Where servers can read what was to be kept aside.

    Args:
        step: that it is of.
        address: of the slot's port for weights.
    """

    step: int
    address: str


@dataclass(frozen=True, kw_only=True)
class Pong(Body):
    """A sign of life."""


@dataclass(frozen=True, kw_only=True)
class Silent(Body):
    """Somebody whom the step needs does not answer."""

    error: str


@dataclass(frozen=True, kw_only=True)
class Failed(Body):
    """Something cannot be done here: `user` by a user's mistake; `lost` because no process can use its GPU after that error."""

    error: str
    user: bool
    lost: bool = False


# -- slot to slot: requests and their replies ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExpertForward(Body):
    """Run rows through experts; answered by ExpertRows, one row for each of `rows_R`.

    Args:
        experts, counts: experts asked for and how many rows each has, in row order.
        keep: keep what backward needs.
        x_UH: tokens that any of these experts needs, once each.
        rows_R: int64, the token of each row, sorted by expert.
    """

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    keep: bool
    x_UH: Tensor
    rows_R: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertBackward(Body):
    """Propagate gradients through the rows of the forward before; answered by ExpertRows.

    Args:
        dout_UH: gradient of the layer's output for the tokens that were sent.
        weights_R: routing weight of each row.
    """

    dout_UH: Tensor
    weights_R: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertRows(Body):
    """Outputs, or gradients of inputs, of an expert's rows, [R, H]."""

    rows_RH: Tensor


@dataclass(frozen=True, kw_only=True)
class FetchRows(Body):
    """Read table rows of every memory layer, int64 [N] each; answered by MemoryRows."""

    rows_LN: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class TableHandle:
    """Where a process of the same user on the same host finds a table.

    Args:
        namespace: within which `pid` means that process, as `process_namespace` (state/tables.py) gives it.
        pid, descriptor: of the process that owns the table.
        token: random number in the table's header, for process ids come again.
        num_rows, width: R and D.
        row_dtype: float32 or bfloat16.
    """

    namespace: str
    pid: int
    descriptor: int
    token: int
    num_rows: int
    width: int
    row_dtype: str


@dataclass(frozen=True, kw_only=True)
class MemoryRows(Body):
    """Table rows of every memory layer.

    Args:
        values_LND: [N, D] each, in the rows' dtype.
        handles: of these tables, so that a slot on the same host need not ask again.
    """

    values_LND: tuple[Tensor, ...]
    handles: tuple[TableHandle, ...]


@dataclass(frozen=True, kw_only=True)
class TakeWeights(Body):
    """Give tensors that are offered, by logical name; answered by Pieces, with those that are there.

    Args:
        step: that they must be of.
        names: logical names.
    """

    step: int
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pieces(Body):
    """Tensors of pieces by logical name, as they are at one step."""

    tensors: dict[str, Tensor]


# -- slot to slot: gradients -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RowGradients:
    """Gradients of table rows: addresses int64 [U], rising, and sums [U, D]."""

    rows_U: Tensor
    sums_UD: Tensor


@dataclass(frozen=True, kw_only=True)
class FinishPart(Body):
    """A part has sent all its gradients; those of the receiver's table rows, by memory layer."""

    rows: tuple[RowGradients, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertPart(Body):
    """Gradients of one part for experts (layer, expert) that are summed at the receiver, [experts, 3*H*I]."""

    keys: tuple[Key, ...]
    gradients: Tensor


@dataclass(frozen=True, kw_only=True)
class DenseNode:
    """A finished subtree of the sum of the dense gradients over parts (state/tree.py)."""

    level: int
    index: int
    gradient: Tensor


@dataclass(frozen=True, kw_only=True)
class DenseNodes(Body):
    """The subtrees of a worker's parts."""

    nodes: tuple[DenseNode, ...]


@dataclass(frozen=True, kw_only=True)
class DenseReduced(Body):
    """The dense gradient, summed over all parts."""

    gradient: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertReduced(Body):
    """Gradients of experts (layer, expert), summed over all parts, [experts, 3*H*I]."""

    keys: tuple[Key, ...]
    gradients: Tensor


@dataclass(frozen=True, kw_only=True)
class RowsReduced(Body):
    """Row gradients of buckets (layer, bucket), summed over all parts."""

    keys: tuple[Key, ...]
    rows: tuple[RowGradients, ...]
