"""What attention means here, in the plainest code: dense, slow, differentiable.

Tests and documentation refer to these functions. For query i and key j of one sequence with
lengths seqlen_q and seqlen_k, group_size = num_heads_q / num_heads_kv:

    diagonal(i) = i + seqlen_k - seqlen_q                      (bottom-right aligned)
    visible     = diagonal(i) - window_left <= j <= diagonal(i) + window_right
    score[i, j] = softcap(softmax_scale * q[i] . k[j]) - alibi_slope * |diagonal(i) - j|
    lse[i]      = log sum over visible j of exp(score[i, j])   (-inf: no visible key)
    prob[i, j]  = exp(score[i, j] - lse[i])                    (0: not visible)
    out[i]      = sum over j of dropout(prob[i, j]) * v[j]

with softcap(x) = softcap * tanh(x / softcap), causal = no key right of the diagonal, and head h of
q reading head h // group_size of k and v. What lies past a length is never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._philox import keep_threshold


class AttentionResult(NamedTuple):
    """Results of attention.

    Attributes:
        out: [batch, seqlen_q, num_heads_q, head_dim_v].
        lse: [batch, num_heads_q, seqlen_q], natural logarithm.
        probs: [batch, num_heads_q, seqlen_q, seqlen_k], before dropout.
    """

    out: Tensor
    lse: Tensor
    probs: Tensor


class CacheResult(NamedTuple):
    """Results of attention with a cache.

    Attributes:
        out: like q, with head_dim_v.
        lse: [batch, num_heads_q, seqlen_q], packed queries [num_heads_q, total_q].
        k_cache: the cache after the append.
        v_cache: the cache after the append.
    """

    out: Tensor
    lse: Tensor
    k_cache: Tensor
    v_cache: Tensor


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    window: tuple[int, int],
    lengths: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each query sees.

    Args:
        seqlen_q: rows of the result.
        seqlen_k: columns of the result.
        window: (left, right) keys around the diagonal, negative = unbounded.
        lengths: queries and keys that exist; default all.
        device: of the result.

    Returns:
        Boolean [seqlen_q, seqlen_k].
    """
    used_q, used_k = lengths if lengths is not None else (seqlen_q, seqlen_k)
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)[None, :]
    diagonal = i + used_k - used_q
    visible = (i < used_q) & (j < used_k)
    left, right = window
    if left >= 0:
        visible = visible & (j >= diagonal - left)
    if right >= 0:
        visible = visible & (j <= diagonal + right)
    return visible


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seqlens_q: Sequence[int] | None = None,
    seqlens_k: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    upcast: bool = True,
    reorder: bool = False,
) -> AttentionResult:
    """Attention of a batch; the meaning of `flash_attn_func`.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim], floating point.
        k: [batch, seqlen_k, num_heads_kv, head_dim].
        v: [batch, seqlen_k, num_heads_kv, head_dim_v].
        softmax_scale: default head_dim ** -0.5.
        causal: no key right of the diagonal.
        window_size: (left, right) keys around the diagonal, negative = unbounded.
        softcap: 0.0 = off.
        alibi_slopes: [num_heads_q] or [batch, num_heads_q].
        seqlens_q: queries that exist in each sequence; default all. Other rows: out 0, lse -inf.
        seqlens_k: keys that exist in each sequence; default all.
        dropout_p: probability that made `dropout_mask`; its quantised inverse scales what is kept.
        dropout_mask: boolean [batch, num_heads_q, seqlen_q, seqlen_k], True = kept.
        upcast: compute in fp64 and return fp64. False: every step in q's dtype, which is what a
            plain PyTorch implementation does.
        reorder: multiply k instead of q by the scale: as good a plain implementation as the other.

    Returns:
        out, lse and probabilities.
    """
    batch_size, seqlen_q, num_heads_q, head_dim = q.shape
    seqlen_k, num_heads_kv = k.shape[1], k.shape[2]
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5
    window = (window_size[0], 0 if causal else window_size[1])
    lengths = [
        (
            seqlen_q if seqlens_q is None else seqlens_q[batch],
            seqlen_k if seqlens_k is None else seqlens_k[batch],
        )
        for batch in range(batch_size)
    ]
    if upcast:
        q, k, v = q.double(), k.double(), v.double()
    # What does not exist may be NaN, and 0 * NaN is NaN: it is replaced by 0 first.
    q, k, v = (
        torch.stack([_keep_first(x[batch], lengths[batch][side]) for batch in range(batch_size)])
        if batch_size > 0
        else x
        for x, side in ((q, 0), (k, 1), (v, 1))
    )
    group_size = num_heads_q // num_heads_kv
    k, v = k.repeat_interleave(group_size, dim=2), v.repeat_interleave(group_size, dim=2)

    if reorder:
        scores = torch.einsum("bihd,bjhd->bhij", q, k * softmax_scale)
    else:
        scores = torch.einsum("bihd,bjhd->bhij", q * softmax_scale, k)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).expand(batch_size, num_heads_q)
        i = torch.arange(seqlen_q, device=q.device)[:, None]
        j = torch.arange(seqlen_k, device=q.device)[None, :]
        shift = torch.tensor([used_k - used_q for used_q, used_k in lengths], device=q.device)
        distance = (i + shift.view(-1, 1, 1) - j).abs()
        scores = scores - slopes[:, :, None, None] * distance[:, None]

    visible = q.new_zeros((batch_size, 1, seqlen_q, seqlen_k), dtype=torch.bool)
    for batch in range(batch_size):
        visible[batch, 0] = visible_keys(seqlen_q, seqlen_k, window, lengths[batch], q.device)
    sees_a_key = visible.any(-1, keepdim=True)
    # A row without a key gets arbitrary scores, so that softmax stays finite, and is cleared below.
    scores = scores.masked_fill(~visible & sees_a_key, -torch.inf)
    probs = torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(~sees_a_key[..., 0], -torch.inf)

    dropped = probs
    if dropout_mask is not None:
        dropped = probs.masked_fill(~dropout_mask, 0.0) * (256 / keep_threshold(dropout_p))
    out = torch.einsum("bhij,bjhd->bihd", dropped, v)
    return AttentionResult(out, lse, probs)


