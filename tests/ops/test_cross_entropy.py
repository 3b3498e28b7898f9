"""Cross-entropy against torch's own and against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equals, randn

from flash_attn_ext import UnsupportedError
from flash_attn_ext.ops.cross_entropy import CrossEntropyLoss, cross_entropy_loss

ROWS, VOCABULARY = 7, 11


def labels(device: str) -> torch.Tensor:
    result = torch.randint(0, VOCABULARY, (ROWS,))
    result[2] = -100
    return result.to(device)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_as_torch(smoothing: float, scale: float, index_dtype: torch.dtype, device: str) -> None:
    logits, target = randn(ROWS, VOCABULARY, device=device), labels(device)
    loss, z_loss = cross_entropy_loss(
        logits, target.to(index_dtype), label_smoothing=smoothing, logit_scale=scale
    )
    expected = F.cross_entropy(logits * scale, target, reduction="none", label_smoothing=smoothing)
    assert_equals(loss, expected, 1e-10)
    assert (z_loss == 0).all()
    weight = torch.rand(ROWS, device=device, dtype=torch.float64)
    ours, exact = (torch.autograd.grad((x * weight).sum(), logits)[0] for x in (loss, expected))
    assert_equals(ours, exact, 1e-10)


def test_z_loss(device: str) -> None:
    logits, target = randn(ROWS, VOCABULARY, device=device), labels(device)
    lse = logits.logsumexp(-1)
    loss, z_loss = cross_entropy_loss(logits, target, lse_square_scale=0.3)
    expected_z = 0.3 * lse.square() * (target != -100)
    expected = F.cross_entropy(logits, target, reduction="none") + expected_z
    assert_equals(z_loss, expected_z, 1e-10)
    assert_equals(loss, expected, 1e-10)
    ours, exact = (torch.autograd.grad(x.sum(), logits)[0] for x in (loss, expected))
    assert_equals(ours, exact, 1e-10)
    assert not z_loss.requires_grad
    given = cross_entropy_loss(logits, target, lse.detach(), lse_square_scale=0.3)[0]
    assert_equals(given, expected, 1e-10)
    assert_equals(torch.autograd.grad(given.sum(), logits)[0], exact, 1e-10)


def test_half_precision_is_computed_in_fp32(device: str) -> None:
    logits, target = randn(ROWS, VOCABULARY, dtype=torch.bfloat16, device=device), labels(device)
    loss, _ = cross_entropy_loss(logits, target)
    assert loss.dtype == torch.float32
    assert_equals(loss, F.cross_entropy(logits.double(), target, reduction="none"), 1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module(reduction: str, device: str) -> None:
    logits, target = randn(ROWS, VOCABULARY, device=device), labels(device)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    assert_equals(CrossEntropyLoss(reduction=reduction)(logits, target), expected, 1e-10)
    layer = CrossEntropyLoss(reduction=reduction, lse_square_scale=0.3, return_z_loss=True)
    loss, z_loss = layer(logits, target)
    assert_equals(loss, expected + z_loss, 1e-10)
    kept = logits.logsumexp(-1)[target != -100]
    mean = 0.3 * kept.square().mean()
    if reduction == "mean":
        assert_equals(z_loss, mean, 1e-10)


def test_refusals() -> None:
    logits, target = randn(ROWS, VOCABULARY), labels("cpu")
    with pytest.raises(UnsupportedError, match="process_group: got a group"):
        cross_entropy_loss(logits, target, process_group=object())
    with pytest.raises(ValueError, match="reduction: got median"):
        CrossEntropyLoss(reduction="median")
