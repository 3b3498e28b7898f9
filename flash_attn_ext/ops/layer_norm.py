"""LayerNorm and RMSNorm with residual and dropout, under flash-attn's names.

One function, `layer_norm_fn`, has it all::

    sum = dropout(x * rowscale) + dropout(x1) + residual        in fp32
    out = normalise(sum) * weight + bias                        and out1 with weight1, bias1

The others are its forms. On CUDA tensors kernels compute it, forward and backward, where one
summand is normalised to one result in x's type; PyTorch operations compute the rest, and everything
on other devices. Everything is differentiable, what kernels compute once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import last_dim_contiguous, message
from ..errors import UnsupportedError
from . import _kernels

NormResult = Any
"""A tensor, or a tuple that begins with it; see `layer_norm_fn`."""


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> NormResult:
    """Normalises the last dimension of a sum.

    Args:
        x: [..., hidden_size].
        weight: [hidden_size].
        bias: [hidden_size], or None.
        residual: as x, any floating type; added after dropout.
        x1: as x; a second summand. Not with rowscale.
        weight1: [hidden_size]: normalise to a second result as well.
        bias1: [hidden_size], or None.
        eps: added to the variance, or to the mean square.
        dropout_p: probability of dropping an element of x and x1.
        rowscale: x without its last dimension; multiplies the rows of x.
        prenorm: also return the sum, for the next layer's residual.
        residual_in_fp32: without a residual, return the sum in fp32 rather than in x's type. With
            one, it has the residual's type.
        zero_centered_weight: weight and weight1 are stored less 1.
        is_rms_norm: RMSNorm, arXiv:1910.07467: neither a mean is subtracted.
        return_dropout_mask: also return what was kept, bool, of x and of x1 (None without).
        out_dtype: of the result; default x's.
        out: written and returned.
        residual_out: written, and returned as the sum.

    Returns:
        out; with weight1 (out, out1). Behind them the sum if ``prenorm``, then the two masks if
        ``return_dropout_mask``.

    Raises:
        UnsupportedError: x1 with rowscale.
    """
    if x1 is not None and rowscale is not None:
        raise UnsupportedError(message("rowscale", "a tensor with x1", "None"))
    plain = x1 is None and weight1 is None and out is None and residual_out is None
    if (
        plain
        and not return_dropout_mask
        and (out_dtype is None or out_dtype == x.dtype)
        and dropout_p < 1.0
        and _kernels_take(x, weight, residual, rowscale)
    ):
        options = _kernels.NormOptions(
            eps, dropout_p, is_rms_norm, float(zero_centered_weight), prenorm, residual_in_fp32
        )
        return _by_kernels(x, weight, bias, residual, rowscale, options)
    mask, total = _dropped(x if rowscale is None else x * rowscale[..., None], dropout_p)
    mask1 = None
    if x1 is not None:
        mask1, other = _dropped(x1, dropout_p)
        total = total + other
    if residual is not None:
        total = total + residual.to(total.dtype)
    normal = _normalised(total, eps, is_rms_norm)
    results = [_scaled(normal, weight, bias, zero_centered_weight).to(out_dtype or x.dtype)]
    if out is not None:
        results = [out.copy_(results[0])]
    if weight1 is not None:
        other = _scaled(normal, weight1, bias1, zero_centered_weight)
        results.append(other.to(out_dtype or x.dtype))
    if prenorm:
        of_sum = torch.float32 if residual_in_fp32 else x.dtype
        total = total.to(of_sum if residual is None else residual.dtype)
        results.append(total if residual_out is None else residual_out.copy_(total))
    if return_dropout_mask:
        return *results, mask, mask1
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> NormResult:
    """layer_norm_fn with is_rms_norm."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """LayerNorm of [..., hidden_size], without anything else."""
    result: Tensor = layer_norm_fn(x, weight, bias, eps=epsilon)
    return result


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of [..., hidden_size], without anything else."""
    result: Tensor = rms_norm_fn(x, weight, None, eps=epsilon)
    return result


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    is_rms_norm: bool = False,
) -> NormResult:
    """layer_norm_fn in the form of flash-attn's older function.

    ``layerscale`` [hidden_size] multiplies x0. Returns out; behind it the sum if ``prenorm``, then
    the mask if ``return_dropout_mask``.
    """
    results = layer_norm_fn(
        x0 if layerscale is None else x0 * layerscale,
        weight,
        bias,
        residual,
        eps=epsilon,
        dropout_p=dropout_p,
        rowscale=rowscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_dropout_mask=return_dropout_mask,
        out_dtype=x0.dtype,
    )
    return results[:-1] if return_dropout_mask else results


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> NormResult:
    """dropout_add_layer_norm with RMSNorm."""
    return dropout_add_layer_norm(
        x0,
        residual,
        weight,
        bias,
        dropout_p,
        epsilon,
        rowscale,
        layerscale,
        prenorm,
        residual_in_fp32,
        return_dropout_mask,
        is_rms_norm=True,
    )


