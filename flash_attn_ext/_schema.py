"""Every op of the namespace ``flash_attn_ext``, defined once: schema, default implementation, fake.

Each op has two overloads with one signature. ``op.default`` is what the API calls: the compiled
library registers its kernels for CUDA under it; on every other device, and where no library is
loaded, it is the tiled PyTorch backend. ``op.tiled`` is the tiled backend whatever the device; the
compiled library calls it when its plan has no kernel for a problem.

Conventions shared by all schemas (b, h, hk, sq, sk, d, dv: batch, query heads, key/value heads,
lengths, head dimensions):

* Tensors: q [b, sq, h, d], k [b, sk, hk, d], v [b, sk, hk, dv]; varlen: [total, heads, dim].
* ``window_left``/``window_right``: keys around the bottom-right aligned diagonal, -1 = unbounded.
  Causal is ``window_right=0``; there is no separate flag.
* ``softcap`` 0.0 = off. ``alibi_slopes`` fp32 [h] or [b, h].
* ``rng_state``: int64 [2] = (seed, offset) on q's device, given iff ``dropout_p > 0``.
* lse: natural log, fp32 (fp64 for fp64 inputs), [b, h, sq]; varlen [h, total_q]; -inf for a row
  that sees no key.
* dmask: [b, h, round128(sq), round128(sk)] in q's dtype if ``return_dmask``, else an empty [0].
* What few calls of attention use stands last and has a default, because callers leave out what they
  do not use: each argument costs the dispatcher as much as reading two tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn_ext._load import claim_ops

from .backends import chosen_backend

_VARLEN = (
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "{paged}SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_VARLEN_FWD = _VARLEN.format(paged="Tensor? page_table, ")
_VARLEN_BWD = _VARLEN.format(paged="")
_CACHE_TAIL = (
    "Tensor? page_table=None, float? softmax_scale=None, int window_left=-1, int window_right=-1, "
    "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? cache_batch_idx=None, "
    "Tensor? cache_leftpad=None, Tensor? cu_seqlens_q=None, SymInt max_seqlen_q=0, "
    "int num_splits=0, int sm_margin=0"
)
_SCORES = (
    "Tensor? alibi_slopes=None, Tensor? rng_state=None, float? softmax_scale=None, "
    "int window_left=-1, int window_right=-1, float softcap=0.0, float dropout_p=0.0"
)
_LOSS = "float label_smoothing, float logit_scale, float lse_square_scale, int ignore_index"
_FWD_TAIL = f"{_SCORES}, bool return_dmask=False, int num_splits=0, int sm_margin=0"
_BWD_TAIL = f"{_SCORES}, bool deterministic=False, int sm_margin=0"

SCHEMAS: dict[str, str] = {
    # Forward. The *_out forms write into `out` (any strides, last dimension contiguous).
    "fwd": f"(Tensor q, Tensor k, Tensor v, {_FWD_TAIL}) -> (Tensor out, Tensor lse, Tensor dmask)",
    "fwd_out": f"(Tensor q, Tensor k, Tensor v, Tensor(a!) out, {_FWD_TAIL})"
    " -> (Tensor lse, Tensor dmask)",
    "varlen_fwd": f"(Tensor q, Tensor k, Tensor v, {_VARLEN_FWD}, {_FWD_TAIL})"
    " -> (Tensor out, Tensor lse, Tensor dmask)",
    "varlen_fwd_out": f"(Tensor q, Tensor k, Tensor v, Tensor(a!) out, {_VARLEN_FWD}, {_FWD_TAIL})"
    " -> (Tensor lse, Tensor dmask)",
    # Backward. dlse: gradient of lse, same shape; None = zero.
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor? dlse=None, {_BWD_TAIL}) -> (Tensor dq, Tensor dk, Tensor dv)",
    "varlen_bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor? dlse, {_VARLEN_BWD}, {_BWD_TAIL}) -> (Tensor dq, Tensor dk, Tensor dv)",
    # delta = rowsum(dout * out) - dlse: fp32 (fp64 for fp64), [b, h, sq]; varlen [h, total_q].
    "bwd_preprocess": "(Tensor out, Tensor dout, Tensor? dlse) -> Tensor delta",
    # Attention against a cache: k_cache [b_cache, s_cache, hk, d] or, with page_table
    # [b, max_pages] int32, [num_pages, page_size, hk, d]. q [b, sq, h, d], or [total_q, h, d] with
    # cu_seqlens_q and max_seqlen_q. cache_seqlens int32 [b]: keys in the cache (leftpad included)
    # before the append; None = the whole cache.
    "kvcache_fwd": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens=None, "
    f"{_CACHE_TAIL}) -> (Tensor out, Tensor lse)",
    # The same after appending k, v ([b, s_new, hk, d], or [total_new, hk, d] with cu_seqlens_k_new)
    # at cache_seqlens, keys and queries rotated if rotary_cos is given.
    "kvcache_append_fwd": "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
    "Tensor cache_seqlens, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    f"bool rotary_interleaved=True, {_CACHE_TAIL}, Tensor? rotary_seqlens=None, "
    "Tensor? cu_seqlens_k_new=None) -> (Tensor out, Tensor lse)",
    # The append alone. rotary_seqlens int32 [b] replaces cache_seqlens as the rotary position.
    "append_kv": "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
    "Tensor cache_seqlens, Tensor? cache_batch_idx, Tensor? page_table, "
    "Tensor? cu_seqlens_k_new, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_seqlens, "
    "bool rotary_interleaved) -> ()",
    # Rotary embedding of the first 2 * cos.size(1) elements of each head. x [b, s, h, d], or
    # [total, h, d] with cu_seqlens. Row p of cos/sin [seqlen_ro, rotary_dim / 2] serves position p
    # = seqlen_offsets[b] + index in the sequence; if `same_position`, p = seqlen_offsets[b].
    # conjugate: rotate backwards (the gradient).
    "rotary": "(Tensor x, Tensor cos, Tensor sin, Tensor? seqlen_offsets, Tensor? cu_seqlens, "
    "SymInt max_seqlen, bool interleaved, bool conjugate, bool same_position) -> Tensor",
    "rotary_": "(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? seqlen_offsets, Tensor? cu_seqlens, "
    "SymInt max_seqlen, bool interleaved, bool conjugate, bool same_position) -> ()",
    # Merge of partial results over dimension 0. out_partial [splits, b, s, h, dv] fp32 (or
    # [splits, total, h, dv]); lse_partial [splits, b, s, h] (or [splits, total, h]) fp32, any
    # strides. lse [b, s, h] (or [total, h]).
    "combine": "(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype)"
    " -> (Tensor out, Tensor lse)",
    "combine_out": "(Tensor out_partial, Tensor lse_partial, Tensor(a!) out) -> Tensor lse",
    # LayerNorm and RMSNorm (is_rms_norm) of sum = dropout(x * rowscale) + residual. x [rows,
    # hidden_size]; weight, bias [hidden_size], of one type, used as weight + weight_offset;
    # rowscale fp32 [rows]. sum has the residual's type, without one x's or fp32 (sum_in_fp32);
    # empty unless store_sum. mean (empty for RMSNorm), rstd: fp32 (fp64 for fp64) [rows].
    "norm_fwd": "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor? rowscale, "
    "Tensor? rng_state, float eps, float dropout_p, bool is_rms_norm, float weight_offset, "
    "bool store_sum, bool sum_in_fp32) -> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)",
    # sum: what was normalised (x itself where nothing was done to it), dsum its gradient. dresidual
    # in sum's type is empty unless separate_residual, dbias unless has_bias.
    "norm_bwd": "(Tensor dout, Tensor sum, Tensor? dsum, Tensor weight, Tensor? rowscale, "
    "Tensor? rng_state, Tensor mean, Tensor rstd, float dropout_p, bool is_rms_norm, "
    "float weight_offset, bool has_bias, bool separate_residual)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    # Cross-entropy of logits [rows, vocabulary], labels int64 or int32 [rows]; loss (z_loss
    # included), z_loss, lse and dloss: fp32 (fp64 for fp64) [rows].
    "cross_entropy_fwd": f"(Tensor logits, Tensor labels, Tensor? given_lse, {_LOSS})"
    " -> (Tensor loss, Tensor z_loss, Tensor lse)",
    "cross_entropy_bwd": f"(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, {_LOSS})"
    " -> Tensor dlogits",
    # The same into logits.
    "cross_entropy_bwd_": f"(Tensor dloss, Tensor(a!) logits, Tensor labels, Tensor lse, {_LOSS})"
    " -> ()",
}
"""Op name -> argument list and returns."""

KERNEL_ONLY = (
    # The checks of FLASH_ATTN_EXT_DEBUG=1, as _value_checks.py asks for them: numbers of each check
    # (tensors by their place in `tensors`), and its name and text, a line each. The record of the
    # first violation, int64 [7]; without `record` it is printed on the device, which then traps.
    "value_checks(Tensor[] tensors, int[] table, str texts, int batch_size, bool record) -> Tensor",
)
"""Ops that the compiled library alone has, and that are never traced."""

OVERLOADS = ("default", "tiled")
"""``default``: a kernel where there is one. ``tiled``: the tiled backend on every device."""

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
claim_ops()
_library = torch.library.Library("flash_attn_ext", "DEF")  # type: ignore[no-untyped-call]


def _qualname(name: str, overload: str) -> str:
    return name if overload == "default" else f"{name}.{overload}"


def _tiled_implementation(name: str) -> Callable[..., Any]:
    """The function ``name`` of the tiled backend, imported at the first call.

    Ops carry no autograd formula: gradients are the business of autograd.py. Without ``no_grad``
    an op called directly with an input that requires grad would record the backend's inner loops.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        from .backends import torch_tiled

        with torch.no_grad():
            return getattr(torch_tiled, name)(*args, **kwargs)

    return call


