"""Gradients: the calls of the attention ops, through a torch.autograd.Function where one is needed.

The ops carry no autograd formula. ``attention`` and ``varlen_attention`` call them directly if no
input requires grad (a Function costs several microseconds), else through ``_Attention`` and
``_VarlenAttention``, whose backward is one op as well. Both outputs are differentiable: the
gradient of lse enters the backward as ``delta = rowsum(dout * out) - dlse``. An op that was refused
(FLASH_ATTN_EXT_FALLBACK=error) raises UnsupportedError here, whatever torch makes of it on the way.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _schema
from ._checks import last_dim_contiguous
from .backends import raise_refusal_behind
from .errors import UnsupportedError

_fwd = _schema.op("fwd")
_fwd_out = _schema.op("fwd_out")
_bwd = _schema.op("bwd")
_varlen_fwd = _schema.op("varlen_fwd")
_varlen_fwd_out = _schema.op("varlen_fwd_out")
_varlen_bwd = _schema.op("varlen_bwd")
_rotary = _schema.op("rotary")

_ALWAYS_DETERMINISTIC = os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == "1"

Forward = tuple[Tensor, Tensor, Tensor | None]
"""out, lse, dmask (None: empty)."""


class Options(NamedTuple):
    """The scalar arguments of the forward ops, in the order and with the defaults of the schemas.

    A softmax_scale of None is head_dim ** -0.5.
    """

    softmax_scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    return_dmask: bool = False
    num_splits: int = 0
    sm_margin: int = 0


PLAIN, CAUSAL = Options(), Options(window_right=0)


def _fwd_tail(alibi_slopes: Tensor | None, rng_state: Tensor | None, options: Options) -> Any:
    """The last arguments of the forward ops, without those at the end that are the defaults.

    Each argument costs the dispatcher 0.2 to 0.4 us.
    """
    if alibi_slopes is None and rng_state is None:
        if options == PLAIN:
            return ()
        if options[3:] == PLAIN[3:]:
            return (None, None, *options[:3])
    return (alibi_slopes, rng_state, *options)


def _bwd_tail(
    alibi_slopes: Tensor | None, rng_state: Tensor | None, options: Options, deterministic: bool
) -> Any:
    """As `_fwd_tail`, of the backward ops."""
    if not deterministic and alibi_slopes is None and rng_state is None:
        if options == PLAIN:
            return ()
        if options[3:] == PLAIN[3:]:
            return (None, None, *options[:3])
    return (alibi_slopes, rng_state, *options[:5], deterministic, options.sm_margin)


class Lengths(NamedTuple):
    """The length arguments of the varlen backward, in the order of its schema."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


def needs_grad(*inputs: Tensor) -> bool:
    """Whether a gradient for one of the inputs can be asked for."""
    if torch.is_grad_enabled():
        for x in inputs:
            if x.requires_grad:
                return True
    return False


def is_deterministic(deterministic: bool) -> bool:
    """Whether gradients have to be bitwise reproducible, for whatever reason."""
    return deterministic or _ALWAYS_DETERMINISTIC or torch.are_deterministic_algorithms_enabled()


def _new_rng_state(options: Options, device: torch.device) -> Tensor | None:
    """(seed, offset) of the dropout mask, drawn from torch's generator of the device.

    A device tensor filled by a torch op follows ``manual_seed``, activation checkpointing, CUDA
    graphs and ``torch.compile`` without help from here.
    """
    if options.dropout_p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def _output_gradient(dout: Tensor | None, out: Tensor) -> Tensor:
    """``dout`` in a form that the ops take; zero if only lse was used."""
    return torch.zeros_like(out) if dout is None else last_dim_contiguous(dout)


class _NoBackward(torch.autograd.Function):
    """Passes results on; asking for their gradient is an error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, reason: str, num_results: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.reason = reason
        return tuple(x.view_as(x) for x in tensors[:num_results])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedError(ctx.reason)


def without_gradient(
    reason: str, results: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """``results`` as they are; if an input requires grad, their backward raises ``reason``."""
    if not needs_grad(*inputs):
        return results
    passed: tuple[Tensor, ...] = _NoBackward.apply(  # type: ignore[no-untyped-call]
        reason, len(results), *results, *inputs
    )
    return passed


def _first_order_only(gradients: tuple[Tensor, ...], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """``gradients``, whose own backward (after ``create_graph=True``) is an error.

    torch's ``once_differentiable`` would not do: it looks at the gradients that come in, but not at
    the saved inputs, and passes silently over the derivative with respect to those. Compiled
    graphs refuse second derivatives themselves.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return without_gradient(
        "flash_attn_ext: got a second derivative, expected the first; it is not implemented, use "
        "torch.nn.functional.scaled_dot_product_attention with the math backend",
        gradients,
        tuple(x for x in inputs if x is not None),
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        rng_state: Tensor | None,
        options: Options,
        deterministic: bool,
    ) -> Any:
        out, lse, dmask = _fwd(q, k, v, *_fwd_tail(alibi_slopes, rng_state, options))
        ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, rng_state)
        ctx.options, ctx.deterministic = options, deterministic
        ctx.set_materialize_grads(False)
        if not options.return_dmask:
            return out, lse
        ctx.mark_non_differentiable(dmask)
        return out, lse, dmask

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, ddmask: None = None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, alibi_slopes, rng_state = ctx.saved_tensors
        tail = _bwd_tail(alibi_slopes, rng_state, ctx.options, ctx.deterministic)
        if tail or dlse is not None:
            tail = (None if dlse is None else dlse.contiguous(), *tail)
        try:
            gradients = _bwd(_output_gradient(dout, out), q, k, v, out, lse, *tail)
        except RuntimeError as error:
            raise_refusal_behind(error)
            raise
        return *_first_order_only(gradients, q, k, v, dout, dlse), None, None, None, None


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        alibi_slopes: Tensor | None,
        rng_state: Tensor | None,
        options: Options,
        deterministic: bool,
    ) -> Any:
        out, lse, dmask = _varlen_fwd(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            None,
            max_seqlen_q,
            max_seqlen_k,
            *_fwd_tail(alibi_slopes, rng_state, options),
        )
        ctx.save_for_backward(
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            alibi_slopes,
            rng_state,
        )
        ctx.max_seqlen_q, ctx.max_seqlen_k = max_seqlen_q, max_seqlen_k
        ctx.options, ctx.deterministic = options, deterministic
        ctx.set_materialize_grads(False)
        if not options.return_dmask:
            return out, lse
        ctx.mark_non_differentiable(dmask)
        return out, lse, dmask

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, ddmask: None = None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *lengths, alibi_slopes, rng_state = ctx.saved_tensors
        try:
            gradients = _varlen_bwd(
                _output_gradient(dout, out),
                q,
                k,
                v,
                out,
                lse,
                None if dlse is None else dlse.contiguous(),
                *lengths,
                ctx.max_seqlen_q,
                ctx.max_seqlen_k,
                *_bwd_tail(alibi_slopes, rng_state, ctx.options, ctx.deterministic),
            )
        except RuntimeError as error:
            raise_refusal_behind(error)
            raise
        return *_first_order_only(gradients, q, k, v, dout, dlse), *[None] * 10


