"""Attention over whole sequences: fixed length, variable length, and packed forms of both.

Positional parameters are those of flash-attn 2, in its order. The words of flash-attn 3 and of
vLLM's fork follow as keywords. ``flash_attn_func`` documents the options; the other functions
describe what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _value_checks
from .autograd import CAUSAL, PLAIN, Lengths, Options, attention, varlen_attention
from .errors import UnsupportedError
from .merge import apply_sink

AttentionResult = Any
"""``out``, or a tuple that begins with it if return_softmax_lse or return_attn_probs is set.

Not a union: every caller knows which one it gets, and would have to convince its type checker.
"""

WindowSize = Sequence[int | None] | None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    out: Tensor | None = None,
    attention_chunk: int = 0,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> AttentionResult:
    """Exact attention ``softmax(q k^T * softmax_scale + mask) v`` without storing the score matrix.

    The diagonal of ``causal`` and ``window_size`` is aligned to the bottom right: the last query
    sees the last key. Query i sees key j iff

        i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right

    where ``causal=True`` means right = 0. Kept scores (1) for causal attention:

        seqlen_q = 2, seqlen_k = 5        seqlen_q = 5, seqlen_k = 2
            1 1 1 1 0                         0 0
            1 1 1 1 1                         0 0
                                              0 0
                                              1 0
                                              1 1

    and with ``window_size=(1, 0)``, so that a query sees its own position and one key before it:

            0 0 1 1 0                         0 0
            0 0 0 1 1                         0 0
                                              0 0
                                              1 0
                                              1 1

    A row that sees no key (the three rows of zeros) gives out = 0, lse = -inf and gradients of 0.
    Lengths of 0 and an empty batch are valid.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim], fp16, bf16, fp32 or fp64. head_dim is 1 to 256;
            multiples of 8 are never copied. Any strides: a last dimension that is not contiguous is
            copied once.
        k: [batch, seqlen_k, num_heads_kv, head_dim]. num_heads_q is a multiple of num_heads_kv;
            query head h uses key/value head ``h // (num_heads_q // num_heads_kv)``.
        v: [batch, seqlen_k, num_heads_kv, head_dim_v]; head_dim_v may differ from head_dim.
        dropout_p: probability in [0, 1) of dropping an attention weight; 0.0 at inference. The mask
            follows ``torch.manual_seed``. The keep probability is a multiple of 1/256, and what is
            kept is scaled by its exact inverse.
        softmax_scale: multiplies q k^T; default head_dim ** -0.5.
        causal: mask the keys after each query, as drawn above.
        window_size: (left, right), the keys that a query sees around its position. None or any
            negative number = unbounded. The bounds are inclusive: a window of W keys that ends at
            the query is (W - 1, 0).
        softcap: if > 0, scores become ``softcap * tanh(score / softcap)``, after the scale and
            before mask and bias.
        alibi_slopes: fp32 [num_heads_q] or [batch, num_heads_q]; the bias
            ``-slope * abs(i + seqlen_k - seqlen_q - j)`` is added to scaled scores. No gradient.
        deterministic: gradients are bitwise the same from run to run, at some cost of time and
            memory. Also in force with FLASH_ATTENTION_DETERMINISTIC=1 in the environment and under
            ``torch.use_deterministic_algorithms(True)``. The forward always is.
        return_attn_probs: also return lse and S_dmask, see below. For tests.
        return_softmax_lse: also return lse. Its gradient is honoured.
        s_aux: [num_heads_q] fp16, bf16 or fp32: attention sinks, one more logit per head that takes
            part in the softmax and has no value. Differentiable. It is counted in lse.
        learnable_sink: another word for s_aux.
        num_splits: number of parts that the keys are split into on a GPU; 0 = chosen by the plan.
        pack_gqa: accepted for flash-attn 3's callers; the plan decides.
        sm_margin: number of multiprocessors that are left free for other work.
        out: [batch, seqlen_q, num_heads_q, head_dim_v], written and returned. No input may require
            grad then.
        attention_chunk: must be 0.
        qv: must be None.
        q_descale: must be None.
        k_descale: must be None.
        v_descale: must be None.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim_v] in q's dtype. With ``return_softmax_lse``
        (out, lse): lse [batch, num_heads_q, seqlen_q], fp32 (fp64 for fp64), natural logarithm of
        the row's sum of exp(score). With ``return_attn_probs`` (out, lse, S_dmask): S_dmask
        [batch, num_heads_q, seqlen_q, seqlen_k], both lengths rounded up to 128, holds the
        probabilities, negative (-0.0 included) where dropped; without dropout it is empty.

    Raises:
        UnsupportedError: well-formed inputs that nothing here computes.
        ValueError: inputs that contradict each other.
        TypeError: arguments of a wrong Python type.

    Example:
        >>> q = torch.randn(2, 1024, 16, 64, dtype=torch.bfloat16)
        >>> k = v = torch.randn(2, 1024, 4, 64, dtype=torch.bfloat16)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 1024, 16, 64])
    """
    _checks.unsupported(attention_chunk, qv, q_descale, k_descale, v_descale)
    _checks.fixed(q, k, v)
    options = _options(
        softmax_scale,
        causal,
        window_size,
        softcap,
        dropout_p,
        return_attn_probs,
        num_splits,
        sm_margin,
    )
    if alibi_slopes is not None:
        alibi_slopes = _checks.alibi(alibi_slopes, q, q.shape[0])
    sink = _sink(s_aux, learnable_sink, q, return_attn_probs)
    if out is not None:
        _checks.output(out, q, v.shape[-1], k, v, sink)
    q, k, v = _checks.last_dims_contiguous(q, k, v)
    result = attention(q, k, v, alibi_slopes, options, deterministic, out)
    return _result(*result, sink, out is not None, return_softmax_lse, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    out: Tensor | None = None,
    attention_chunk: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> AttentionResult:
    """flash_attn_func with keys and values in one tensor, whose gradient is one tensor as well.

    ``kv`` is [batch, seqlen_k, 2, num_heads_kv, head_dim]. The other arguments, the result and the
    errors are those of flash_attn_func.
    """
    _checks.kv_packed("kv", kv, varlen=False)
    k, v = kv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_softmax_lse=return_softmax_lse,
        s_aux=s_aux,
        learnable_sink=learnable_sink,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        out=out,
        attention_chunk=attention_chunk,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    num_heads_q: int | None = None,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    out: Tensor | None = None,
    attention_chunk: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> AttentionResult:
    """flash_attn_func with everything in one tensor, whose gradient is one tensor as well.

    ``qkv`` is [batch, seqlen, 3, num_heads, head_dim]; or, with ``num_heads_q``,
    [batch, seqlen, num_heads_q + 2 * num_heads_kv, head_dim]: the heads of q, of k and of v, one
    after the other. The other arguments, the result and the errors are those of flash_attn_func.
    """
    q, k, v = _unpack(qkv, num_heads_q, varlen=False)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_softmax_lse=return_softmax_lse,
        s_aux=s_aux,
        learnable_sink=learnable_sink,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        out=out,
        attention_chunk=attention_chunk,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    out: Tensor | None = None,
    attention_chunk: int = 0,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> AttentionResult:
    """Attention within each of several sequences that are packed one after the other.

    Sequence b has the query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the key rows
    ``cu_seqlens_k[b]`` to ``cu_seqlens_k[b + 1]``. Masks refer to its own lengths. Sequences of
    length 0 are valid.

    Args:
        q: [total_q, num_heads_q, head_dim].
        k: [total_k, num_heads_kv, head_dim]; with page_table
            [num_pages, page_size, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v]; with page_table
            [num_pages, page_size, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32 [batch + 1], ascending from 0.
        cu_seqlens_k: int32 [batch + 1], ascending from 0. None with page_table and seqused_k.
        max_seqlen_q: the longest query sequence or more. A 0-dim tensor is read, which on a GPU
            waits for it.
        max_seqlen_k: the longest key sequence or more.
        dropout_p: see flash_attn_func.
        softmax_scale: see flash_attn_func.
        causal: see flash_attn_func.
        window_size: see flash_attn_func.
        softcap: see flash_attn_func.
        alibi_slopes: see flash_attn_func.
        deterministic: see flash_attn_func.
        return_attn_probs: see flash_attn_func; S_dmask is [batch, num_heads_q, max_seqlen_q,
            max_seqlen_k], both lengths rounded up to 128.
        block_table: another word for page_table.
        seqused_q: int32 [batch]: only the first seqused_q[b] query rows are computed; the rows
            after them are 0 in out and -inf in lse.
        seqused_k: int32 [batch]: only the first seqused_k[b] keys are seen.
        page_table: int32 [batch, max_pages]: key j of sequence b is at
            ``k[page_table[b, j // page_size], j % page_size]``. Any page size. Entries past the
            length are never read. There is no backward.
        return_softmax_lse: see flash_attn_func.
        s_aux: see flash_attn_func.
        learnable_sink: see flash_attn_func.
        scheduler_metadata: what get_scheduler_metadata returned; not needed.
        num_splits: see flash_attn_func.
        pack_gqa: see flash_attn_func.
        sm_margin: see flash_attn_func.
        out: [total_q, num_heads_q, head_dim_v]; see flash_attn_func.
        attention_chunk: must be 0.
        qv: must be None.
        q_descale: must be None.
        k_descale: must be None.
        v_descale: must be None.

    Returns:
        As flash_attn_func, with out [total_q, num_heads_q, head_dim_v] and lse
        [num_heads_q, total_q].

    Raises:
        UnsupportedError: as flash_attn_func; and in a backward through page_table.
        ValueError: as flash_attn_func. The values of length tensors and of page_table are checked
            for CPU tensors, and for CUDA tensors with FLASH_ATTN_EXT_DEBUG=1 in the environment, as
            those of flash_attn_with_kvcache.
        TypeError: as flash_attn_func.
    """
    _checks.unsupported(attention_chunk, qv, q_descale, k_descale, v_descale)
    page_table = _checks.one_of("page_table", page_table, "block_table", block_table)
    lengths = Lengths(
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        _checks.max_seqlen("max_seqlen_q", max_seqlen_q),
        _checks.max_seqlen("max_seqlen_k", max_seqlen_k),
    )
    _checks.varlen(q, k, v, page_table, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    if _checks.values_readable(cu_seqlens_q):
        _value_checks.varlen(q.shape[0], k.shape, page_table, *lengths)
    options = _options(
        softmax_scale,
        causal,
        window_size,
        softcap,
        dropout_p,
        return_attn_probs,
        num_splits,
        sm_margin,
    )
    if alibi_slopes is not None:
        alibi_slopes = _checks.alibi(alibi_slopes, q, cu_seqlens_q.shape[0] - 1)
    sink = _sink(s_aux, learnable_sink, q, return_attn_probs)
    if out is not None:
        _checks.output(out, q, v.shape[-1], k, v, sink)
    q, k, v = _checks.last_dims_contiguous(q, k, v)
    result = varlen_attention(
        q, k, v, lengths, page_table, alibi_slopes, options, deterministic, out
    )
    return _result(*result, sink, out is not None, return_softmax_lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    out: Tensor | None = None,
    attention_chunk: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> AttentionResult:
    """flash_attn_varlen_func with keys and values in one tensor, whose gradient is one tensor.

    ``kv`` is [total_k, 2, num_heads_kv, head_dim]. The other arguments, the result and the errors
    are those of flash_attn_varlen_func.
    """
    _checks.kv_packed("kv", kv, varlen=True)
    k, v = kv.unbind(-3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        return_softmax_lse=return_softmax_lse,
        s_aux=s_aux,
        learnable_sink=learnable_sink,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        out=out,
        attention_chunk=attention_chunk,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    num_heads_q: int | None = None,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    out: Tensor | None = None,
    attention_chunk: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> AttentionResult:
    """flash_attn_varlen_func with everything in one tensor, whose gradient is one tensor as well.

    ``qkv`` is [total, 3, num_heads, head_dim]; or, with ``num_heads_q``,
    [total, num_heads_q + 2 * num_heads_kv, head_dim]: the heads of q, of k and of v, one after the
    other. ``cu_seqlens`` and ``max_seqlen`` serve queries and keys. The other arguments, the result
    and the errors are those of flash_attn_varlen_func.
    """
    q, k, v = _unpack(qkv, num_heads_q, varlen=True)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_softmax_lse=return_softmax_lse,
        s_aux=s_aux,
        learnable_sink=learnable_sink,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        out=out,
        attention_chunk=attention_chunk,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: WindowSize,
    softcap: float,
    dropout_p: float,
    return_attn_probs: bool,
    num_splits: int,
    sm_margin: int,
) -> Options:
    """Checked scalars."""
    if softmax_scale is None and _is_plain(window_size, softcap, dropout_p, num_splits, sm_margin):
        return CAUSAL if causal else PLAIN
    softmax_scale, softcap, dropout_p = _checks.scores(softmax_scale, softcap, dropout_p)
    window_left, window_right = _checks.window(causal, window_size)
    _checks.splits(num_splits, sm_margin)
    return Options(
        softmax_scale,
        window_left,
        window_right,
        softcap,
        dropout_p,
        # As in flash-attn: who asks for probabilities without dropout mostly wants lse, and would
        # pay seqlen_q * seqlen_k elements for it.
        return_attn_probs and dropout_p > 0.0,
        num_splits,
        sm_margin,
    )


def _is_plain(
    window_size: Any, softcap: Any, dropout_p: Any, num_splits: Any, sm_margin: Any
) -> bool:
    """True only if all of these have their types and mean what is the default: most calls."""
    if (
        type(softcap) is not float
        or type(dropout_p) is not float
        or type(num_splits) is not int
        or type(sm_margin) is not int
        or softcap != 0.0
        or dropout_p != 0.0
        or num_splits != 0
        or sm_margin != 0
    ):
        return False
    if type(window_size) is not tuple or len(window_size) != 2:
        return window_size is None
    left, right = window_size
    return type(left) is int and type(right) is int and left < 0 and right < 0


def _sink(
    s_aux: Tensor | None, learnable_sink: Tensor | None, q: Tensor, return_attn_probs: bool
) -> Tensor | None:
    sink = _checks.one_of("s_aux", s_aux, "learnable_sink", learnable_sink)
    if sink is not None:
        _checks.sink(sink, q)
        if return_attn_probs:
            raise UnsupportedError(
                "return_attn_probs: got True with s_aux, expected False; the probabilities would "
                "not contain the sink, ask for return_softmax_lse instead"
            )
    return sink


def _unpack(qkv: Tensor, num_heads_q: int | None, varlen: bool) -> Sequence[Tensor]:
    """q, k, v as views. Both kinds of split have a backward that fills one buffer."""
    _checks.packed("qkv", qkv, num_heads_q, varlen)
    if num_heads_q is None:
        return qkv.unbind(-3)
    num_heads_kv = (qkv.shape[-2] - num_heads_q) // 2
    return torch.split(qkv, [num_heads_q, num_heads_kv, num_heads_kv], dim=-2)


def _result(
    out: Tensor,
    lse: Tensor,
    dmask: Tensor | None,
    sink: Tensor | None,
    is_given: bool,
    return_softmax_lse: bool,
    return_attn_probs: bool,
) -> AttentionResult:
    """Applies the sink and picks the return value; ``is_given``: out is the caller's buffer."""
    if sink is not None:
        with_sink, lse = apply_sink(out, lse, sink)
        out = out.copy_(with_sink) if is_given else with_sink
    if return_attn_probs:
        return out, lse, out.new_empty([0]) if dmask is None else dmask
    return (out, lse) if return_softmax_lse else out
