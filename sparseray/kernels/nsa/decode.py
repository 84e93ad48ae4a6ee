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

MOST_VALUES = 4096
"""Of a tile of keys that a program has in registers (`decode_single`)."""


def is_single(query_len: int, group: int, width: int, select_block: int) -> bool:
    """Whether a program computes one query without the tensor cores.

    Args:
        query_len, group: query tokens, and query heads of a key/value head.
        width: channels of values.
        select_block: tokens.
    """
    return query_len * group == 1 and next_power_of_2(select_block) * next_power_of_2(width) <= MOST_VALUES


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
        tiles, tile: tiles of the compressed branch, and their blocks.
        kind: name of the launch parameters.
    """

    kind: str
    compressed: int
    window: int
    scores: int
    selected: int
    merges: int
    pieces: int
    piece: int
    scored: int
    tiles: int
    tile: int

    @classmethod
    def of(
        cls, rows: int, query_len: int, group: int, *, kind: str, max_context: int, sizes: NSASizes, width: int
    ) -> "Tasks":  # fmt: skip
        """Tasks of `rows` rows of `group` query heads, about as many of each kind as measured best.

        Args:
            kind: name of the launch parameters.
            max_context: tokens of the longest context.
            width: channels of values.
        """
        launch, queries, num_selected = LAUNCH[kind], rows * query_len, sizes.num_selected
        blocks, window_blocks = (
            triton.cdiv(max_context, sizes.select_block),
            blocks_in_window(sizes.window, sizes.select_block),
        )
        keys = min(launch["keys"], MOST_VALUES // max(16, next_power_of_2(width)))
        tile = max(1, keys // next_power_of_2(sizes.select_block // sizes.stride))
        # If possible so large that the best of all pieces can be compared all with all.
        piece = next_power_of_2(triton.cdiv(blocks * num_selected, launch["best"]))
        piece = max(tile, min(256, max(launch["piece"], piece)))
        pieces = triton.cdiv(blocks, piece)
        scored = min(launch["scored"], max(1, pieces * queries // launch["scores"]))
        tiles = triton.cdiv(blocks, tile)
        compressed = min(tiles, launch["splits"], max(launch["fewest"], launch["compressed"] // rows))
        in_window = min(window_blocks, max(1, launch["window"] // queries))
        selected = min(num_selected, max(2, launch["selected"] // queries))
        # A merge holds the parts of all its heads in registers.
        most = max(1, 128 // next_power_of_2(compressed + in_window + selected))
        heads = gcd(group, min(most, max(1, queries * group // launch["merges"])))
        return cls(
            compressed=compressed, window=in_window, scores=triton.cdiv(pieces, scored), selected=selected,
            merges=group // heads, pieces=pieces, piece=piece, scored=scored, tiles=tiles, tile=tile, kind=kind,
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
            eq. 9, against the tile's largest logit; of a single query all logits, base 2, a power of two for each block.
        over: fp32 [B * Lq, H, tiles, G], what goes to the next tile; tops: likewise, the tile's largest logit.
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
        group, queries = heads // num_kv, batch * query_len
        single = is_single(query_len, group, value_dim, sizes.select_block)
        tasks = Tasks.of(
            batch * num_kv, query_len, group, kind="decode_single" if single else "decode", max_context=max_context,
            sizes=sizes, width=value_dim,
        )  # fmt: skip
        rows, parts = queries * heads, tasks.compressed + tasks.selected + tasks.window
        kept = tasks.tile * (next_power_of_2(sizes.select_block // sizes.stride) if single else 1)

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(
            fold=fp32(queries, num_kv, tasks.tiles, group, kept),
            over=fp32(queries, num_kv, tasks.tiles, group), tops=fp32(queries, num_kv, tasks.tiles, group),
            best=torch.empty(
                queries, num_kv, tasks.pieces, min(sizes.num_selected, tasks.piece), dtype=torch.int64, device=device
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
        tiles = triton.cdiv(self.tasks.tiles, self.tasks.compressed)
        return tiles * triton.cdiv(self.tasks.tile * per_block, page)


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
    launch, (d0, d1), kept = LAUNCH[plan.kind], split_width(width), w.best.shape[2] * w.best.shape[3]
    launch_kernel(
        decode_kernel, (plan.programs(rows, query_len),),
        q, gates, out, context_lens, *cmp_cache, cmp_table, *slc_cache, slc_table, *win_cache, win_table,
        w.fold, w.over, w.tops, w.best, w.part_max, w.part_sum, w.part_out, w.state,
        cmp_table.shape[1], slc_table.shape[1], win_table.shape[1], rows, plan.tiles, num_selected,
        (width**-0.5 if scale is None else scale) * LOG2E,
        H=num_kv, G=group, GP=gp, LQ=query_len, LP=max(next_power_of_2(query_len), 16 // min(gp, 16)),
        CMP=plan.compressed, WINP=plan.window, SCORES=plan.scores, SLC=plan.selected, MERGES=plan.merges,
        BJ=plan.tile, RP=next_power_of_2(select_block // sizes.stride),
        PAGES=next_power_of_2(w.most_pages(cmp_cache[0].shape[1], select_block // sizes.stride)), SP=next_power_of_2(plan.compressed),
        SCORE_PER=plan.scored, PIECE=plan.piece, KEEP=w.best.shape[-1], KEPT=kept, BEST=next_power_of_2(kept),
        PP=next_power_of_2(parts), HP=next_power_of_2(group // plan.merges),
        WIN_PER=window_per, WIN_ITEMS=next_power_of_2(window_per), SLC_PER=selected_per,
        SLC_ITEMS=next_power_of_2(selected_per), LEN=sizes.block, STRIDE=sizes.stride, SELECT=select_block,
        BN=max(16, next_power_of_2(select_block)), WIN=sizes.window, CMP_PAGE=cmp_cache[0].shape[1],
        SLC_PAGE=slc_cache[0].shape[1], WIN_PAGE=win_cache[0].shape[1], INITIAL=sizes.num_initial, LOCAL=sizes.num_local,
        DQ=width, D0=d0, D1=d1, DP=max(16, next_power_of_2(width)), DV=value_dim, DVP=max(16, next_power_of_2(value_dim)), IP=precision(q.dtype),
        SINGLE=plan.kind == "decode_single", SPIN=q.is_cuda, CMP_STAGES=launch["num_stages"], SLC_STAGES=launch["selected_stages"], num_warps=launch["num_warps"],
    )  # fmt: skip
    return out
