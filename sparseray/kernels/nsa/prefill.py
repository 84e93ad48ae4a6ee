"""`nsa_prefill`: a chunk of queries of every sequence against paged NSA caches, any chunk length.

The queries of all sequences are packed, so chunks of different lengths share a call; the keys are read from
the pages by the forward kernels of `nsa_attention`. Lengths stay on the device: shapes alone decide the
launches, so a call makes no host synchronisation. Where `nsa_decode` serves one to eight tokens, this serves
the rest. Source: arXiv 2502.11089 section 3.
"""

import torch
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.nsa.branches import Blocks, forward_branches, window_branch
from sparseray.kernels.nsa.geometry import Geometry, paged
from sparseray.kernels.settings import NSASizes


def prefill_geometry(
    cu_seqlens: Tensor, context_lens: Tensor, tables: tuple[Tensor, Tensor, Tensor], *, tokens: int, page: int,
    sizes: NSASizes,
) -> Geometry:  # fmt: skip
    """What `nsa_prefill` makes of the lengths in some sixty small launches: the layers of a step can share it.

    Args:
        cu_seqlens, context_lens: as in `nsa_prefill`.
        tables: cmp_table, slc_table and win_table.
        tokens: of all chunks together.
        page: tokens of a page of the selection branch.
    """
    widths = (tables[0].shape[1], tables[1].shape[1], tables[2].shape[1])
    return paged(cu_seqlens, context_lens, tokens, widths[1] * page, widths, sizes.block, sizes.stride)


def nsa_prefill(
    q: Tensor,
    gates: Tensor,
    cmp_cache: tuple[Tensor, Tensor],
    slc_cache: tuple[Tensor, Tensor],
    win_cache: tuple[Tensor, Tensor],
    cmp_table: Tensor,
    slc_table: Tensor,
    win_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    sizes: NSASizes,
    *,
    scale: float | None = None,
    geometry: Geometry | None = None,
) -> Tensor:
    """Attend from the last tokens of every sequence, a chunk of any length, to its caches.

    Args:
        q: [T, HQ, D], the chunks of all sequences one after the other; gates: [T, HQ, 3].
        cmp_cache, slc_cache, win_cache: keys [pages, page size, H, D] and values [pages, page size, H, Dv],
            contiguous; the chunks' own tokens, and the compressed tokens they complete, are already in them
            (`compress_step` with query_len at least the longest chunk writes those).
        cmp_table, slc_table, win_table: int32 [B, pages of a sequence], page of every page-sized piece. Pages
            of the window branch wholly before the window of the first query may be gone.
        cu_seqlens: int [B + 1], boundaries of the chunks in q; a chunk may be empty.
        context_lens: int [B], tokens of every sequence, its chunk included.
        geometry: what `prefill_geometry` made of the same lengths and tables; made here without it.

    Returns:
        [T, HQ, Dv] in the dtype of q.

    Raises:
        ConfigError: heads that do not fit together.
    """
    blocks = Blocks.of(sizes, scale, q.shape[-1])
    heads, num_kv = q.shape[1], slc_cache[0].shape[2]
    if heads % num_kv or heads // num_kv > 64 or cu_seqlens.shape[0] != context_lens.shape[0] + 1:
        raise ConfigError(
            f"nsa: prefill got q {tuple(q.shape)}, keys {tuple(slc_cache[0].shape)}, cu_seqlens of"
            f" {cu_seqlens.shape[0]} and context_lens of {context_lens.shape[0]} entries: the query heads must be"
            " 1 to 64 times the key heads, and cu_seqlens must have one entry more than there are sequences"
        )
    tables = (cmp_table.contiguous(), slc_table.contiguous(), win_table.contiguous())
    if geometry is None:
        geometry = prefill_geometry(
            cu_seqlens, context_lens, tables, tokens=q.shape[0], page=slc_cache[0].shape[1], sizes=sizes
        )  # fmt: skip
    with torch.no_grad():
        q, gates = q.contiguous(), gates.contiguous()
        won = window_branch(q, win_cache, slc_cache, geometry, blocks, table=tables[2])
        return forward_branches(
            q, cmp_cache, slc_cache, gates, won, geometry, blocks, keep=False, tables=tables[:2]
        ).sum
