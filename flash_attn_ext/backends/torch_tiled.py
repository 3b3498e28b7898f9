"""Every op of flash_attn_ext in PyTorch operations: any device, any feature, O(seqlen) memory.

The functions have the names and parameters of `_schema.SCHEMAS`, where their meaning is described;
the API has checked the arguments. `deterministic`, `num_splits` and `sm_margin` have no effect: the
order of every sum is fixed. Lengths on a GPU are never read on the host.

fp16, bf16 and fp32 inputs are computed in fp32, fp64 in fp64. Rows of results that belong to no
sequence (behind cu_seqlens[-1], past seqused_q) are 0, their lse -inf.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _kvcache, note_fallback
from ._companions import cross_entropy_bwd as cross_entropy_bwd
from ._companions import cross_entropy_bwd_ as cross_entropy_bwd_
from ._companions import cross_entropy_fwd as cross_entropy_fwd
from ._companions import norm_bwd as norm_bwd
from ._companions import norm_fwd as norm_fwd
from ._problem import Options
from ._sequences import (
    CacheSide,
    FixedSide,
    PackedSide,
    Part,
    ResultSide,
    cache_side,
    problems,
)
from ._tiles import backward, forward, write_dmask


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _round128(length: int) -> int:
    return (length + 127) // 128 * 128


def _by_position(statistics: Tensor) -> Tensor:
    """View of [..., heads, positions] as [..., positions, heads, 1], the layout of all rows."""
    return statistics.transpose(-1, -2).unsqueeze(-1)


def _new_lse(q: Tensor) -> Tensor:
    """[batch, heads, seqlen] or [heads, total], -inf."""
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return q.new_full(shape, -torch.inf, dtype=_accumulate_dtype(q))


def _forward(
    parts: Iterable[Part], q: Tensor, k: Tensor, v: Tensor, out: Tensor, dmask: Tensor
) -> Tensor:
    """Writes out and, unless it is empty, dmask [batch, ...]; returns lse."""
    out.zero_()
    lse = _new_lse(q)
    for problem, side_q, side_k in parts:
        rows_q, rows_k, rows_v = side_q.reader(q), side_k.reader(k), side_k.reader(v)
        out_writer, lse_writer = side_q.writer(out), side_q.writer(_by_position(lse))
        forward(problem, rows_q, rows_k, rows_v, v.shape[-1], out_writer, lse_writer)
        out_writer.finish()
        lse_writer.finish()
        if dmask.numel() > 0:
            rows_lse = side_q.reader(_by_position(lse))
            batch = slice(problem.batch.start, problem.batch.stop)
            write_dmask(problem, rows_q, rows_k, rows_lse, dmask[batch])
    return lse


def _backward(
    parts: Iterable[Part],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; inputs are q, k, v, dout."""
    q, k, v, dout = inputs
    dq = torch.zeros(q.shape, dtype=_accumulate_dtype(q), device=q.device)
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    for problem, side_q, side_k in parts:
        assert isinstance(side_k, ResultSide)  # caches have no gradient
        writers = side_q.writer(dq), side_k.writer(dk), side_k.writer(dv)
        backward(
            problem,
            (side_q.reader(q), side_k.reader(k), side_k.reader(v), side_q.reader(dout)),
            (side_q.reader(_by_position(lse)), side_q.reader(_by_position(delta))),
            writers,
        )
        for writer in writers:
            writer.finish()
    return dq.to(q.dtype), dk, dv


def _new_out(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _new_dmask(q: Tensor, batch_size: int, seqlens: tuple[int, int], return_dmask: bool) -> Tensor:
    if not return_dmask:
        return q.new_empty([0])
    return q.new_zeros((batch_size, q.shape[-2], _round128(seqlens[0]), _round128(seqlens[1])))


def _options(q: Tensor, softmax_scale: float | None, *others: Any) -> Options:
    """Options with the default of softmax_scale filled in."""
    return Options(q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, *others)


def _fixed_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: Options, return_dmask: bool
) -> tuple[Tensor, Tensor]:
    """Writes out; returns lse and dmask."""
    note_fallback("fwd", q)
    batch_size, seqlens = q.shape[0], (q.shape[1], k.shape[1])
    sides = FixedSide(seqlens[0]), FixedSide(seqlens[1])
    dmask = _new_dmask(q, batch_size, seqlens, return_dmask)
    lse = _forward(problems(q, k.shape[2], batch_size, sides, options), q, k, v, out, dmask)
    return lse, dmask


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_dmask: bool = False,
    num_splits: int = 0,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of sequences of one length; returns out, lse, dmask."""
    options = _options(
        q, softmax_scale, window_left, window_right, softcap, alibi_slopes, rng_state, dropout_p
    )
    out = _new_out(q, v)
    return (out, *_fixed_forward(q, k, v, out, options, return_dmask))


def fwd_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_dmask: bool = False,
    num_splits: int = 0,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """`fwd` that writes into `out`; returns lse, dmask."""
    options = _options(
        q, softmax_scale, window_left, window_right, softcap, alibi_slopes, rng_state, dropout_p
    )
    return _fixed_forward(q, k, v, out, options, return_dmask)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fwd`; returns dq, dk, dv."""
    note_fallback("bwd", q)
    options = _options(
        q, softmax_scale, window_left, window_right, softcap, alibi_slopes, rng_state, dropout_p
    )
    sides = FixedSide(q.shape[1]), FixedSide(k.shape[1])
    parts = problems(q, k.shape[2], q.shape[0], sides, options)
    return _backward(parts, (q, k, v, dout), lse, _delta(out, dout, dlse))