def _keep_first(x: Tensor, length: int) -> Tensor:
    """X with everything from row `length` on replaced by 0."""
    exists = torch.arange(x.shape[0], device=x.device) < length
    return torch.where(exists[:, None, None], x, torch.zeros_like(x))


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    *,
    seqused_q: Sequence[int] | None = None,
    seqused_k: Sequence[int] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    upcast: bool = True,
    reorder: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences, one after the other; the meaning of `flash_attn_varlen_func`.

    Args:
        q: [total_q, num_heads_q, head_dim].
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: first row of each sequence, and the end of the last one.
        cu_seqlens_k: the same for k and v.
        seqused_q: rows of each sequence that exist; default all.
        seqused_k: the same for k and v.
        alibi_slopes: [num_heads_q] or [batch, num_heads_q].
        dropout_p: as in `attention_reference`.
        dropout_mask: boolean [batch, num_heads_q, max_seqlen_q, max_seqlen_k], True = kept.
        softmax_scale: as in `attention_reference`, and so are the others.
        causal: see there.
        window_size: see there.
        softcap: see there.
        upcast: see there.
        reorder: see there.

    Returns:
        out [total_q, num_heads_q, head_dim_v] and lse [num_heads_q, total_q]; rows of no sequence
        are 0 and -inf.
    """
    dtype = torch.float64 if upcast else q.dtype
    out_rows = [q.new_zeros((1, q.shape[1], v.shape[2]), dtype=dtype)] * len(q)
    lse_rows = [q.new_full((q.shape[1], 1), -torch.inf, dtype=dtype)] * len(q)
    for batch in range(len(cu_seqlens_q) - 1):
        begin_q, begin_k = cu_seqlens_q[batch], cu_seqlens_k[batch]
        seqlen_q, seqlen_k = cu_seqlens_q[batch + 1] - begin_q, cu_seqlens_k[batch + 1] - begin_k
        if seqused_q is not None:
            seqlen_q = seqused_q[batch]
        if seqused_k is not None:
            seqlen_k = seqused_k[batch]
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[batch]
        mask = dropout_mask
        if mask is not None:
            mask = mask[batch : batch + 1, :, :seqlen_q, :seqlen_k]
        one = attention_reference(
            q[None, begin_q : begin_q + seqlen_q],
            k[None, begin_k : begin_k + seqlen_k],
            v[None, begin_k : begin_k + seqlen_k],
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=slopes,
            dropout_p=dropout_p,
            dropout_mask=mask,
            upcast=upcast,
            reorder=reorder,
        )
        for row in range(seqlen_q):
            out_rows[begin_q + row] = one.out[0, row : row + 1]
            lse_rows[begin_q + row] = one.lse[0, :, row : row + 1]
    if not out_rows:
        return q.new_zeros((0, q.shape[1], v.shape[2]), dtype=dtype), q.new_zeros(
            (q.shape[1], 0), dtype=dtype
        )
    return torch.cat(out_rows), torch.cat(lse_rows, dim=1)


def rotary_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotary position embedding of the first rotary_dim elements of each head.

    Pair i at position p, read as a complex number, is multiplied by cos[p, i] + sin[p, i] * 1j.

    Args:
        x: [..., num_heads, head_dim].
        cos: [num_positions, rotary_dim / 2].
        sin: the same shape.
        positions: integer, x's shape without the last two dimensions; outside the table: no turn.
        interleaved: pairs (2 i, 2 i + 1); else (i, i + rotary_dim / 2).
        conjugate: turn backwards.

    Returns:
        fp64, shape of x.
    """
    num_positions, half = cos.shape
    turn = torch.complex(cos.double(), sin.double())
    turn = torch.cat([turn.conj() if conjugate else turn, turn.new_ones(1, half)])
    inside = (positions >= 0) & (positions < num_positions)
    row = torch.where(inside, positions, num_positions)  # the last one turns by nothing

    x = x.double()
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    shape = (half, 2) if interleaved else (2, half)
    pairs = rotated.reshape(*x.shape[:-1], *shape)
    if not interleaved:
        pairs = pairs.transpose(-1, -2)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn[row].unsqueeze(-2))
    if not interleaved:
        pairs = pairs.transpose(-1, -2)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)


