"""flash-attn's undifferentiable functions: one forward or backward, buffers and dropout explicit.

Ring attention, diffusers and TransformerEngine build their own autograd on these. Names and order
of the arguments are flash-attn 2.8's; lse of a row without a visible key is -inf (flash-attn:
+inf).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _schema
from .._checks import last_dim_contiguous, last_dims_contiguous
from ..autograd import Options, is_deterministic
from ..errors import UnsupportedError

_fwd = _schema.op("fwd")
_bwd = _schema.op("bwd")
_bwd_preprocess = _schema.op("bwd_preprocess")
_varlen_fwd = _schema.op("varlen_fwd")
_varlen_bwd = _schema.op("varlen_bwd")

Forward = tuple[Tensor, Tensor, Tensor, Tensor]
"""out, softmax_lse, S_dmask (empty unless asked for), rng_state int64 [2]."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Forward:
    """Attention without gradient.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim].
        k: [batch, seqlen_k, num_heads_kv, head_dim].
        v: [batch, seqlen_k, num_heads_kv, head_dim_v].
        dropout_p: see flash_attn_func, as the other options.
        softmax_scale: see flash_attn_func.
        causal: see flash_attn_func.
        window_size_left: negative: unbounded.
        window_size_right: negative: unbounded.
        softcap: see flash_attn_func.
        alibi_slopes: see flash_attn_func.
        return_softmax: return S_dmask; only with dropout.

    Returns:
        See `Forward`.
    """
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, dropout_p
    )._replace(return_dmask=return_softmax and dropout_p > 0.0)
    rng_state = _rng_state(q, dropout_p)
    with torch.no_grad():
        out, lse, dmask = _fwd(
            *last_dims_contiguous(q, k, v), alibi_slopes, _used(rng_state, dropout_p), *options
        )
    return out, lse, dmask, rng_state


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> Forward:
    """The same for packed sequences; see flash_attn_varlen_func for the arguments.

    Raises:
        UnsupportedError: leftpad_k is given.
    """
    if leftpad_k is not None:
        raise UnsupportedError("leftpad_k: got a tensor, expected None; use cu_seqlens_k")
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, dropout_p
    )._replace(return_dmask=return_softmax and dropout_p > 0.0)
    rng_state = _rng_state(q, dropout_p)
    with torch.no_grad():
        out, lse, dmask = _varlen_fwd(
            *last_dims_contiguous(q, k, v),
            cu_seqlens_q,
            cu_seqlens_k,
            None,
            seqused_k,
            block_table,
            int(max_seqlen_q),
            int(max_seqlen_k),
            alibi_slopes,
            _used(rng_state, dropout_p),
            *options,
        )
    return out, lse, dmask, rng_state


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The gradients of `forward`, written into dq, dk and dv where they are given.

    ``out`` and ``softmax_lse`` may be those of a larger softmax of which k and v are a part, as in
    ring attention.

    Returns:
        softmax_d = rowsum(dout * out), fp32 [batch, num_heads_q, seqlen_q].
    """
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, dropout_p
    )
    tensors = [last_dim_contiguous(x) for x in (dout, q, k, v, out)]
    tail = (alibi_slopes, _used(rng_state, dropout_p), *options[:5])
    with torch.no_grad():
        gradients = _bwd(
            *tensors, softmax_lse.contiguous(), None, *tail, is_deterministic(deterministic)
        )
        _write(gradients, (dq, dk, dv))
        delta: Tensor = _bwd_preprocess(tensors[4], tensors[0], None)
    return delta


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """The same for packed sequences.

    Returns:
        softmax_d = rowsum(dout * out), fp32 [num_heads_q, total_q].
    """
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, dropout_p
    )
    tensors = [last_dim_contiguous(x) for x in (dout, q, k, v, out)]
    lengths = (cu_seqlens_q, cu_seqlens_k, None, None, int(max_seqlen_q), int(max_seqlen_k))
    tail = (alibi_slopes, _used(rng_state, dropout_p), *options[:5])
    with torch.no_grad():
        gradients = _varlen_bwd(
            *tensors,
            softmax_lse.contiguous(),
            None,
            *lengths,
            *tail,
            is_deterministic(deterministic),
        )
        _write(gradients, (dq, dk, dv))
        delta: Tensor = _bwd_preprocess(tensors[4], tensors[0], None)
    return delta


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int | None,
    window_size_right: int | None,
    softcap: float,
    dropout_p: float,
) -> Options:
    left = -1 if window_size_left is None else max(window_size_left, -1)
    right = -1 if window_size_right is None else max(window_size_right, -1)
    return Options(softmax_scale, left, 0 if causal else right, softcap, dropout_p)


def _rng_state(q: Tensor, dropout_p: float) -> Tensor:
    if dropout_p == 0.0:
        return torch.empty((2,), dtype=torch.int64, device=q.device)
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device)


def _used(rng_state: Tensor | None, dropout_p: float) -> Tensor | None:
    if dropout_p > 0.0 and rng_state is None:
        raise UnsupportedError(
            f"rng_state: got None with dropout_p={dropout_p}, expected what the forward returned"
        )
    return rng_state if dropout_p > 0.0 else None


def _write(gradients: Any, buffers: Any) -> None:
    for gradient, buffer in zip(gradients, buffers, strict=True):
        if buffer is not None:
            buffer.copy_(gradient)