def _varlen_sides(
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
    max_seqlens: tuple[int, int],
) -> tuple[PackedSide, PackedSide | CacheSide]:
    side_q = PackedSide.of(cu_seqlens_q, seqused_q, max_seqlens[0])
    if page_table is not None:
        seqlens = seqused_k
        if seqlens is None and cu_seqlens_k is not None:
            seqlens = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        batch_size = cu_seqlens_q.shape[0] - 1
        paged = cache_side(k, seqlens, batch_size, max_seqlens[1], page_table=page_table)
        return side_q, paged
    assert cu_seqlens_k is not None  # the API requires it where there are no pages
    same = cu_seqlens_k.data_ptr() == cu_seqlens_q.data_ptr()
    if same and seqused_q is None and seqused_k is None:
        return side_q, side_q  # known on the host: the diagonal starts at key 0
    return side_q, PackedSide.of(cu_seqlens_k, seqused_k, max_seqlens[1])


def _varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sides: tuple[PackedSide, PackedSide | CacheSide],
    max_seqlens: tuple[int, int],
    options: Options,
    return_dmask: bool,
) -> tuple[Tensor, Tensor]:
    """Writes out; returns lse and dmask."""
    note_fallback("varlen_fwd", q)
    batch_size = sides[0].seqlens.shape[0]
    dmask = _new_dmask(q, batch_size, max_seqlens, return_dmask)
    lse = _forward(problems(q, k.shape[-2], batch_size, sides, options), q, k, v, out, dmask)
    return lse, dmask


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_dmask: bool = False,
    num_splits: int = 0,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of packed sequences, keys packed or in pages; returns out, lse, dmask."""
    options = _options(
        q, softmax_scale, window_left, window_right, softcap, alibi_slopes, rng_state, dropout_p
    )
    max_seqlens = (max_seqlen_q, max_seqlen_k)
    sides = _varlen_sides(
        k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, max_seqlens
    )
    out = _new_out(q, v)
    return (out, *_varlen_forward(q, k, v, out, sides, max_seqlens, options, return_dmask))


def varlen_fwd_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_dmask: bool = False,
    num_splits: int = 0,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """`varlen_fwd` that writes into `out`; returns lse, dmask."""
    options = _options(
        q, softmax_scale, window_left, window_right, softcap, alibi_slopes, rng_state, dropout_p
    )
    max_seqlens = (max_seqlen_q, max_seqlen_k)
    sides = _varlen_sides(
        k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, max_seqlens
    )
    return _varlen_forward(q, k, v, out, sides, max_seqlens, options, return_dmask)


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: Tensor | None = None,
    rng_state: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `varlen_fwd` without pages; returns dq, dk, dv."""
    note_fallback("varlen_bwd", q)
    options = _options(
        q, softmax_scale, window_left, window_right, softcap, alibi_slopes, rng_state, dropout_p
    )
    sides = _varlen_sides(
        k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, None, (max_seqlen_q, max_seqlen_k)
    )
    parts = problems(q, k.shape[-2], cu_seqlens_q.shape[0] - 1, sides, options)
    return _backward(parts, (q, k, v, dout), lse, _delta(out, dout, dlse))


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    dtype = _accumulate_dtype(out)
    delta = (out.to(dtype) * dout.to(dtype)).sum(-1).transpose(-1, -2)
    return delta.contiguous() if dlse is None else delta - dlse