def combine_reference(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Merge of attention over disjoint sets of keys.

    Args:
        out_partial: [splits, ..., head_dim_v].
        lse_partial: [splits, ...], -inf: the part saw no key and its out may be anything.

    Returns:
        out and lse in fp64.
    """
    lse_partial = lse_partial.double()
    lse = torch.logsumexp(lse_partial, dim=0)
    out = torch.zeros(out_partial.shape[1:], dtype=torch.float64, device=out_partial.device)
    for part, part_lse in zip(out_partial.double(), lse_partial, strict=True):
        saw_a_key = part_lse > -torch.inf
        weight = torch.where(saw_a_key, torch.exp(part_lse - lse), 0.0)
        out = out + torch.where(saw_a_key[..., None], weight[..., None] * part, 0.0)
    return out, lse


class _Cache:
    """Key or value cache with slots, whatever holds them."""

    def __init__(
        self, data: Tensor, batch_idx: Sequence[int] | None, page_table: Tensor | None
    ) -> None:
        self.data = data.clone()
        self.batch_idx = batch_idx
        self.page_table = page_table
        self.capacity = data.shape[1] * (1 if page_table is None else page_table.shape[1])

    def _at(self, batch: int, slot: int) -> tuple[int, int]:
        row = batch if self.batch_idx is None else self.batch_idx[batch]
        if self.page_table is None:
            return row, slot
        page_size = self.data.shape[1]
        return int(self.page_table[row, slot // page_size]), slot % page_size

    def write(self, batch: int, slot: int, value: Tensor) -> None:
        self.data[self._at(batch, slot)] = value.to(self.data.dtype)

    def read(self, batch: int, slots: range) -> Tensor:
        """[1, len(slots), heads, dim]."""
        rows = [self.data[self._at(batch, slot)] for slot in slots]
        if not rows:
            return self.data.new_zeros((1, 0, *self.data.shape[2:]))
        return torch.stack(rows)[None]


def kvcache_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Sequence[int] | None = None,
    cache_batch_idx: Sequence[int] | None = None,
    cache_leftpad: Sequence[int] | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k_new: Sequence[int] | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Sequence[int] | None = None,
    rotary_interleaved: bool = True,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    upcast: bool = True,
) -> CacheResult:
    """Append, rotate, attend, sequence by sequence; the meaning of `flash_attn_with_kvcache`.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim], or [total_q, ...] with cu_seqlens_q.
        k_cache: [caches, slots, num_heads_kv, head_dim]; with page_table [pages, page_size, ...].
        v_cache: the same with head_dim_v.
        k: new keys [batch, seqlen_new, num_heads_kv, head_dim], or [total_new, ...].
        v: new values.
        cache_seqlens: slots in use before the append; default the whole cache.
        cache_batch_idx: row of the cache (or page table) of each sequence.
        cache_leftpad: slots in front of the first key of each sequence.
        page_table: [rows, max_pages]: slot s is in page page_table[row, s // page_size].
        cu_seqlens_q: first row of each sequence in q, and the end of the last one.
        cu_seqlens_k_new: the same for k and v.
        rotary_cos: [positions, rotary_dim / 2]; new key n stands at position base + n with
            base = rotary_seqlens or cache_seqlens, query i at base + i if causal or in a window,
            else at base.
        rotary_sin: the same shape.
        rotary_seqlens: replaces cache_seqlens as the base.
        rotary_interleaved: see `rotary_reference`.
        softmax_scale: as in `attention_reference`, and so are the others.
        causal: see there.
        window_size: see there.
        softcap: see there.
        alibi_slopes: see there.
        upcast: see there.

    Returns:
        out, lse and both caches after the append.
    """
    keys = _Cache(k_cache, cache_batch_idx, page_table)
    values = _Cache(v_cache, cache_batch_idx, page_table)
    batch_size = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    in_order = causal or max(window_size) >= 0

    def sequence(x: Tensor, cu_seqlens: Sequence[int] | None, batch: int) -> Tensor:
        return x[batch] if cu_seqlens is None else x[cu_seqlens[batch] : cu_seqlens[batch + 1]]

    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        if rotary_cos is None or rotary_sin is None:
            return x
        turned = rotary_reference(
            x, rotary_cos, rotary_sin, positions, interleaved=rotary_interleaved
        )
        return turned.to(x.dtype)

    outs, lses = [], []
    for batch in range(batch_size):
        length = keys.capacity if cache_seqlens is None else cache_seqlens[batch]
        base = length if rotary_seqlens is None else rotary_seqlens[batch]
        if k is not None and v is not None:
            new_keys = sequence(k, cu_seqlens_k_new, batch)
            new_values = sequence(v, cu_seqlens_k_new, batch)
            order = torch.arange(len(new_keys), device=q.device)
            new_keys = rotated(new_keys, base + order)
            for n in range(len(new_keys)):
                keys.write(batch, length + n, new_keys[n])
                values.write(batch, length + n, new_values[n])
            length += len(new_keys)
        queries = sequence(q, cu_seqlens_q, batch)
        if k is not None:
            order = torch.arange(len(queries), device=q.device)
            queries = rotated(queries, base + order * in_order)
        slots = range(0 if cache_leftpad is None else cache_leftpad[batch], length)
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[batch]
        result = attention_reference(
            queries[None],
            keys.read(batch, slots),
            values.read(batch, slots),
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=slopes,
            upcast=upcast,
        )
        outs.append(result.out[0])
        lses.append(result.lse[0])
    if cu_seqlens_q is None:
        return CacheResult(torch.stack(outs), torch.stack(lses), keys.data, values.data)
    return CacheResult(torch.cat(outs), torch.cat(lses, dim=1), keys.data, values.data)
