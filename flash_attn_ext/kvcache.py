"""Attention against a key/value cache, and the functions that belong to decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _cache_checks, _checks, _schema
from .attention import AttentionResult, WindowSize
from .autograd import without_gradient
from .backends import raise_refusal_behind
from .merge import apply_sink

_kvcache_fwd = _schema.op("kvcache_fwd")
_kvcache_append_fwd = _schema.op("kvcache_append_fwd")
_combine = _schema.op("combine")
_combine_out = _schema.op("combine_out")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    attention_chunk: int = 0,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> AttentionResult:
    """Attention of new queries to a cache, after appending new keys and values to it in place.

    One call does the work of one decoding step: rotate q and k, write k and v at ``cache_seqlens``,
    attend to what is in the cache then. Causal masks and windows are aligned to the bottom right,
    as drawn in flash_attn_func, with the length after the append. ``cache_seqlens`` itself is not
    changed: add the number of appended keys before the next call.

    The cache is a tensor of one row for each sequence, or pages that ``page_table`` assigns to
    sequences. There is no backward.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim]; with cu_seqlens_q [total_q, ...].
        k_cache: [batch_cache, seqlen_cache, num_heads_kv, head_dim]; with page_table
            [num_pages, page_size, num_heads_kv, head_dim]. Written in place if k is given, so that
            the last dimension has to be contiguous.
        v_cache: as k_cache, with head_dim_v.
        k: [batch, seqlen_new, num_heads_kv, head_dim] to append; with cu_seqlens_k_new
            [total_new, ...].
        v: as k, with head_dim_v.
        rotary_cos: [seqlen_ro, rotary_dim / 2] in q's dtype, rotary_dim <= head_dim: rotates the
            first rotary_dim elements of every head of q and k. Needs k. A new key is rotated by its
            slot in the cache; query i by cache_seqlens + i if causal or with a window, else by
            cache_seqlens.
        rotary_sin: as rotary_cos.
        cache_seqlens: int, or int32 [batch]: number of keys in the cache before the append,
            leftpad included. None = the whole cache; needed with k.
        cache_batch_idx: int32 [batch], the row of the cache (or of page_table) of each sequence;
            default 0, 1, 2 ... No row may appear twice if k is given.
        cache_leftpad: int32 [batch]: the first cache_leftpad[b] keys are skipped.
        block_table: another word for page_table.
        softmax_scale: see flash_attn_func.
        causal: see flash_attn_func.
        window_size: see flash_attn_func.
        softcap: see flash_attn_func.
        rotary_interleaved: rotate the pairs (0, 1), (2, 3) ...; else (i, i + rotary_dim / 2).
        alibi_slopes: see flash_attn_func.
        num_splits: see flash_attn_func.
        return_softmax_lse: see flash_attn_func.
        page_table: int32 [batch, max_pages]: key j of sequence b is at
            ``k_cache[page_table[b, j // page_size], j % page_size]``. Any page size. Entries past
            the length are never read.
        cu_seqlens_q: int32 [batch + 1]: queries of different numbers for each sequence.
        cu_seqlens_k_new: int32 [batch + 1]: the same for k and v.
        max_seqlen_q: the largest number of queries of a sequence or more; needed with cu_seqlens_q.
        rotary_seqlens: int32 [batch]: rotary position of the first new key, in place of
            cache_seqlens.
        s_aux: see flash_attn_func.
        learnable_sink: see flash_attn_func.
        scheduler_metadata: what get_scheduler_metadata returned; not needed.
        pack_gqa: see flash_attn_func.
        sm_margin: see flash_attn_func.
        attention_chunk: must be 0.
        qv: must be None.
        q_descale: must be None.
        k_descale: must be None.
        v_descale: must be None.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim_v] (or [total_q, ...]); with
        ``return_softmax_lse`` (out, lse) with lse [batch, num_heads_q, seqlen_q] (or
        [num_heads_q, total_q]).

    Raises:
        UnsupportedError: as flash_attn_func; and in a backward.
        ValueError: inputs that contradict each other. Overflow of the cache, page ids and the other
            values are checked for CPU tensors, and for CUDA tensors with FLASH_ATTN_EXT_DEBUG=1 in
            the environment, on the device, which the call waits for. In a CUDA graph that is
            captured so, a replay with bad values prints the sequence and traps.
        TypeError: arguments of a wrong Python type.

    Example:
        >>> k_cache = torch.zeros(1, 128, 4, 64)
        >>> v_cache = torch.zeros(1, 128, 4, 64)
        >>> for step in range(10):
        ...     q, k, v = torch.randn(3, 1, 1, 4, 64)
        ...     out = flash_attn_with_kvcache(
        ...         q, k_cache, v_cache, k, v, cache_seqlens=step, causal=True
        ...     )
    """
    _checks.unsupported(attention_chunk, qv, q_descale, k_descale, v_descale)
    if block_table is not None:
        page_table = _checks.one_of("page_table", page_table, "block_table", block_table)
    sink = s_aux
    if learnable_sink is not None:
        sink = _checks.one_of("s_aux", s_aux, "learnable_sink", learnable_sink)
    batch_size = _cache_checks.cache(
        q, k_cache, v_cache, page_table, cu_seqlens_q, cache_batch_idx, cache_leftpad
    )
    scale, softcap, _ = _checks.scores(softmax_scale, softcap, 0.0)
    window_left, window_right = _checks.window(causal, window_size)
    _checks.splits(num_splits, sm_margin)
    if alibi_slopes is not None:
        alibi_slopes = _checks.alibi(alibi_slopes, q, batch_size)
    if sink is not None:
        _checks.sink(sink, q)
    if cu_seqlens_q is None:
        max_seqlen_q = q.shape[1]
    else:
        max_seqlen_q = _checks.max_seqlen("max_seqlen_q", max_seqlen_q)
    if k is not None:
        v = _cache_checks.new_keys(
            q, k, v, k_cache, v_cache, cache_seqlens, cu_seqlens_k_new, batch_size
        )
    elif not (v is rotary_cos is cu_seqlens_k_new is None):
        _cache_checks.nothing_to_append(v, rotary_cos, cu_seqlens_k_new)
    if rotary_cos is not None:
        rotary_sin = _cache_checks.cache_rotary(
            q, rotary_cos, rotary_sin, rotary_seqlens, batch_size, k_cache, page_table
        )
    lengths = _cache_checks.seqlens_tensor(cache_seqlens, batch_size, q)
    if _checks.values_readable(q):
        _cache_checks.cache_values(
            q,
            max_seqlen_q,
            k_cache,
            k,
            batch_size,
            lengths,
            cache_batch_idx,
            cache_leftpad,
            page_table,
            cu_seqlens_q,
            cu_seqlens_k_new,
            rotary_cos,
            rotary_seqlens,
        )

    q = _checks.last_dim_contiguous(q)
    # The last arguments of both ops, less those at the end that are the defaults: each costs the
    # dispatcher 0.2 to 0.4 us.
    tail: tuple[Any, ...] = (page_table, scale, window_left, window_right)
    if not (
        alibi_slopes is cache_batch_idx is cache_leftpad is cu_seqlens_q is None
        and softcap == 0.0
        and num_splits == 0
        and sm_margin == 0
    ):
        tail += (softcap, alibi_slopes, cache_batch_idx, cache_leftpad)
        tail += (cu_seqlens_q, max_seqlen_q, num_splits, sm_margin)
    elif window_left < 0 and (window_right < 0 or _is_one(max_seqlen_q)):
        # One query sees every key, causal or not.
        tail = () if page_table is None and scale is None else (page_table, scale)
    try:
        if k is None or v is None:
            out, lse = _kvcache_fwd(q, k_cache, v_cache, lengths, *tail)
        else:
            k, v = _checks.last_dim_contiguous(k), _checks.last_dim_contiguous(v)
            rotary = (rotary_cos, rotary_sin, rotary_interleaved)
            rare = {}
            if rotary_seqlens is not None or cu_seqlens_k_new is not None:
                rare = {"rotary_seqlens": rotary_seqlens, "cu_seqlens_k_new": cu_seqlens_k_new}
            out, lse = _kvcache_append_fwd(
                q, k_cache, v_cache, k, v, lengths, *rotary, *tail, **rare
            )
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise
    if torch.is_grad_enabled():
        out, lse = without_gradient(
            "flash_attn_with_kvcache: got an input that requires grad, expected none; there is no "
            "backward through a cache, use torch.no_grad() or flash_attn_func",
            (out, lse),
            tuple(x for x in (q, k_cache, v_cache, k, v) if x is not None),
        )
    if sink is not None:
        out, lse = apply_sink(out, lse, sink)
    return (out, lse) if return_softmax_lse else out


def _is_one(size: int) -> bool:
    """Whether ``size`` is 1; False for a size that is being traced, which shall stay open."""
    return type(size) is int and size == 1 and not torch.compiler.is_compiling()


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """What flash-attn 3 computes ahead of a decoding step; here the plan needs nothing of it.

    The function exists so that code written for flash-attn 3 runs unchanged. Nothing is read from
    the tensors, and the result may be passed as ``scheduler_metadata`` or not.

    Args:
        batch_size: number of sequences.
        max_seqlen_q: the largest number of queries of a sequence.
        max_seqlen_k: the largest number of keys of a sequence.
        num_heads_q: query heads.
        num_heads_kv: key/value heads.
        headdim: head dimension of q and k.
        cache_seqlens: int32 [batch]; its device is the device of the result.
        qkv_dtype: element type.
        headdim_v: head dimension of v; default headdim.
        cu_seqlens_q: see flash_attn_with_kvcache.
        cu_seqlens_k_new: see flash_attn_with_kvcache.
        cache_leftpad: see flash_attn_with_kvcache.
        page_size: keys in a page.
        max_seqlen_k_new: the largest number of keys that is appended to a sequence.
        causal: see flash_attn_func.
        window_size: see flash_attn_func.
        attention_chunk: must be 0.
        has_softcap: whether softcap > 0 will be given.
        num_splits: see flash_attn_func.
        pack_gqa: see flash_attn_func.
        sm_margin: see flash_attn_func.

    Returns:
        int32 [1] on cache_seqlens' device: num_splits.

    Raises:
        UnsupportedError: attention_chunk is not 0.
        ValueError: cache_seqlens is not int32 [batch], or a count is out of range.
    """
    _checks.unsupported(attention_chunk, None, None, None, None)
    _checks.per_sequence("cache_seqlens", cache_seqlens, batch_size, cache_seqlens)
    _checks.splits(num_splits, sm_margin)
    return torch.full((1,), num_splits, dtype=torch.int32, device=cache_seqlens.device)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges attention results over several disjoint sets of keys.

    For two results, or where a gradient is needed: ``merge_states``.

    Args:
        out_partial: [num_splits, batch, seqlen, num_heads, head_dim] (or [num_splits, total,
            num_heads, head_dim]), fp32, at most 256 splits.
        lse_partial: [num_splits, batch, seqlen, num_heads] (or [num_splits, total, num_heads]),
            fp32, natural logarithm, any strides; -inf = no keys.
        out: [batch, seqlen, num_heads, head_dim], written and returned.
        out_dtype: dtype of a new ``out``; default out_partial's.

    Returns:
        (out, lse) with lse [batch, seqlen, num_heads]. Mind that heads come last here, as in
        flash-attn 3, and before rows in the lse of the attention functions.

    Raises:
        UnsupportedError: in a backward.
        ValueError: shapes or dtypes that do not belong together.
    """
    _cache_checks.partial_results(out_partial, lse_partial)
    out_partial = _checks.last_dim_contiguous(out_partial)
    try:
        if out is not None:
            _cache_checks.combined(out, out_partial, out_dtype)
            return out, _combine_out(out_partial, lse_partial, out)
        results = _combine(out_partial, lse_partial, out_dtype)
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise
    out, lse = without_gradient(
        "flash_attn_combine: got an input that requires grad, expected none; there is no backward, "
        "use merge_states",
        results,
        (out_partial, lse_partial),
    )
    return out, lse
