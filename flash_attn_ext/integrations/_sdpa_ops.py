"""What `sdpa` registers: one function for each aten op, which either computes or passes on.

Every function takes a callable first, the intercepted call on torch's own kernel, then the
arguments of its op. Layouts are torch's: [batch, heads, seqlen, head_dim] in the ops whose name
begins with ``_scaled``, [batch, seqlen, heads, head_dim] or [total, heads, head_dim] in the others.
Results have the dtypes and strides of torch's fake implementations, which compiled graphs rely on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _schema
from .._checks import last_dim_contiguous, last_dims_contiguous
from ..autograd import Options, is_deterministic
from ..backends import chosen_backend

_MIN_CAPABILITY = (8, 0)
_HALF = (torch.float16, torch.bfloat16)
_FLOATING = (*_HALF, torch.float32, torch.float64)

_fwd_out = _schema.op("fwd_out")
_bwd = _schema.op("bwd")
_varlen_fwd_out = _schema.op("varlen_fwd_out")
_varlen_bwd = _schema.op("varlen_bwd")

Original = Callable[[], Any]
"""The call that was intercepted, on torch's own kernel."""


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY


def _is_served(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> bool:
    """Whether this call is computed here. Backward and forward of a call agree.

    q, k, v: [..., heads, head_dim], packed or not.
    """
    if q.is_cuda:
        if q.dtype not in _HALF or chosen_backend() == "tiled" or not _has_kernels(q.device):
            return False
    elif q.dtype not in _FLOATING:
        return False
    head_dim, num_heads_kv = q.shape[-1], k.shape[-2]
    return (
        q.dim() == k.dim() == v.dim()
        and k.dtype == v.dtype == q.dtype
        and 0 < head_dim <= 256
        and k.shape[-1] == v.shape[-1] == head_dim
        and num_heads_kv > 0
        and q.shape[-2] % num_heads_kv == 0
        and 0.0 <= dropout_p < 1.0
    )


def _lengths_are_served(cum_seq_q: Tensor | None, cum_seq_k: Tensor | None) -> bool:
    if cum_seq_q is None or cum_seq_k is None:
        return cum_seq_q is cum_seq_k
    return cum_seq_q.dtype == cum_seq_k.dtype == torch.int32


def _options(
    scale: float | None,
    is_causal: bool,
    dropout_p: float,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    return_dmask: bool = False,
    num_splits: int | None = None,
) -> Options:
    left = -1 if window_size_left is None else max(window_size_left, -1)
    right = -1 if window_size_right is None else max(window_size_right, -1)
    right = 0 if is_causal else right
    return Options(scale, left, right, 0.0, dropout_p, return_dmask, num_splits or 0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lengths: tuple[Any, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes ``out``; the other results as the ops want them.

    Args:
        q: [batch, seqlen_q, heads, head_dim], or [total_q, heads, head_dim] with lengths.
        k: likewise.
        v: likewise.
        out: as q, any strides.
        lengths: (), or the length arguments of the varlen op.
        options: scalars.

    Returns:
        lse, rng_state (uint64 [2]; arbitrary without dropout), unused (uint64 []), dmask.
    """
    q, k, v = last_dims_contiguous(q, k, v)
    if options.dropout_p > 0.0:
        seed = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device)
        rng_state, state = seed, seed.view(torch.uint64)
    else:
        rng_state, state = None, q.new_empty(2, dtype=torch.uint64)
    buffer = out if out.stride(-1) == 1 else torch.empty(out.shape, dtype=q.dtype, device=q.device)
    op = _varlen_fwd_out if lengths else _fwd_out
    lse, dmask = op(q, k, v, buffer, *lengths, None, rng_state, *options)
    if buffer is not out:
        out.copy_(buffer)
    return lse, state, q.new_empty([], dtype=torch.uint64), dmask


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: tuple[Any, ...],
    rng_state: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous dq, dk, dv; the arguments as in `_forward`."""
    state = rng_state.view(torch.int64) if options.dropout_p > 0.0 else None
    arguments = (last_dim_contiguous(x) for x in (grad_out, q, k, v, out))
    tail = (None, state, *options[:5], is_deterministic(False))
    op = _varlen_bwd if lengths else _bwd
    gradients: tuple[Tensor, Tensor, Tensor] = op(
        *arguments, lse.contiguous(), None, *lengths, *tail
    )
    return gradients


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient`` with the strides that compiled graphs expect: those of ``empty_like(x)``."""
    if gradient.stride() == x.stride():
        return gradient
    expected = torch.empty_like(x)
    return gradient if expected.stride() == gradient.stride() else expected.copy_(gradient)


def _sdpa_forward(
    original: Original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    q, k, v = (x.transpose(-3, -2) for x in (query, key, value))
    debug_mask_is_served = dropout_p > 0.0 or not return_debug_mask
    if query.dim() != 4 or not debug_mask_is_served or not _is_served(q, k, v, dropout_p):
        return original()
    out = torch.empty_like(query)
    options = _options(scale, is_causal, dropout_p, return_dmask=return_debug_mask)
    lse, state, unused, dmask = _forward(q, k, v, out.transpose(1, 2), (), options)
    return out, lse, None, None, q.shape[1], k.shape[1], state, unused, dmask


def _sdpa_backward(
    original: Original,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    dout, q, k, v, o = (x.transpose(-3, -2) for x in (grad_out, query, key, value, out))
    if query.dim() != 4 or cum_seq_q is not None or not _is_served(q, k, v, dropout_p):
        return original()
    options = _options(scale, is_causal, dropout_p)
    gradients = _backward(dout, q, k, v, o, logsumexp, (), philox_seed, options)
    inputs = (query, key, value)
    return tuple(_like(dx.transpose(1, 2), x) for dx, x in zip(gradients, inputs, strict=True))


def _flash_forward(
    original: Original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
    **rest: Any,
) -> Any:
    """``rest``: alibi_slopes, block_table and what later versions of torch add."""
    if (
        not _lengths_are_served(cum_seq_q, cum_seq_k)
        or query.dim() != (4 if cum_seq_q is None else 3)
        or (seqused_k is not None and cum_seq_q is None)
        or (return_debug_mask and dropout_p == 0.0)
        or any(value is not None for value in rest.values())
        or not _is_served(query, key, value, dropout_p)
    ):
        return original()
    lengths: tuple[Any, ...] = ()
    if cum_seq_q is not None:
        lengths = (cum_seq_q, cum_seq_k, None, seqused_k, None, max_q, max_k)
    options = _options(
        scale,
        is_causal,
        dropout_p,
        window_size_left,
        window_size_right,
        return_debug_mask,
        num_splits,
    )
    if out is None:
        out = torch.empty_like(query)
    return (out, *_forward(query, key, value, out, lengths, options))


def _flash_forward_inplace(original: Original, out: Tensor, *args: Any, **kwargs: Any) -> Any:
    results = _flash_forward(original, *args, out=out, **kwargs)
    return results[1] if isinstance(results, tuple) else results


def _flash_backward(
    original: Original,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **rest: Any,
) -> Any:
    if (
        not _lengths_are_served(cum_seq_q, cum_seq_k)
        or query.dim() != (4 if cum_seq_q is None else 3)
        or any(value is not None for value in rest.values())
        or not _is_served(query, key, value, dropout_p)
    ):
        return original()
    lengths: tuple[Any, ...] = ()
    if cum_seq_q is not None:
        lengths = (cum_seq_q, cum_seq_k, None, None, max_q, max_k)
    options = _options(scale, is_causal, dropout_p, window_size_left, window_size_right)
    gradients = _backward(grad_out, query, key, value, out, logsumexp, lengths, rng_state, options)
    inputs = (query, key, value)
    return tuple(_like(dx, x) for dx, x in zip(gradients, inputs, strict=True))


def _top_left(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """k, v and the window that give SDPA's causal mask, query i sees keys up to i.

    Keys past the last query are seen by none and left out; with fewer keys than queries the
    bottom-right diagonal is moved down by the difference.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if not is_causal:
        return k, v, (-1, -1)
    return k[:, :seqlen_q], v[:, :seqlen_q], (-1, max(seqlen_q - seqlen_k, 0))


def _cpu_forward(
    original: Original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    q, k, v = (x.transpose(-3, -2) for x in (query, key, value))
    if attn_mask is not None or dropout_p or query.dim() != 4 or not _is_served(q, k, v, 0.0):
        return original()
    out = torch.empty_like(query)
    k, v, window = _top_left(q, k, v, is_causal)
    options = _options(scale, False, 0.0, *window)
    lse = _forward(q, k, v, out.transpose(1, 2), (), options)[0]
    # Here torch has the heads last in memory.
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(
    original: Original,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    dout, q, k, v, o = (x.transpose(-3, -2) for x in (grad_out, query, key, value, out))
    if attn_mask is not None or dropout_p or query.dim() != 4 or not _is_served(q, k, v, 0.0):
        return original()
    seen_k, seen_v, window = _top_left(q, k, v, is_causal)
    options = _options(scale, False, 0.0, *window)
    dq, *gradients = _backward(dout, q, seen_k, seen_v, o, logsumexp, (), logsumexp, options)
    unseen = k.shape[1] - seen_k.shape[1]
    dk, dv = (torch.nn.functional.pad(dx, (0, 0, 0, 0, 0, unseen)) for dx in gradients)
    return tuple(dx.transpose(1, 2) for dx in (dq, dk, dv))


KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_inplace,
    "_flash_attention_backward": _flash_backward,
}
"""Name of the aten op -> ``function(original, *arguments of the op)``."""

CPU_KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
}
