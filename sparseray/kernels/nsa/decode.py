"""`nsa_decode`: one to eight query tokens per sequence against paged NSA caches.

The three branches have their own pages and block tables: compressed tokens (one every `stride` positions),
selection keys (all positions) and window keys (pages wholly before the window may be freed and their table
entries left stale). A `DecodeWorkspace` holds everything a step writes, so a step allocates nothing, reads no
length on the host and can be captured in a CUDA graph. Source: arXiv 2502.11089 section 3 and table 4.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.decode_kernels import decode_kernel
from sparseray.kernels.nsa.range_forward import LOG2E
from sparseray.kernels.nsa.tiles import next_power_of_2, precision, split_width
from sparseray.kernels.nsa.tuning import LAUNCH
from sparseray.kernels.settings import NSASizes


def blocks_per_tile(select_block: int, stride: int) -> int:
    """Selection blocks whose compressed tokens make a tile of the compressed branch."""
    return max(1, LAUNCH["decode"]["keys"] // next_power_of_2(select_block // stride))


def blocks_in_window(window: int, select_block: int) -> int:
    """The most selection blocks that a window reaches into."""
    return (window + select_block - 2) // select_block + 1


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """How many tasks of each kind a row (one key/value head of one sequence) has.

    Attributes:
        compressed: parts of the compressed branch, for all query tokens of the row together.
        window, scores, selected, merges: of one query token: parts of the window, of the scores, of the selected
            blocks, and of the heads to be merged.
        pieces: pieces of the scores, of `piece` blocks, of which each keeps its best; a task scores `scored` of them.
    """

    compressed: int
    window: int
    scores: int
    selected: int
    merges: int
    pieces: int
    piece: int
    scored: int

    @classmethod
    def of(
        cls, rows: int, query_len: int, group: int, *, blocks: int, tile: int, window_blocks: int, num_selected: int
    ) -> "Tasks":  # fmt: skip
        """Tasks of `rows` rows of `group` query heads, about as many of each kind as measured best.

        Args:
            blocks, window_blocks: selection blocks of the longest context, and that a window reaches into.
            tile: selection blocks of a tile of the compressed branch.
        """
        launch, queries = LAUNCH["decode"], rows * query_len
        # If possible so large that the best of all pieces can be compared all with all.
        piece = next_power_of_2(triton.cdiv(blocks * num_selected, launch["best"]))
        piece = max(tile, min(256, max(launch["piece"], piece)))
        pieces = triton.cdiv(blocks, piece)
        scored = min(launch["scored"], max(1, pieces * queries // launch["scores"]))
        compressed = min(triton.cdiv(blocks, tile), launch["splits"], max(3, launch["compressed"] // rows))
        in_window = min(window_blocks, max(1, launch["window"] // queries))
        selected = min(num_selected, max(2, launch["selected"] // queries))
        # A merge holds the parts of all its heads in registers.
        most = max(1, 128 // next_power_of_2(compressed + in_window + selected))
        heads = gcd(group, min(most, max(1, queries * group // launch["merges"])))
        return cls(
            compressed=compressed, window=in_window, scores=triton.cdiv(pieces, scored), selected=selected,
            merges=group // heads, pieces=pieces, piece=piece, scored=scored,
        )  # fmt: skip

    def programs(self, rows: int, query_len: int) -> int:
        return rows * (
            self.compressed + query_len * (self.window + self.scores + self.selected + self.merges)
        )


@dataclass(frozen=True, kw_only=True)
class DecodeWorkspace:
    """Buffers of a decode step for a fixed batch, number of query tokens and longest context.

    Attributes:
        fold: fp32 [B * Lq, H, tiles, G, blocks of a tile], probabilities of a tile's compressed tokens added up by
            eq. 9, against the tile's largest logit; over: fp32 [B * Lq, H, tiles, G], what goes to the next tile.
        tops: fp32 [B * Lq, H, tiles, G], that logit, base 2.
        best: int64 [B * Lq, H, pieces, n], the best blocks of every piece of the scores.
        state: int64 [B * H, 2 + 2 * Lq], how many tasks of a row have ended (`decode_kernels`); only grows.
        part_max, part_sum: fp32 [B * Lq * HQ, parts]; part_out: fp32 [B * Lq * HQ, parts, Dv].
        tasks: the tasks of a row.
    """

    fold: Tensor
    over: Tensor
    tops: Tensor
    best: Tensor
    state: Tensor
    part_max: Tensor
    part_sum: Tensor
    part_out: Tensor
    tasks: Tasks

    @classmethod
    def create(
        cls, batch: int, query_len: int, heads: int, num_kv: int, value_dim: int, max_context: int, sizes: NSASizes, *,
        device: torch.device | str,
    ) -> "DecodeWorkspace":  # fmt: skip
        """Buffers for `batch` sequences of at most `max_context` tokens."""
        select_block, num_selected = sizes.select_block, sizes.num_selected
        blocks, bj = -(-max_context // select_block), blocks_per_tile(select_block, sizes.stride)
        tiles, queries = -(-blocks // bj), batch * query_len
        tasks = Tasks.of(
            batch * num_kv, query_len, heads // num_kv, blocks=blocks, tile=bj,
            window_blocks=blocks_in_window(sizes.window, select_block), num_selected=num_selected,
        )  # fmt: skip
        rows, parts = queries * heads, tasks.compressed + tasks.selected + tasks.window

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(
            fold=fp32(queries, num_kv, tiles, heads // num_kv, bj),
            over=fp32(queries, num_kv, tiles, heads // num_kv),
            tops=fp32(queries, num_kv, tiles, heads // num_kv),
            best=torch.empty(
                queries, num_kv, tasks.pieces, min(num_selected, tasks.piece),
                dtype=torch.int64, device=device,
            ),
            state=torch.zeros(batch * num_kv, 2 + 2 * query_len, dtype=torch.int64, device=device),
            part_max=fp32(rows, parts), part_sum=fp32(rows, parts), part_out=fp32(rows, parts, value_dim),
            tasks=tasks,
        )  # fmt: skip

    def most_pages(self, page: int, per_block: int) -> int:
        """Pages that a part of the compressed branch reads at most.

        Args:
            page: compressed tokens of a page.
            per_block: compressed tokens of a selection block.
        """
        tiles = triton.cdiv(self.tops.shape[2], self.tasks.compressed)
        return tiles * triton.cdiv(self.fold.shape[-1] * per_block, page)


def nsa_decode(
    q: Tensor,
    gates: Tensor,
    cmp_cache: tuple[Tensor, Tensor],
    slc_cache: tuple[Tensor, Tensor],
    win_cache: tuple[Tensor, Tensor],
    cmp_table: Tensor,
    slc_table: Tensor,
    win_table: Tensor,
    context_lens: Tensor,
    workspace: DecodeWorkspace,
    out: Tensor,
    sizes: NSASizes,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend from the last Lq tokens of every sequence to its caches.

    Args:
        q: [B, Lq, HQ, D], Lq from 1 to 8, contiguous; gates: [B, Lq, HQ, 3].
        cmp_cache, slc_cache, win_cache: keys [pages, page size, H, D] and values [pages, page size, H, Dv]; the
            keys and values of the Lq tokens, and the compressed tokens they complete, are already in them.
        cmp_table, slc_table, win_table: int32 [B, pages of a sequence], page of every page-sized piece.
        context_lens: int32 [B], tokens of every sequence, the Lq new ones included, at least Lq.
        workspace: buffers for this batch, of one step at a time; its size bounds the context.
        out: [B, Lq, HQ, Dv], written and returned.

    Raises:
        ConfigError: Lq outside 1 to 8.
    """
    select_block, num_selected = sizes.select_block, sizes.num_selected
    (batch, query_len, heads, width), (num_kv, value_dim) = q.shape, slc_cache[1].shape[2:]
    if not 1 <= query_len <= 8:
        raise ConfigError(f"nsa: decode takes 1 to 8 query tokens a sequence, got q {tuple(q.shape)}")
    w, plan, group, rows = workspace, workspace.tasks, heads // num_kv, batch * num_kv
    gp, parts = next_power_of_2(group), workspace.part_max.shape[1]
    selected_per = triton.cdiv(num_selected, plan.selected)
    window_per = triton.cdiv(blocks_in_window(sizes.window, select_block), plan.window)
    launch, (d0, d1), kept = LAUNCH["decode"], split_width(width), w.best.shape[2] * w.best.shape[3]
    launch_kernel(
        decode_kernel, (plan.programs(rows, query_len),),
        q, gates, out, context_lens, *cmp_cache, cmp_table, *slc_cache, slc_table, *win_cache, win_table,
        w.fold, w.over, w.tops, w.best, w.part_max, w.part_sum, w.part_out, w.state,
        cmp_table.shape[1], slc_table.shape[1], win_table.shape[1], rows, w.tops.shape[2], num_selected,
        (width**-0.5 if scale is None else scale) * LOG2E,
        H=num_kv, G=group, GP=gp, LQ=query_len, LP=max(next_power_of_2(query_len), 16 // min(gp, 16)),
        CMP=plan.compressed, WINP=plan.window, SCORES=plan.scores, SLC=plan.selected, MERGES=plan.merges,
        BJ=w.fold.shape[-1], RP=next_power_of_2(select_block // sizes.stride),
        PAGES=next_power_of_2(w.most_pages(cmp_cache[0].shape[1], select_block // sizes.stride)), SP=next_power_of_2(plan.compressed),
        SCORE_PER=plan.scored, PIECE=plan.piece, KEEP=w.best.shape[-1], KEPT=kept, BEST=next_power_of_2(kept),
        PP=next_power_of_2(parts), HP=next_power_of_2(group // plan.merges),
        WIN_PER=window_per, WIN_ITEMS=next_power_of_2(window_per), SLC_PER=selected_per,
        SLC_ITEMS=next_power_of_2(selected_per), LEN=sizes.block, STRIDE=sizes.stride, SELECT=select_block,
        BN=max(16, next_power_of_2(select_block)), WIN=sizes.window, CMP_PAGE=cmp_cache[0].shape[1],
        SLC_PAGE=slc_cache[0].shape[1], WIN_PAGE=win_cache[0].shape[1], INITIAL=sizes.num_initial, LOCAL=sizes.num_local,
        DQ=width, D0=d0, D1=d1, DV=value_dim, DVP=max(16, next_power_of_2(value_dim)), IP=precision(q.dtype),
        SPIN=q.is_cuda, CMP_STAGES=launch["num_stages"], SLC_STAGES=launch["selected_stages"], num_warps=launch["num_warps"],
    )  # fmt: skip
    return out
