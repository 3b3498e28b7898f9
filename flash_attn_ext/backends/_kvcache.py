"""Rotary embedding and the append to a KV cache, in PyTorch operations without host reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ._sequences import cache_capacity, cache_indices


def packed_positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Which sequence each packed row belongs to, and its position there.

    Args:
        cu_seqlens: integer [batch + 1].
        total: number of rows.

    Returns:
        Sequence and position, int64 [total]. Rows behind the last sequence get the sequence
        `batch`, which does not exist.
    """
    ends = cu_seqlens.long()
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends[1:], rows, right=True)
    return sequence, rows - ends[sequence]


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    """Rotary embedding of the first 2 * cos.size(1) elements of each head (arXiv:2104.09864).

    Args:
        x: [..., num_heads, head_dim].
        cos: [num_positions, rotary_dim / 2].
        sin: the same shape.
        positions: int64, broadcasts to x's shape without the last two dimensions. A row whose
            position is outside the table is not rotated.
        interleaved: pairs (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2).
        conjugate: rotate backwards.

    Returns:
        A new contiguous tensor like x, computed in fp32 (fp64 for fp64).
    """
    result = x.clone(memory_format=torch.contiguous_format)
    num_positions, half = cos.shape
    if num_positions == 0 or half == 0:
        return result
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inside = ((positions >= 0) & (positions < num_positions))[..., None, None]
    at = positions.clamp(0, num_positions - 1)
    c = torch.where(inside, cos[at].to(dtype).unsqueeze(-2), 1.0)
    s = torch.where(inside, sin[at].to(dtype).unsqueeze(-2), 0.0)
    if conjugate:
        s = -s
    rotary_dim = 2 * half
    if interleaved:
        first, second = result[..., 0:rotary_dim:2], result[..., 1:rotary_dim:2]
    else:
        first, second = result[..., :half], result[..., half:rotary_dim]
    a, b = first.to(dtype), second.to(dtype)
    first_new, second_new = a * c - b * s, b * c + a * s
    first.copy_(first_new)
    second.copy_(second_new)
    return result


def rotary_positions(
    x: Tensor, seqlen_offsets: Tensor | None, cu_seqlens: Tensor | None, same_position: bool
) -> Tensor:
    """Rotary position of each row of x, int64 [batch | 1, seqlen | 1] or [total]."""
    if cu_seqlens is None:
        positions = torch.arange(x.shape[1], device=x.device)[None, :]
        offsets = None if seqlen_offsets is None else seqlen_offsets.long()[:, None]
    else:
        sequence, positions = packed_positions(cu_seqlens, x.shape[0])
        behind = sequence == cu_seqlens.shape[0] - 1
        positions = torch.where(behind, -1, positions)
        offsets = None
        if seqlen_offsets is not None:
            # One more entry for the rows behind the last sequence: they stay outside the table.
            padded = torch.nn.functional.pad(seqlen_offsets.long(), (0, 1))
            offsets = padded[sequence]
    if same_position:
        positions = torch.where(positions < 0, positions, 0)
    return positions if offsets is None else positions + offsets


def append(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    sequence: Tensor,
    slots: Tensor,
    cache_batch_idx: Tensor | None,
    page_table: Tensor | None,
) -> None:
    """Writes rows of new keys and values into their slots; a slot outside the cache is dropped.

    Dropping without reading the mask on the host: a row that has no slot repeats the write of the
    first row that has one; if there is none, element (0, 0) is written with what it holds.

    Args:
        caches: key and value cache.
        new: keys and values [total_new, heads, dim].
        sequence: int64 [total_new], sequence of each row.
        slots: int64 [total_new], slot of each row; -1: none.
        cache_batch_idx: integer [batch], row of the cache or page table.
        page_table: [rows, max_pages], page ids.
    """
    k_cache = caches[0]
    if slots.numel() == 0 or k_cache.shape[0] == 0 or k_cache.shape[1] == 0:
        return
    rows = sequence if cache_batch_idx is None else cache_batch_idx.long()[sequence]
    first, second = cache_indices(slots[:, None], rows, page_table, k_cache.shape[1])
    first, second = first[:, 0], second[:, 0]
    inside = (slots >= 0) & (slots < cache_capacity(k_cache, page_table))
    inside &= (first >= 0) & (first < k_cache.shape[0])

    source = torch.where(
        inside, torch.arange(len(slots), device=slots.device), inside.int().argmax()
    )
    any_inside = inside.any()
    first = torch.where(any_inside, first[source], 0)
    second = torch.where(any_inside, second[source], 0)
    for cache, values in zip(caches, new, strict=True):
        cache.index_put_(
            (first, second), torch.where(any_inside, values[source], cache[first, second])
        )
