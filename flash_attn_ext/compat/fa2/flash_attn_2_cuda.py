"""The functions of flash-attn's compiled module, for code that calls them directly.

Argument order and results are those of version 2.8; ``gen_`` must be None, as flash-attn's own
callers have it: random numbers come from torch's generator of the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_ext import UnsupportedError, flash_attn_with_kvcache
from flash_attn_ext.compat import blocks


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: Any = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]."""
    _no_generator(gen_)
    results = blocks.forward(
        q,
        k,
        v,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes_,
        return_softmax,
    )
    return _into(out_, results)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: Any = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of packed sequences."""
    _no_generator(gen_)
    results = blocks.varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes_,
        return_softmax,
        block_table_,
        leftpad_k_,
        seqused_k,
    )
    return _into(out_, results)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: Any = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d]."""
    _no_generator(gen_)
    gradients = _buffers((dq_, dk_, dv_), (q, k, v))
    softmax_d = blocks.backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        *gradients,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes_,
        deterministic,
        rng_state,
    )
    return [*gradients, softmax_d]


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: Any = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of packed sequences."""
    _no_generator(gen_)
    gradients = _buffers((dq_, dk_, dv_), (q, k, v))
    softmax_d = blocks.varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        *gradients,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes_,
        deterministic,
        rng_state,
    )
    return [*gradients, softmax_d]


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k_: Tensor | None,
    v_: Tensor | None,
    seqlens_k_: Tensor | None,
    rotary_cos_: Tensor | None,
    rotary_sin_: Tensor | None,
    cache_batch_idx_: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    out_: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """[out, softmax_lse]."""
    results = flash_attn_with_kvcache(
        q,
        kcache,
        vcache,
        k_,
        v_,
        rotary_cos_,
        rotary_sin_,
        seqlens_k_,
        cache_batch_idx_,
        leftpad_k_,
        block_table_,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        is_rotary_interleaved,
        alibi_slopes_,
        num_splits,
        return_softmax_lse=True,
    )
    return _into(out_, results)


def _no_generator(gen_: Any) -> None:
    if gen_ is not None:
        raise UnsupportedError("gen_: got a generator, expected None; use torch.manual_seed")


def _into(out: Tensor | None, results: tuple[Tensor, ...]) -> list[Tensor]:
    return list(results) if out is None else [out.copy_(results[0]), *results[1:]]


def _buffers(
    given: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        torch.empty_like(x) if buffer is None else buffer
        for buffer, x in zip(given, inputs, strict=True)
    )
    return dq, dk, dv