class _RotaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seqlen_offsets: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        interleaved: bool,
        conjugate: bool,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, seqlen_offsets, cu_seqlens)
        ctx.max_seqlen, ctx.interleaved, ctx.conjugate = max_seqlen, interleaved, conjugate
        out: Tensor = _rotary(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, conjugate, False
        )
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        # A rotation's transpose is the rotation by the opposite angle.
        cos, sin, seqlen_offsets, cu_seqlens = ctx.saved_tensors
        dx = rotary(
            last_dim_contiguous(dout),
            cos,
            sin,
            seqlen_offsets,
            cu_seqlens,
            ctx.max_seqlen,
            ctx.interleaved,
            not ctx.conjugate,
        )
        return dx, *[None] * 7


_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_unwrap_if_dead = getattr(torch._C._functorch, "unwrap_if_dead", None)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` without most of its own cost, a quarter of the forward's.

    While no functorch transform is active, torch's ``apply`` does no more than this. What that is
    made of is private to torch: where it is missing, ``apply`` is called.
    """
    if (
        torch.compiler.is_compiling()
        or _transforms_are_active is None
        or _unwrap_if_dead is None
        or _transforms_are_active()
    ):
        return function.apply(*args)  # type: ignore[no-untyped-call]
    unwrapped = [_unwrap_if_dead(x) if type(x) is Tensor else x for x in args]
    return super(torch.autograd.Function, function).apply(*unwrapped)  # type: ignore[misc]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    options: Options,
    deterministic: bool,
    out: Tensor | None,
) -> Forward:
    """The fixed-length ops; ``out`` is written if given (then no input may require grad)."""
    rng_state = _new_rng_state(options, q.device)
    try:
        if out is not None:
            return out, *_fwd_out(q, k, v, out, *_fwd_tail(alibi_slopes, rng_state, options))
        if needs_grad(q, k, v):
            results: tuple[Tensor, ...] = _apply(
                _Attention,
                q,
                k,
                v,
                alibi_slopes,
                rng_state,
                options,
                is_deterministic(deterministic),
            )
            return results[0], results[1], results[2] if options.return_dmask else None
        result: Forward = _fwd(q, k, v, *_fwd_tail(alibi_slopes, rng_state, options))
        return result
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    options: Options,
    deterministic: bool,
    out: Tensor | None,
) -> Forward:
    """The varlen ops; ``out`` is written if given (then no input may require grad)."""
    rng_state = _new_rng_state(options, q.device)
    arguments = (
        lengths.cu_seqlens_q,
        lengths.cu_seqlens_k,
        lengths.seqused_q,
        lengths.seqused_k,
        page_table,
        lengths.max_seqlen_q,
        lengths.max_seqlen_k,
        *_fwd_tail(alibi_slopes, rng_state, options),
    )
    try:
        if page_table is None and out is None and needs_grad(q, k, v):
            results: tuple[Tensor, ...] = _apply(
                _VarlenAttention,
                q,
                k,
                v,
                *lengths,
                alibi_slopes,
                rng_state,
                options,
                is_deterministic(deterministic),
            )
            return results[0], results[1], results[2] if options.return_dmask else None
        if out is not None:
            return out, *_varlen_fwd_out(q, k, v, out, *arguments)
        out, lse, dmask = _varlen_fwd(q, k, v, *arguments)
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise
    if page_table is None:
        return out, lse, dmask
    out, lse = without_gradient(
        "page_table: got an input that requires grad, expected none; there is no backward through "
        "a paged cache, use torch.no_grad() or gather the keys",
        (out, lse),
        (q, k, v),
    )
    return out, lse, dmask


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    """The rotary op with its gradient."""
    arguments = (x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, conjugate)
    try:
        if needs_grad(x):
            rotated: Tensor = _RotaryEmbedding.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            rotated = _rotary(*arguments, False)
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise
    return rotated