def op(name: str) -> Callable[..., Any]:
    """The overload of op ``name`` that the API calls.

    That is ``default``, or ``tiled`` with FLASH_ATTN_EXT_BACKEND=tiled in the environment when the
    package is imported.
    """
    overload = "tiled" if chosen_backend() == "tiled" else "default"
    function: Callable[..., Any] = getattr(getattr(torch.ops.flash_attn_ext, name), overload)
    return function


# Fake implementations: shapes, dtypes and strides of the results from those of the inputs, without
# data. Every result is a new contiguous tensor.


def _round128(length: int) -> int:
    return (length + 127) // 128 * 128


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_statistics(
    q: Tensor, max_seqlen_q: int, max_seqlen_k: int, batch_size: int, return_dmask: bool
) -> tuple[Tensor, Tensor]:
    """The results lse and dmask; q is [b, sq, h, d] or [total_q, h, d]."""
    num_heads_q = q.shape[-2]
    rows = (q.shape[0], num_heads_q, q.shape[1]) if q.dim() == 4 else (num_heads_q, q.shape[0])
    lse = q.new_empty(rows, dtype=_accumulate_dtype(q))
    if not return_dmask:
        return lse, q.new_empty([0])
    return lse, q.new_empty(
        [batch_size, num_heads_q, _round128(max_seqlen_q), _round128(max_seqlen_k)]
    )