def bwd_preprocess(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """Returns delta = rowsum(dout * out) - dlse, [batch, heads, seqlen] or [heads, total]."""
    note_fallback("bwd_preprocess", out)
    return _delta(out, dout, dlse).contiguous()


def _cache_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor | None,
    places: tuple[Tensor | None, Tensor | None, Tensor | None],
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Attention against caches of these lengths; returns out, lse.

    places is cache_batch_idx, cache_leftpad, page_table.
    """
    side_q: FixedSide | PackedSide = FixedSide(q.shape[1])
    batch_size = q.shape[0]
    if cu_seqlens_q is not None:
        side_q = PackedSide.of(cu_seqlens_q, None, max_seqlen_q)
        batch_size = cu_seqlens_q.shape[0] - 1
    cache_batch_idx, cache_leftpad, page_table = places
    side_k = cache_side(
        k_cache,
        seqlens,
        batch_size,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        page_table=page_table,
    )
    out = _new_out(q, v_cache)
    parts = problems(q, k_cache.shape[2], batch_size, (side_q, side_k), options)
    return out, _forward(parts, q, k_cache, v_cache, out, q.new_empty([0]))


def kvcache_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    num_splits: int = 0,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention against a cache; returns out, lse."""
    note_fallback("kvcache_fwd", q)
    options = _options(
        q, softmax_scale, window_left, window_right, softcap, alibi_slopes, None, 0.0
    )
    places = (cache_batch_idx, cache_leftpad, page_table)
    caches = (k_cache, v_cache, cache_seqlens, places)
    return _cache_forward(q, *caches, cu_seqlens_q, max_seqlen_q, options)


def kvcache_append_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    num_splits: int = 0,
    sm_margin: int = 0,
    rotary_seqlens: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`append_kv`, rotation of q, then `kvcache_fwd`; returns out, lse."""
    note_fallback("kvcache_append_fwd", q)
    _append_kv(
        (k_cache, v_cache),
        (k, v),
        cache_seqlens,
        cache_batch_idx,
        page_table,
        cu_seqlens_k_new,
        (rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved),
    )
    if rotary_cos is not None and rotary_sin is not None:
        base = cache_seqlens if rotary_seqlens is None else rotary_seqlens
        same_position = window_left < 0 and window_right < 0
        positions = _kvcache.rotary_positions(q, base, cu_seqlens_q, same_position)
        q = _kvcache.rotate(q, rotary_cos, rotary_sin, positions, rotary_interleaved, False)
    new = k.shape[1] if cu_seqlens_k_new is None else cu_seqlens_k_new[1:] - cu_seqlens_k_new[:-1]
    caches = (k_cache, v_cache, cache_seqlens + new, (cache_batch_idx, cache_leftpad, page_table))
    options = _options(
        q, softmax_scale, window_left, window_right, softcap, alibi_slopes, None, 0.0
    )
    return _cache_forward(q, *caches, cu_seqlens_q, max_seqlen_q, options)


def _append_kv(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary: tuple[Tensor | None, Tensor | None, Tensor | None, bool],
) -> None:
    """`append_kv` with its arguments in groups; rotary is cos, sin, rotary_seqlens, interleaved."""
    k, v = new
    cos, sin, rotary_seqlens, interleaved = rotary
    if cos is not None and sin is not None:
        base = cache_seqlens if rotary_seqlens is None else rotary_seqlens
        positions = _kvcache.rotary_positions(k, base, cu_seqlens_k_new, False)
        k = _kvcache.rotate(k, cos, sin, positions, interleaved, False)
    seqlens = cache_seqlens.long()
    if cu_seqlens_k_new is None:
        positions = torch.arange(k.shape[1], device=k.device)
        sequence = torch.arange(k.shape[0], device=k.device)[:, None].expand(-1, k.shape[1])
        slots = (seqlens[:, None] + positions).flatten()
        sequence, k, v = sequence.flatten(), k.flatten(0, 1), v.flatten(0, 1)
    else:
        sequence, positions = _kvcache.packed_positions(cu_seqlens_k_new, k.shape[0])
        behind = sequence == seqlens.shape[0]
        sequence = torch.where(behind, 0, sequence)
        slots = torch.where(behind, -1, seqlens[sequence] + positions)
    _kvcache.append(caches, (k, v), sequence, slots, cache_batch_idx, page_table)


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
) -> None:
    """Writes k, v (keys rotated if a table is given) into the caches behind cache_seqlens."""
    note_fallback("append_kv", k)
    _append_kv(
        (k_cache, v_cache),
        (k, v),
        cache_seqlens,
        cache_batch_idx,
        page_table,
        cu_seqlens_k_new,
        (rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved),
    )


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
    same_position: bool,
) -> Tensor:
    """Rotary embedding into a new tensor."""
    note_fallback("rotary", x)
    positions = _kvcache.rotary_positions(x, seqlen_offsets, cu_seqlens, same_position)
    return _kvcache.rotate(x, cos, sin, positions, interleaved, conjugate)


def rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
    same_position: bool,
) -> None:
    """Rotary embedding in place."""
    note_fallback("rotary_", x)
    positions = _kvcache.rotary_positions(x, seqlen_offsets, cu_seqlens, same_position)
    x.copy_(_kvcache.rotate(x, cos, sin, positions, interleaved, conjugate))


def combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Merge of partial results over dimension 0; returns out, lse."""
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype or out_partial.dtype)
    return out, combine_out(out_partial, lse_partial, out)


def combine_out(out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> Tensor:
    """`combine` that writes into `out`; returns lse.

    A part without weight is not multiplied: where its lse is -inf it may hold anything.
    """
    note_fallback("combine", out_partial)
    lse = torch.logsumexp(lse_partial, 0).contiguous()
    shift = torch.where(lse == -torch.inf, 0.0, lse)
    acc = torch.zeros(out.shape, dtype=out_partial.dtype, device=out.device)
    for out_part, lse_part in zip(out_partial, lse_partial, strict=True):
        weight = torch.exp(lse_part - shift).unsqueeze(-1)
        acc += torch.where(weight == 0.0, 0.0, weight * out_part)
    out.copy_(acc)
    return lse
