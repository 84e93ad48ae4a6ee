"""Forward pass of the three branches over packed queries, shared by `nsa_attention` and `nsa_prefill`.

The window goes first: it needs no compressed tokens, so the device works while the host launches what makes them.

Here is the only dispatch of the NSA kernels: where no sequence is longer than num_selected selection blocks,
every visible block is selected, whatever the scores. The selected branch then is dense causal attention by
definition; it runs on the tiled kernel of the other branches, and scores, top n and the inverse table of the
backward are left out. The length alone decides, so nothing is read from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseray.kernels.nsa.gates import combine
from sparseray.kernels.nsa.geometry import COMPRESSED, KEYS, WINDOW, Geometry, query_positions
from sparseray.kernels.nsa.inverse import pays_by_block
from sparseray.kernels.nsa.pipeline import Attended, Forced
from sparseray.kernels.nsa.range_forward import LOG2E, in_bulk, range_forward
from sparseray.kernels.nsa.range_pipelined import range_pipelined
from sparseray.kernels.nsa.range_pipelined_dkdv import fits_pipeline
from sparseray.kernels.nsa.selected_by_block import selected_by_block
from sparseray.kernels.nsa.selected_forward import selected_forward
from sparseray.kernels.nsa.top_n import select_blocks
from sparseray.kernels.settings import NSASizes


@dataclass(frozen=True, kw_only=True)
class Blocks(NSASizes):
    """Sizes of one call and the factor of its scores."""

    scale: float

    @classmethod
    def of(cls, sizes: NSASizes, scale: float | None, width: int) -> Blocks:
        """`sizes` with a scale; that of keys of `width` channels by default."""
        return cls(**vars(sizes), scale=width**-0.5 if scale is None else scale)


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Outputs [T, HQ, Dv] and base-2 log-sum-exps [T, HQ], in the order compressed, selected, window.

    Attributes:
        sum: [T, HQ, Dv], the three under their gates.
        index: int32 [T, H, num_selected], blocks of every query; None where all are selected.
    """

    sum: Tensor
    outs: tuple[Tensor, Tensor, Tensor]
    lses: tuple[Tensor, Tensor, Tensor]
    index: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Window:
    """Output [T, HQ, Dv] and base-2 log-sum-exp [T, HQ] of the window, and what the forced blocks gave if they came
    along."""

    out: Tensor
    lse: Tensor
    forced: Attended | None


def selects_all(longest: int, *, select_block: int, num_selected: int) -> bool:
    """Whether the selected branch equals dense causal attention for sequences of at most `longest` tokens."""
    return longest <= select_block * num_selected


def forced_blocks(
    q: Tensor, win: tuple[Tensor, Tensor], slc: tuple[Tensor, Tensor], geometry: Geometry, sizes: Blocks
) -> Forced | None:
    """The blocks that are selected whatever the scores, where the window's kernels can take them along.

    Neighbouring queries share them, so there a tile of keys is read once for all. None where all blocks are selected or
    all of a query's are such, or for keys that are no twins.
    """
    k, v = slc
    is_sparse = not selects_all(
        geometry.max_keys, select_block=sizes.select_block, num_selected=sizes.num_selected
    )
    are_twins = k.shape[1:] == win[0].shape[1:] and v.shape[1:] == win[1].shape[1:]
    has_free = sizes.num_selected > sizes.num_initial + sizes.num_local > sizes.num_initial
    if not (is_sparse and has_free and are_twins and fits_pipeline(q, k, v)):
        return None
    if not (in_bulk(*win) and in_bulk(k, v)):
        return None
    return Forced(
        k=k, v=v, select_block=sizes.select_block, num_initial=sizes.num_initial, num_local=sizes.num_local
    )


def window_branch(
    q: Tensor, win: tuple[Tensor, Tensor], slc: tuple[Tensor, Tensor], geometry: Geometry, sizes: Blocks, *,
    table: Tensor | None = None,
) -> Window:  # fmt: skip
    """The window, and with it the forced blocks of the selected branch where that pays.

    Args:
        q: [T, HQ, D] packed; win, slc: keys and values of the two branches; table: pages of win, None where both are
            packed.
    """
    sliding: dict[str, Any] = {"kind": WINDOW, "block": 1, "stride": 1, "window": sizes.window}
    forced = None if table is not None else forced_blocks(q, win, slc, geometry, sizes)
    if forced is None:
        out, lse = range_forward(q, *win, geometry, **sliding, scale=sizes.scale, table=table)
        return Window(out=out, lse=lse, forced=None)
    out = q.new_empty(*q.shape[:2], win[1].shape[-1])
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    attended = range_pipelined(
        q, *win, out, lse, geometry, **sliding, scale2=sizes.scale * LOG2E, forced=forced
    )
    return Window(out=out, lse=lse, forced=attended)


def forward_branches(
    q: Tensor, cmp: tuple[Tensor, Tensor], slc: tuple[Tensor, Tensor], gates: Tensor, window: Window,
    geometry: Geometry, sizes: Blocks, *, keep: bool, tables: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Branches:  # fmt: skip
    """Run the compressed and the selected branch and add the three up.

    Args:
        q: [T, HQ, D] packed; gates: [T, HQ, 3].
        cmp, slc: keys and values, packed [S, H, D | Dv], or pages [pages, page size, H, D | Dv].
        window: of `window_branch`.
        keep: whether a backward follows; without it the selected branch's own output may be left out.
        tables: pages of every sequence for cmp and slc, None where they are packed.
    """
    b = sizes
    o_cmp, lse_cmp = range_forward(
        q, *cmp, geometry, kind=COMPRESSED, block=b.block, stride=b.stride, window=0, scale=b.scale, table=tables[0]
    )  # fmt: skip
    index = summed = None
    if selects_all(geometry.max_keys, select_block=b.select_block, num_selected=b.num_selected):
        o_slc, lse_slc = range_forward(
            q, *slc, geometry, kind=KEYS, block=1, stride=1, window=0, scale=b.scale, table=tables[1]
        )
    else:
        index = select_blocks(
            q, cmp[0], lse_cmp, geometry, block=b.block, stride=b.stride, select_block=b.select_block,
            num_selected=b.num_selected, num_initial=b.num_initial, num_local=b.num_local, scale=b.scale,
            table=tables[0],
        )  # fmt: skip
        positions = query_positions(geometry)
        rest = (q, *slc, index, positions, geometry, (o_cmp, window.out), gates)
        sizes_of_blocks: dict[str, Any] = {
            "select_block": b.select_block,
            "scale": b.scale,
            "keep": keep,
            "forced": window.forced,
        }
        if tables[1] is None and pays_by_block(q.shape[1] // slc[0].shape[-2]):
            summed, o_slc, lse_slc = selected_by_block(*rest, **sizes_of_blocks)
        else:
            summed, o_slc, lse_slc = selected_forward(*rest, **sizes_of_blocks, table=tables[1])
    outs = (o_cmp, o_slc, window.out)
    summed = combine(*outs, gates) if summed is None else summed
    return Branches(sum=summed, outs=outs, lses=(lse_cmp, lse_slc, window.lse), index=index)
