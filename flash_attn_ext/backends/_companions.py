"""The ops beside attention in PyTorch operations: LayerNorm, RMSNorm and cross-entropy.

As in torch_tiled.py, whose functions these are for `_schema`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _philox
from . import note_fallback


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _note(op: str, x: Tensor) -> None:
    if x.numel() > 0:  # kernels are not started for nothing
        note_fallback(op, x)


def _kept(rng_state: Tensor | None, x: Tensor, dropout_p: float) -> Tensor | float:
    """What dropout multiplies the elements of ``x`` [rows, hidden_size] with."""
    if rng_state is None:
        return 1.0
    mask = _philox.row_keep_mask(rng_state, x.shape[0], x.shape[1], dropout_p)
    return mask.to(_wide(x).dtype) * _philox.row_keep_scale(dropout_p)


def norm_fwd(
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
    """Returns out, sum, mean, rstd."""
    _note("norm_fwd", x)
    total = _wide(x)
    if rowscale is not None:
        total = total * rowscale[:, None]
    total = total * _kept(rng_state, x, dropout_p)
    if residual is not None:
        total = total + residual.to(total.dtype)
    mean = total.new_empty(0) if is_rms_norm else total.mean(-1)
    centred = total if is_rms_norm else total - mean[:, None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    out = centred * rstd[:, None] * (_wide(weight) + weight_offset)
    if bias is not None:
        out = out + _wide(bias)
    stored = total.new_empty(0)
    if store_sum:
        stored = total.clone() if total is x else total
    of_sum = torch.float32 if store_sum and sum_in_fp32 else x.dtype
    stored = stored.to(of_sum if residual is None else residual.dtype)
    return out.to(x.dtype).contiguous(), stored.contiguous(), mean, rstd


def norm_bwd(
    dout: Tensor,
    sum: Tensor,
    dsum: Tensor | None,
    weight: Tensor,
    rowscale: Tensor | None,
    rng_state: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    is_rms_norm: bool,
    weight_offset: float,
    has_bias: bool,
    separate_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dresidual, dweight, dbias."""
    _note("norm_bwd", dout)
    wide, total = _wide(dout), _wide(sum)
    normal = (total if is_rms_norm else total - mean[:, None]) * rstd[:, None]
    dweight = (wide * normal).sum(0).to(weight.dtype)
    dbias = (wide.sum(0) if has_bias else wide.new_empty(0)).to(weight.dtype)
    g = wide * (_wide(weight) + weight_offset)
    dtotal = g - normal * (g * normal).mean(-1, keepdim=True)
    if not is_rms_norm:
        dtotal = dtotal - g.mean(-1, keepdim=True)
    dtotal = dtotal * rstd[:, None]
    if dsum is not None:
        dtotal = dtotal + _wide(dsum)
    dx = dtotal * _kept(rng_state, dout, dropout_p)
    if rowscale is not None:
        dx = dx * rowscale[:, None]
    dresidual = dtotal.to(sum.dtype) if separate_residual else sum.new_empty(0)
    return dx.to(dout.dtype).contiguous(), dresidual.contiguous(), dweight, dbias


def cross_entropy_fwd(
    logits: Tensor,
    labels: Tensor,
    given_lse: Tensor | None,
    label_smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, z_loss, lse."""
    _note("cross_entropy_fwd", logits)
    scores = _wide(logits) * logit_scale
    ignored = labels == ignore_index
    picked = scores.gather(-1, labels.long().masked_fill(ignored, 0)[:, None]).squeeze(-1)
    lse = scores.logsumexp(-1) if given_lse is None else given_lse.to(scores.dtype, copy=True)
    loss = lse - (1.0 - label_smoothing) * picked
    if label_smoothing != 0.0:
        loss = loss - label_smoothing * scores.mean(-1)
    z_loss = (lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
    return loss.masked_fill(ignored, 0.0) + z_loss, z_loss, lse.masked_fill(ignored, 0.0)


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
) -> Tensor:
    """Returns dlogits."""
    _note("cross_entropy_bwd", logits)
    scores = _wide(logits) * logit_scale
    ignored = labels == ignore_index
    gradient = torch.exp(scores - lse[:, None]) * (1.0 + 2.0 * lse_square_scale * lse)[:, None]
    gradient = gradient - label_smoothing / logits.shape[-1]
    index = labels.long().masked_fill(ignored, 0)[:, None]
    picked = torch.full_like(index, label_smoothing - 1.0, dtype=gradient.dtype)
    gradient = gradient.scatter_add(-1, index, picked) * (dloss * logit_scale)[:, None]
    return gradient.masked_fill(ignored[:, None], 0.0).to(logits.dtype).contiguous()


def cross_entropy_bwd_(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
) -> None:
    """`cross_entropy_bwd` into logits."""
    options = (label_smoothing, logit_scale, lse_square_scale, ignore_index)
    logits.copy_(cross_entropy_bwd(dloss, logits, labels, lse, *options))
