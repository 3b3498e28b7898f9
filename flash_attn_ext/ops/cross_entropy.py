"""Cross-entropy with label smoothing and z-loss, one loss a row, under flash-attn's names.

Kernels compute it on CUDA tensors, PyTorch operations elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import last_dim_contiguous, message
from ..errors import UnsupportedError
from . import _kernels

_REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The loss of every row, computed in fp32.

    With ``s = logits * logit_scale`` and ``lse = logsumexp(s)``::

        loss = lse - (1 - label_smoothing) * s[label] - label_smoothing * mean(s) + z_loss
        z_loss = lse_square_scale * lse ** 2

    Args:
        logits: [rows, vocabulary], floating.
        labels: [rows], int64 or int32.
        precomputed_lse: fp32 [rows], of ``s``, if it is known. Without gradient.
        label_smoothing: share of the uniform distribution in the target.
        logit_scale: multiplies the logits.
        lse_square_scale: of z_loss, which keeps lse near 0.
        ignore_index: rows with this label have losses of 0 and no gradient.
        inplace_backward: where kernels compute, the gradient takes the place of the logits, which
            must not be used any more; elsewhere they are left as they are.
        process_group: must be None.

    Returns:
        (loss [rows], z_loss [rows]), fp32 (fp64 for fp64). Differentiable with respect to logits
        through loss; z_loss is for logging.

    Raises:
        UnsupportedError: process_group is given: logits split over processes.
    """
    if process_group is not None:
        raise UnsupportedError(
            message("process_group", "a group", "None", "gather the logits of all processes")
        )
    if _kernels.takes(logits) and logits.dim() == 2 and labels.dim() == 1:
        if labels.dtype not in (torch.int64, torch.int32):
            labels = labels.long()
        if precomputed_lse is not None:
            precomputed_lse = precomputed_lse.detach().float().contiguous()
        options = _kernels.LossOptions(label_smoothing, logit_scale, lse_square_scale, ignore_index)
        return _kernels.cross_entropy(
            last_dim_contiguous(logits), labels, precomputed_lse, options, inplace_backward
        )
    scores = (logits if logits.dtype == torch.float64 else logits.float()) * logit_scale
    ignored = labels == ignore_index
    labels = labels.long().masked_fill(ignored, 0)
    lse = scores.logsumexp(-1)
    if precomputed_lse is not None:
        # Its value, and the gradient of the one that was computed.
        lse = precomputed_lse.detach().to(lse.dtype) + (lse - lse.detach())
    picked = scores.gather(-1, labels[:, None]).squeeze(-1)
    loss = lse - (1.0 - label_smoothing) * picked
    if label_smoothing > 0.0:
        loss = loss - label_smoothing * scores.mean(-1)
    z_loss = (lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
    return loss.masked_fill(ignored, 0.0) + z_loss, z_loss.detach()


class CrossEntropyLoss(nn.Module):
    """cross_entropy_loss, reduced."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        """Keeps the options.

        Args:
            ignore_index: see cross_entropy_loss.
            reduction: "mean" over the rows that count, "sum" or "none".
            label_smoothing: see cross_entropy_loss.
            logit_scale: see cross_entropy_loss.
            lse_square_scale: see cross_entropy_loss.
            inplace_backward: see cross_entropy_loss.
            process_group: see cross_entropy_loss.
            return_z_loss: ``forward`` returns (loss, z_loss).

        Raises:
            ValueError: another reduction.
        """
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(message("reduction", reduction, f"one of {', '.join(_REDUCTIONS)}"))
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.return_z_loss = return_z_loss
        self.options: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "lse_square_scale": lse_square_scale,
            "ignore_index": ignore_index,
            "inplace_backward": inplace_backward,
            "process_group": process_group,
        }

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of logits [rows, vocabulary] and labels [rows]."""
        losses = cross_entropy_loss(input, target, precomputed_lse, **self.options)
        if self.reduction == "sum":
            losses = (losses[0].sum(), losses[1].sum())
        elif self.reduction == "mean":
            count = (target != self.ignore_index).sum()
            losses = (losses[0].sum() / count, losses[1].sum() / count)
        return losses if self.return_z_loss else losses[0]