class _DropoutAddNorm(nn.Module):
    """Parameters of the modules below."""

    is_rms_norm: bool

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes weight, 1, and for LayerNorm bias, 0.

        Args:
            hidden_size: of the last dimension.
            prenorm: return the sum too.
            p: dropout probability, while training.
            eps: see layer_norm_fn.
            residual_in_fp32: see layer_norm_fn.
            device: of the parameters.
            dtype: of the parameters.
        """
        super().__init__()
        self.prenorm, self.p, self.eps = prenorm, p, eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        if self.is_rms_norm:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> NormResult:
        """See dropout_add_layer_norm."""
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=self.is_rms_norm,
        )


class DropoutAddLayerNorm(_DropoutAddNorm):
    """Dropout, residual, LayerNorm."""

    is_rms_norm = False


class DropoutAddRMSNorm(_DropoutAddNorm):
    """Dropout, residual, RMSNorm."""

    is_rms_norm = True


class RMSNorm(nn.Module):
    """RMSNorm with residual and dropout, as in flash-attn's ``ops.triton.layer_norm``."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes weight, 1 (0 with zero_centered_weight).

        Args:
            hidden_size: of the last dimension.
            eps: see layer_norm_fn.
            dropout_p: while training.
            zero_centered_weight: see layer_norm_fn.
            device: of the weight.
            dtype: of the weight.
        """
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        value = 0.0 if zero_centered_weight else 1.0
        self.weight = nn.Parameter(torch.full((hidden_size,), value, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> NormResult:
        """See rms_norm_fn."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def _kernels_take(
    x: Tensor, weight: Tensor, residual: Tensor | None, rowscale: Tensor | None
) -> bool:
    """Whether the norm ops may compute a sum of x and a residual."""
    if not _kernels.takes(x) or weight.shape != x.shape[-1:]:
        return False
    if residual is not None:
        if residual.shape != x.shape or residual.dtype not in (x.dtype, torch.float32):
            return False
    return rowscale is None or (rowscale.shape == x.shape[:-1] and not rowscale.requires_grad)


def _by_kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rowscale: Tensor | None,
    options: _kernels.NormOptions,
) -> NormResult:
    """`layer_norm_fn` through the norm ops."""
    rows = last_dim_contiguous(x.reshape(-1, x.shape[-1]))
    if residual is not None:
        residual = last_dim_contiguous(residual.reshape(rows.shape))
    if rowscale is not None:
        rowscale = rowscale.reshape(-1).float().contiguous()
    types = {weight.dtype if bias is None else bias.dtype, weight.dtype}
    if len(types) > 1 or not types <= {x.dtype, torch.float32}:
        weight, bias = weight.float(), None if bias is None else bias.float()
    # What the sum is without being computed.
    is_x = residual is None and rowscale is None and options.dropout_p == 0.0
    is_x = is_x and not (options.sum_in_fp32 and x.dtype != torch.float32)
    return_sum = options.return_sum and not is_x
    out, total = _kernels.norm(
        rows,
        residual,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        rowscale,
        options._replace(return_sum=return_sum),
    )
    if not options.return_sum:
        return out.view(x.shape)
    return out.view(x.shape), x if total is None else total.view(x.shape)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _dropped(x: Tensor, dropout_p: float) -> tuple[Tensor | None, Tensor]:
    """What is kept (None: everything), and x in fp32 with the rest 0."""
    if dropout_p == 0.0:
        return None, _upcast(x)
    mask = torch.rand_like(x, dtype=torch.float32) >= dropout_p
    return mask, torch.where(mask, _upcast(x) / (1.0 - dropout_p), 0.0)


def _normalised(x: Tensor, eps: float, is_rms_norm: bool) -> Tensor:
    if not is_rms_norm:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _scaled(x: Tensor, weight: Tensor, bias: Tensor | None, zero_centered_weight: bool) -> Tensor:
    weight = _upcast(weight) + 1.0 if zero_centered_weight else _upcast(weight)
    return x * weight if bias is None else x * weight + _upcast(bias)
