"""LayerNorm and RMSNorm with residual and dropout, against torch's own in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_2x, assert_equals, randn
from torch import Tensor

from flash_attn_ext import UnsupportedError
from flash_attn_ext.ops import layer_norm as norms
from flash_attn_ext.ops.activations import swiglu

SIZE = 24
KINDS = pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])


def by_torch(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if kind == "layer_norm":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    out = F.rms_norm(x, (x.shape[-1],), weight, eps)
    return out if bias is None else out + bias


def function(kind: str) -> Any:
    return norms.layer_norm_fn if kind == "layer_norm" else norms.rms_norm_fn


@KINDS
def test_everything_at_once(kind: str, device: str) -> None:
    """Two summands, a residual, two results, zero-centred weights, and every gradient."""
    x, x1, residual = (randn(2, 5, SIZE, device=device) for _ in range(3))
    weight, bias, weight1, bias1 = (randn(SIZE, device=device) for _ in range(4))
    leaves = (x, x1, residual, weight, bias, weight1, bias1)
    out, out1, total = function(kind)(
        x, weight, bias, residual, x1, weight1, bias1, 1e-3, prenorm=True, zero_centered_weight=True
    )
    expected_sum = x + x1 + residual
    expected = [
        by_torch(kind, expected_sum, weight + 1, bias, 1e-3),
        by_torch(kind, expected_sum, weight1 + 1, bias1, 1e-3),
        expected_sum,
    ]
    weights = [torch.randn_like(y) for y in expected]
    for y, z in zip((out, out1, total), expected, strict=True):
        assert_equals(y, z, 1e-10)
    losses = [
        sum((y * w).sum() for y, w in zip(ys, weights, strict=True))
        for ys in ((out, out1, total), expected)
    ]
    ours, exact = (torch.autograd.grad(loss, leaves) for loss in losses)
    for y, z in zip(ours, exact, strict=True):
        assert_equals(y, z, 1e-9)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(kind: str, dtype: torch.dtype, device: str) -> None:
    """Computed in fp32; the sum has the residual's type, or fp32, or x's."""
    x, weight = (randn(*s, dtype=dtype, device=device).detach() for s in ((6, SIZE), (SIZE,)))
    residual = randn(6, SIZE, dtype=torch.float32, device=device).detach()
    exact = by_torch(kind, x.double(), weight.double(), None, 1e-6)
    plain = by_torch(kind, x, weight, None, 1e-6)
    assert_close_2x(function(kind)(x, weight, None), exact, plain)
    wide = function(kind)(x, weight, None, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert_equals(wide, exact, 1e-5)
    for options, expected in (
        ({}, dtype),
        ({"residual_in_fp32": True}, torch.float32),
        ({"residual": residual}, torch.float32),
        ({"residual": residual.to(dtype)}, dtype),
    ):
        out, total = function(kind)(x, weight, None, prenorm=True, **options)
        assert (out.dtype, total.dtype) == (dtype, expected)
    buffers = (torch.empty_like(x), torch.empty_like(residual))
    results = function(kind)(
        x, weight, None, residual, prenorm=True, out=buffers[0], residual_out=buffers[1]
    )
    assert results[0] is buffers[0]
    assert results[1] is buffers[1]
    assert torch.equal(buffers[1], x.float() + residual)


@KINDS
def test_dropout_and_rowscale(kind: str, device: str) -> None:
    x, x1 = (randn(50, SIZE, device=device) for _ in range(2))
    weight = randn(SIZE, device=device)
    rowscale = torch.rand(50, device=device, dtype=torch.float64)
    options = {"dropout_p": 0.25, "prenorm": True, "return_dropout_mask": True}
    torch.manual_seed(5)
    out, total, mask, mask1 = function(kind)(x, weight, None, x1=x1, **options)
    assert abs(mask.double().mean().item() - 0.75) < 0.06
    assert not torch.equal(mask, mask1)
    expected = (x * mask + x1 * mask1) / 0.75
    assert_equals(total, expected, 1e-10)
    assert_equals(out, by_torch(kind, expected, weight, None, 1e-6), 1e-10)
    torch.manual_seed(5)
    assert torch.equal(function(kind)(x, weight, None, x1=x1, **options)[0], out)
    total, mask, _ = function(kind)(x, weight, None, rowscale=rowscale, **options)[1:]
    assert_equals(total, x * rowscale[:, None] * mask / 0.75, 1e-10)
    with pytest.raises(UnsupportedError, match="rowscale: got a tensor with x1"):
        function(kind)(x, weight, None, x1=x1, rowscale=rowscale)


@KINDS
def test_older_functions_and_modules(kind: str, device: str) -> None:
    x, residual = (randn(2, 5, SIZE, device=device) for _ in range(2))
    scale = randn(SIZE, device=device).detach()
    is_rms = kind == "rms_norm"
    name = "DropoutAddRMSNorm" if is_rms else "DropoutAddLayerNorm"
    layer = getattr(norms, name)(
        SIZE, prenorm=True, p=0.5, eps=1e-3, device=device, dtype=torch.float64
    )
    assert sorted(layer.state_dict()) == (["weight"] if is_rms else ["bias", "weight"])
    with torch.no_grad():
        layer.weight.normal_()
    plain = norms.rms_norm if is_rms else norms.layer_norm
    arguments = (x, layer.weight) if is_rms else (x, layer.weight, layer.bias)
    assert_equals(plain(*arguments, 1e-3), by_torch(kind, *arguments[:2], layer.bias, 1e-3), 1e-10)

    layer.eval()
    out, total = layer(x, residual)
    assert_equals(total, x + residual, 1e-10)
    assert_equals(out, by_torch(kind, x + residual, layer.weight, layer.bias, 1e-3), 1e-10)
    layer.train()
    assert (layer(x, residual)[1] == residual).double().mean() > 0.3  # dropped

    older = norms.dropout_add_rms_norm if is_rms else norms.dropout_add_layer_norm
    out, mask = older(
        x, None, layer.weight, layer.bias, 0.5, 1e-3, layerscale=scale, return_dropout_mask=True
    )
    expected = x * scale * mask / 0.5
    assert_equals(out, by_torch(kind, expected, layer.weight, layer.bias, 1e-3), 1e-10)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_module_of_triton(zero_centered: bool, device: str) -> None:
    new = {"device": device, "dtype": torch.float64}
    layer = norms.RMSNorm(SIZE, 1e-3, 0.5, zero_centered, **new).eval()
    x, residual = (randn(3, SIZE, device=device) for _ in range(2))
    ones = torch.ones(SIZE, **new)
    assert_equals(layer(x), by_torch("rms_norm", x, ones, None, 1e-3), 1e-10)
    out, total = layer(x, residual, prenorm=True)
    assert_equals(total, x + residual, 1e-10)
    assert_equals(out, by_torch("rms_norm", x + residual, ones, None, 1e-3), 1e-10)
    assert (layer.train()(x, residual, prenorm=True)[1] == residual).double().mean() > 0.3


def test_swiglu(device: str) -> None:
    x, y = (randn(3, SIZE, device=device) for _ in range(2))
    assert_equals(swiglu(x, y), x * torch.sigmoid(x) * y, 1e-10)