def _is_dmask_asked_for(options: tuple[Any, ...]) -> bool:
    """``return_dmask`` among the arguments of _FWD_TAIL that were given."""
    return len(options) > 7 and bool(options[7])


def _fake_fwd_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return_dmask = _is_dmask_asked_for(options)
    return _fake_statistics(q, q.shape[1], k.shape[1], q.shape[0], return_dmask)


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty([*q.shape[:-1], v.shape[-1]])
    return (out, *_fake_fwd_out(q, k, v, out, *options))


def _fake_varlen_fwd_out(
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
    *options: Any,
) -> tuple[Tensor, Tensor]:
    batch_size, return_dmask = cu_seqlens_q.shape[0] - 1, _is_dmask_asked_for(options)
    return _fake_statistics(q, max_seqlen_q, max_seqlen_k, batch_size, return_dmask)


def _fake_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty([*q.shape[:-1], v.shape[-1]])
    return (out, *_fake_varlen_fwd_out(q, k, v, out, *options))


def _fake_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_bwd_preprocess(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    return out.new_empty(
        [*out.shape[:-3], out.shape[-2], out.shape[-3]], dtype=_accumulate_dtype(out)
    )


def _fake_kvcache_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    out = q.new_empty([*q.shape[:-1], v_cache.shape[-1]])
    return out, _fake_statistics(q, 0, 0, 0, return_dmask=False)[0]


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_rotary(x: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype or out_partial.dtype)
    return out, lse_partial.new_empty(lse_partial.shape[1:])


def _fake_combine_out(out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> Tensor:
    return lse_partial.new_empty(lse_partial.shape[1:])


def _fake_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rowscale: Tensor | None,
    rng_state: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms_norm: bool,
    weight_offset: float,
    store_sum: bool,
    sum_in_fp32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _accumulate_dtype(x)
    of_sum = torch.float32 if store_sum and sum_in_fp32 else x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(
            x.shape if store_sum else [0], dtype=of_sum if residual is None else residual.dtype
        ),
        x.new_empty([0 if is_rms_norm else x.shape[0]], dtype=wide),
        x.new_empty([x.shape[0]], dtype=wide),
    )


def _fake_norm_bwd(
    dout: Tensor, sum: Tensor, dsum: Tensor | None, weight: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_bias, separate_residual = options[-2:]
    return (
        dout.new_empty(dout.shape),
        sum.new_empty(sum.shape if separate_residual else [0]),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape if has_bias else [0]),
    )


def _fake_cross_entropy_fwd(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, z_loss, lse = (
        logits.new_empty([logits.shape[0]], dtype=_accumulate_dtype(logits)) for _ in range(3)
    )
    return loss, z_loss, lse


def _fake_cross_entropy_bwd(dloss: Tensor, logits: Tensor, *options: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "fwd": _fake_fwd,
    "fwd_out": _fake_fwd_out,
    "varlen_fwd": _fake_varlen_fwd,
    "varlen_fwd_out": _fake_varlen_fwd_out,
    "bwd": _fake_bwd,
    "varlen_bwd": _fake_bwd,
    "bwd_preprocess": _fake_bwd_preprocess,
    "kvcache_fwd": _fake_kvcache_fwd,
    "kvcache_append_fwd": _fake_kvcache_fwd,
    "append_kv": _fake_nothing,
    "rotary": _fake_rotary,
    "rotary_": _fake_nothing,
    "combine": _fake_combine,
    "combine_out": _fake_combine_out,
    "norm_fwd": _fake_norm_fwd,
    "norm_bwd": _fake_norm_bwd,
    "cross_entropy_fwd": _fake_cross_entropy_fwd,
    "cross_entropy_bwd": _fake_cross_entropy_bwd,
    "cross_entropy_bwd_": _fake_nothing,
}


def _register() -> None:
    for name, signature in SCHEMAS.items():
        implementation = _tiled_implementation(name)
        for overload in OVERLOADS:
            qualname = _qualname(name, overload)
            _library.define(qualname + signature, tags=_TAGS)  # type: ignore[no-untyped-call]
            _library.impl(  # type: ignore[no-untyped-call]
                qualname, implementation, "CompositeExplicitAutograd"
            )
            torch.library.register_fake(f"{_library.ns}::{qualname}", _FAKES[name], lib=_library)
    for schema in KERNEL_ONLY:
        _library.define(schema)  # type: ignore[no-untyped-call]


_register()
