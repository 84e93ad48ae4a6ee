"""`Ops`: every operation that the model needs, as one value; all that model/ imports of the kernels.

`REFERENCE` is plain PyTorch and runs anywhere; on a CPU a row's bits do not depend on the other rows of a call.
The compiled instance (compiled_ops.py) serves on a CPU, the Triton instance (triton_ops.py) runs the kernels of nsa/,
moe/ and dse/. Those of paged caches are in paged_ops.py, those of staged table rows in row_ops.py. `ops_for` chooses by the key `kernels` of a run's configuration and the device.

Shapes: R rows, T tokens, B sequences, S keys, C compressed tokens, Q query heads, G key/value heads, D and V head
sizes, H hidden, E experts, K experts per token, I inner width, N table rows per token, L history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.held_ops import HeldOps, HeldRows
from sparseray.kernels.moe.expert_sum import HeldGradients
from sparseray.kernels.nsa.reference import BranchKeys, Compression
from sparseray.kernels.paged import History, KeyValues, Pages, Recent
from sparseray.kernels.paged_ops import PagedOps
from sparseray.kernels.paged_plain_ops import PagedPlainOps
from sparseray.kernels.row_ops import RowOps
from sparseray.kernels.settings import Kernels, NSASizes

__all__ = [
    "REFERENCE",
    "BranchKeys",
    "Compression",
    "Fusion",
    "HeldGradients",
    "HeldRows",
    "History",
    "KeyValues",
    "Ops",
    "Pages",
    "Recent",
    "ops_for",
]


class Ops(PagedOps, HeldOps, RowOps, Protocol):
    """The operations of a model; each is differentiable in every floating-point tensor it takes.

    Attributes:
        chunks_keep_bits: a sequence has the same bits however it is cut into chunks, single tokens among them.
        row_padding: a call in inference has a multiple of so many rows.
        expands_latents: chunks of prompts attend to keys and values that are made of the latents again, single tokens
            to the latents themselves.
    """

    chunks_keep_bits: bool
    row_padding: int
    expands_latents: bool

    def linear(self, x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, invariant: bool) -> Tensor:
        """x @ weight.T + bias.

        Args:
            invariant: a row's bits must not depend on the number of rows, which is a multiple of `ROW_PADDING`.
        """
        ...

    def add_linear(self, y_RO: Tensor, x_RI: Tensor, weight_OI: Tensor, *, invariant: bool) -> Tensor:
        """y + x @ weight.T, perhaps in the place of y, which nobody else may need."""
        ...

    def linear_by_head(self, x_RQI: Tensor, weight_QOI: Tensor) -> Tensor:
        """Every head's rows times its own matrix, [R, Q, O]; in inference, as `linear` where it is invariant."""
        ...

    def embedding(self, tokens_R: Tensor, weight_VH: Tensor) -> Tensor:
        """Rows of the weight, [R, H]; their gradients are summed in an order that depends on the tokens alone."""
        ...

    def rms_norm(self, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of the last axis, computed in fp32 and returned in the dtype of x."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight_H: Tensor, eps: float, readers: int = 1
    ) -> tuple[Tensor, ...]:
        """(norm of residual + x, residual + x).

        Args:
            readers: 1 to 3; the norm comes once for each, and the gradients of all meet in the norm's own pass.
        """
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary position encoding; channel i is paired with channel i + D/2.

        Args:
            x: [..., tokens, heads, D].
            cos, sin: fp32 [tokens, D / 2] at the tokens' positions.
        """
        ...

    def rotary_pairs(self, x_RQD: Tensor, start: int, cos_RP: Tensor, sin_RP: Tensor) -> Tensor:
        """Rotary position encoding of each head's channels from `start` on, of which 2i is paired with 2i + 1.

        In what order they come out is the operations' own affair, and the same for queries and keys: it changes no score.

        Args:
            x_RQD: heads.
            start: first channel that turns.
            cos_RP, sin_RP: fp32, of each row's position and pair.
        """
        ...

    def rotary_split(
        self,
        fused_RX: Tensor,
        heads: tuple[int, int],
        head_dim: int,
        turned: int,
        rest: Sequence[int],
        cos_RD: Tensor,
        sin_RD: Tensor,
    ) -> tuple[Tensor, ...]:
        """Cut the rows of a fused projection into queries, keys and the rest, queries and keys rotated.

        Args:
            fused_RX: the parts one after another: queries, `turned` parts of keys, one part for each of `rest`.
            heads: of queries (Q), and of every other part (G).
            head_dim: channels (D) of a head of queries and keys.
            turned: how many parts of keys are rotated.
            rest: channels of a head of each part that is not.
            cos_RD, sin_RD: as in `rotary`.

        Returns:
            queries [R, Q, D], keys [R, G, D] of each rotated part, and each other part [R, G, its channels].
        """
        ...

    def branch_rows(
        self, fused_RX: Tensor, heads: tuple[int, int], widths: tuple[int, int], angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        """`rotary_split` of NSA's projection: queries; keys and values by branch, those to be compressed not rotated.

        Args:
            fused_RX: queries, keys of the selected, the window and the compressed branch, and their values; or shared ones.
            heads, widths: Q and G; D and V.
        """
        ...

    def swiglu(self, gate_up_RI: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis."""
        ...

    def attend(self, q_BTQD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> Tensor:
        """Causal softmax attention of the last T of S positions, T <= S; Q is a multiple of G. [B, T, Q, V]."""
        ...

    def compress(self, x_BTGD: Tensor, phi: Compression, sizes: NSASizes) -> Tensor:
        """Compress blocks of keys or values to one token each, [B, C, G, D] (arXiv 2502.11089 eq. 7)."""
        ...

    def nsa_attention(
        self,
        q_BTQD: Tensor,
        keys: BranchKeys,
        gates_BTQ3: Tensor,
        sizes: NSASizes,
        *,
        q_start: int = 0,
        win_start: int = 0,
    ) -> Tensor:
        """Native sparse attention: the gated sum of the compressed, the selected and the window branch.

        Args:
            q_BTQD: rotated queries at positions q_start, q_start + 1, ...
            keys: keys and values of the three branches; the selected ones reach the last query.
            gates_BTQ3: fp32 in [0, 1], in the order compressed, selected, window.
            win_start: position of the first window key.

        Returns:
            [B, T, Q, V] in the dtype of q.

        Source: arXiv 2502.11089 eq. 5 and 7-12.
        """
        ...

    def nsa_selection(
        self, q_BTQD: Tensor, k_cmp: Tensor, num_keys: int, sizes: NSASizes, *, q_start: int = 0
    ) -> Tensor:
        """The blocks that `nsa_attention` selects, int32 [B, T, G, num_selected], -1 for none; no gradient."""
        ...

    def balance(self, scores_TE: Tensor, choices: Tensor | int, groups: int) -> tuple[Tensor, Tensor]:
        """Of each expert the share of choices that fell on it, times E, and its mean score; both fp32 [groups, E].

        Args:
            scores_TE: fp32, positive; only the mean has a gradient.
            choices: the chosen experts [T, K], all different; or K for each token's best, ties to the lower id, and scores
                that are divided by the token's sum.
            groups: sequences of equal length, one after another.
        """
        ...

    def router_logits(self, x_RH: Tensor, weight_EH: Tensor, *, invariant: bool) -> Tensor:
        """x @ weight.T in fp32, [R, E]; `invariant` as in `linear`."""
        ...

    def route(
        self,
        logits_TE: Tensor,
        *,
        top_k: int,
        router: str,
        bias_E: Tensor | None,
        num_groups: int,
        topk_groups: int,
        group_scores: int,
        normalize: bool | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose top_k experts for each token, in fp32; args and result as `moe.reference.route`."""
        ...

    def experts(
        self,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> Tensor:
        """Sum over k, in k order and in fp32, of weight * down(silu(gate x) * (up x)).

        Args:
            topk_ids_TK: int64; topk_weights_TK: fp32.
            gate_up_E2IH, down_EHI: the experts' slabs in the dtype of x, gate rows first.

        Returns:
            [T, H] in the dtype of x.
        """
        ...

    def ngram_rows(
        self,
        tokens_BT: Tensor,
        *,
        multipliers: Sequence[int],
        orders: Sequence[int],
        primes: Sequence[Sequence[int]],
        offsets: Sequence[Sequence[int]],
        pad: int,
        history_BL: Tensor | None,
        document_starts_BT: Tensor | None,
    ) -> Tensor:
        """Table rows int64 [B, T, N] of every token's n-grams; args as `dse.reference.ngram_hash`."""
        ...

    def memory_fusion(
        self,
        h_RH: Tensor,
        key_value_RH: Tensor,
        fusion: Fusion,
        shape: tuple[int, int],
        starts_BT: Tensor | None,
    ) -> Tensor:
        """SiLU(conv(norm(gate * value))) + gate * value of whole sequences (arXiv 2601.07372 eq. 4 and 5).

        Args:
            h_RH: hidden states before the layer.
            key_value_RH: [R, 2 * H], keys, then values.
            shape: (B, T) with B * T = R.
            starts_BT: bool, documents' first tokens, which the convolution does not reach before; None: it does.
        """
        ...

    def memory_gate(self, h_RH: Tensor, key_RH: Tensor, value_RH: Tensor, fusion: Fusion) -> Tensor:
        """gate * value of any rows (eq. 4), in the dtype of the value."""
        ...

    def memory_conv(
        self, x_BTH: Tensor, fusion: Fusion, starts_BT: Tensor | None, history_BLH: Tensor | None
    ) -> Tensor:
        """The convolution of a chunk after its history (None at a start), before SiLU (eq. 5)."""
        ...

    def logits(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """hidden @ weight.T; a row's bits do not depend on the other rows where no gradient is wanted."""
        ...

    def expert_counts(self, topk_ids_TK: Tensor, num_experts: int) -> Tensor:
        """Tokens of each expert, int64 [E]."""
        ...

    def head_loss(
        self, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, weights_R: Tensor | None = None
    ) -> Tensor:
        """Sum of the targets' cross-entropies, each times its weight; softmax and sum in fp32.

        Args:
            targets_R: int64; -1 is ignored.
            weights_R: fp32; None means ones.

        Returns:
            fp32 scalar.
        """
        ...

    def squared_norms(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Sums of the squares of every tensor's rows, one after another: fp32 on the device; no gradient.

        Args:
            tensors: contiguous.
            rows: into how many equal rows each is cut; 1 for the whole.
        """
        ...

    def adamw_step(
        self,
        master: Tensor,
        first: Tensor,
        second: Tensor,
        gradient: Tensor,
        *,
        copy: Tensor | None,
        scale: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """Update weights and moments in place, in fp32 (arXiv 1711.05101).

        Args:
            master: fp32, contiguous; the other tensors have its number of elements.
            first, second: moments, fp32 or bf16, zeros before the first step.
            gradient: fp32 or bf16.
            copy: overwritten with the new weights; None keeps none.
            scale: fp32 scalar that the gradient is multiplied with.
            step: of this update, from 1 on.
        """
        ...

    def sigmoid(self, x: Tensor) -> Tensor:
        """1 / (1 + exp(-x)), fp32."""
        ...

    def expert_rows(
        self,
        x_UH: Tensor,
        rows_R: Tensor,
        asked: Sequence[tuple[int, int]],
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> Tensor:
        """Outputs [R, H] of single experts, unweighted, fp32; no gradient.

        Args:
            x_UH: inputs.
            rows_R: int64, the input of each row, sorted by expert.
            asked: of each expert, its row of the slabs and how many rows it has here.
            gate_up_E2IH, down_EHI: slabs, gate rows first.
        """
        ...


REFERENCE: Ops = PagedPlainOps()


def ops_for(kernels: Kernels, device: torch.device) -> Ops:
    """The operations that a run uses on a device.

    Args:
        kernels: "reference", "triton", or "auto": Triton on CUDA of compute capability 9 or more, on a CPU compiled
            loops where there are any.
        device: of the model.

    Raises:
        ConfigError: "triton" on a device that cannot run it.
    """
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if kernels == "auto" and device.type == "cpu":
        from sparseray.kernels.compiled_ops import COMPILED

        return COMPILED
    if kernels == "reference" or (kernels == "auto" and capability < 9):
        return REFERENCE
    from sparseray.kernels.takes import is_interpreted
    from sparseray.kernels.triton_ops import TRITON

    if kernels == "triton" and not (capability >= 9 or (device.type == "cpu" and is_interpreted())):
        raise ConfigError(
            f"kernels=triton needs an NVIDIA GPU of compute capability 9 or more, not {device}"
            f" (capability {capability}); use kernels=auto or kernels=reference, or for tests on a CPU set"
            " TRITON_INTERPRET=1 before Python starts"
        )
    return TRITON
