"""The ops of norms and cross-entropy with their gradients, and which tensors they are for.

On CUDA tensors that `takes` accepts, layer_norm.py and cross_entropy.py call these; everything else
is computed by their PyTorch operations. An op whose plan has no kernel after all (a hidden size
beyond its limit) falls back by itself and says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _load, _schema
from .._checks import last_dim_contiguous
from ..autograd import needs_grad, without_gradient
from ..backends import chosen_backend, raise_refusal_behind

_norm_fwd = _schema.op("norm_fwd")
_norm_bwd = _schema.op("norm_bwd")
_cross_entropy_fwd = _schema.op("cross_entropy_fwd")
_cross_entropy_bwd = _schema.op("cross_entropy_bwd")
_cross_entropy_bwd_ = _schema.op("cross_entropy_bwd_")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOADED = _load.status().binder_loaded


def takes(x: Tensor) -> bool:
    """Whether kernels may compute with ``x``."""
    return _LOADED and x.is_cuda and x.dtype in _DTYPES and chosen_backend() != "tiled"


def _first_order_only(
    gradients: tuple[Tensor | None, ...], *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """``gradients``, whose own backward (after ``create_graph=True``) is an error."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    passed = iter(
        without_gradient(
            "flash_attn_ext: got a second derivative of a norm or a loss, expected the first; it "
            "is not implemented in kernels, FLASH_ATTN_EXT_BACKEND=tiled has it",
            tuple(x for x in gradients if x is not None),
            tuple(x for x in inputs if x is not None),
        )
    )
    return tuple(None if x is None else next(passed) for x in gradients)


class NormOptions(NamedTuple):
    """What a norm does beside its tensors; see the schema of norm_fwd.

    ``return_sum``: the sum is a result.
    """

    eps: float
    dropout_p: float
    is_rms_norm: bool
    weight_offset: float
    return_sum: bool
    sum_in_fp32: bool


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rowscale: Tensor | None,
        rng_state: Tensor | None,
        options: NormOptions,
    ) -> Any:
        is_changed = not (residual is None and rowscale is None and rng_state is None)
        out, total, mean, rstd = _norm_fwd(
            x,
            residual,
            weight,
            bias,
            rowscale,
            rng_state,
            *options[:4],
            is_changed or options.return_sum,
            options.sum_in_fp32,
        )
        stored = total if is_changed or options.return_sum else x
        ctx.save_for_backward(stored, weight, rowscale, rng_state, mean, rstd)
        ctx.options, ctx.dtype, ctx.has_bias = options, x.dtype, bias is not None
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return (out, total) if options.return_sum else out

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        total, weight, rowscale, rng_state, mean, rstd = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(total, dtype=ctx.dtype)
        differs = rng_state is not None or rowscale is not None or total.dtype != ctx.dtype
        try:
            dx, dresidual, dweight, dbias = _norm_bwd(
                last_dim_contiguous(dout),
                total,
                None if dsum is None else last_dim_contiguous(dsum),
                weight,
                rowscale,
                rng_state,
                mean,
                rstd,
                *ctx.options[1:4],
                ctx.has_bias,
                ctx.has_residual and differs,
            )
        except RuntimeError as error:
            raise_refusal_behind(error)
            raise
        of_residual = None
        if ctx.has_residual:
            of_residual = dresidual if differs else dx
        gradients = (dx, of_residual, dweight, dbias if ctx.has_bias else None)
        return *_first_order_only(gradients, total, weight, dout, dsum), None, None, None


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rowscale: Tensor | None,
    options: NormOptions,
) -> tuple[Tensor, Tensor | None]:
    """The norm ops with their gradient.

    Args:
        x: [rows, hidden_size].
        residual: [rows, hidden_size], x's type or fp32.
        weight: [hidden_size], x's type or fp32.
        bias: [hidden_size], weight's type.
        rowscale: fp32 [rows], contiguous, without gradient.
        options: see NormOptions.

    Returns:
        out, and the sum if ``options.return_sum``.
    """
    rng_state = None
    if options.dropout_p > 0.0:
        rng_state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    tensors = (x, residual, weight, bias, rowscale, rng_state)
    try:
        if needs_grad(*(t for t in tensors if t is not None)):
            results = _Norm.apply(*tensors, options)  # type: ignore[no-untyped-call]
            return results if options.return_sum else (results, None)
        out, total, _, _ = _norm_fwd(*tensors, *options)
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise
    return out, total if options.return_sum else None


class LossOptions(NamedTuple):
    """The numbers of the cross-entropy ops, in the order of their schemas."""

    label_smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        given_lse: Tensor | None,
        options: LossOptions,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        loss, z_loss, lse = _cross_entropy_fwd(logits, labels, given_lse, *options)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options, ctx.inplace_backward = options, inplace_backward
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, dz_loss: None = None) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        try:
            # Compiled graphs plan their memory themselves.
            if ctx.inplace_backward and not torch.compiler.is_compiling():
                dlogits = logits.detach()
                _cross_entropy_bwd_(dloss, dlogits, labels, lse, *ctx.options)
            else:
                dlogits = _cross_entropy_bwd(dloss, logits, labels, lse, *ctx.options)
        except RuntimeError as error:
            raise_refusal_behind(error)
            raise
        return *_first_order_only((dlogits,), logits, dloss), None, None, None, None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    given_lse: Tensor | None,
    options: LossOptions,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy ops with their gradient.

    Args:
        logits: [rows, vocabulary], last dimension contiguous.
        labels: [rows], int64 or int32.
        given_lse: fp32 [rows], contiguous, without gradient.
        options: see LossOptions.
        inplace_backward: the backward overwrites logits.

    Returns:
        loss and z_loss.
    """
    try:
        if needs_grad(logits):
            losses: tuple[Tensor, Tensor] = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
                logits, labels, given_lse, options, inplace_backward
            )
            return losses
        loss, z_loss, _ = _cross_entropy_fwd(logits, labels, given_lse, *options)
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise
    return loss, z_loss
