"""The packed, in-place forms of the rotary embedding, and the module with its tables."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equals, int32, randn
from torch import Tensor

from flash_attn_ext.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from flash_attn_ext.reference import rotary_reference

POSITIONS = 20


def tables(device: str, rotary_dim: int = 12) -> tuple[Tensor, Tensor]:
    angles = torch.rand(POSITIONS, rotary_dim // 2, device=device) * 6.3
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor, offsets: list[int], interleaved: bool) -> Tensor:
    steps = torch.arange(x.shape[1], device=x.device)
    positions = steps + int32(offsets, str(x.device))[:, None]
    return rotary_reference(x, cos, sin, positions, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", ["int", "tensor"])
@pytest.mark.parametrize("form", ["5d", "5d strided", "heads", "other tables"])
def test_qkv(form: str, offset: str, interleaved: bool, device: str) -> None:
    new = {"dtype": torch.float32, "device": device}
    heads = {"heads": (4, 2)}.get(form, (3, 3))
    num_heads_q = 4 if form == "heads" else None
    shape = (2, 7, heads[0] + 2 * heads[1], 16)
    leaf = randn(*(2 * shape[0], *shape[1:]) if "strided" in form else shape, **new)
    flat = leaf[::2] if "strided" in form else leaf
    cos, sin = tables(device)
    keys = tables(device) if form == "other tables" else (None, None)
    offsets = [5, 5] if offset == "int" else [0, 13]
    positions = 5 if offset == "int" else int32(offsets, device)

    copy = flat * 1.0  # in place needs a tensor that is no leaf
    if "strided" in form:
        copy = (leaf * 1.0)[::2]
    qkv = copy if num_heads_q else copy.unflatten(2, (3, 3))
    result = apply_rotary_emb_qkv_(
        qkv, cos, sin, *keys, interleaved, positions, num_heads_q=num_heads_q
    )
    assert result is qkv

    q, k, v = flat.split([heads[0], heads[1], heads[1]], 2)
    cos_k, sin_k = (cos, sin) if keys[0] is None else keys
    q = rotated(q, cos, sin, offsets, interleaved)
    expected = torch.cat([q, rotated(k, cos_k, sin_k, offsets, interleaved), v], 2)
    assert_equals(result.reshape(expected.shape), expected, 1e-5)
    weight = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((result.reshape(expected.shape) * weight).sum(), leaf)
    (exact,) = torch.autograd.grad((expected * weight).sum(), leaf)
    assert_equals(gradient, exact, 1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_kv(interleaved: bool, device: str) -> None:
    leaf = randn(2, 7, 2, 3, 16, dtype=torch.float32, device=device)
    cos, sin = tables(device)
    kv = leaf * 1.0
    assert apply_rotary_emb_kv_(kv, cos, sin, interleaved, int32([0, 13], device)) is kv
    k = rotated(leaf[:, :, 0], cos, sin, [0, 13], interleaved)
    expected = torch.stack([k, leaf[:, :, 1]], 2)
    assert_equals(kv, expected, 1e-5)
    weight = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((kv * weight).sum(), leaf)
    (exact,) = torch.autograd.grad((expected * weight).sum(), leaf)
    assert_equals(gradient, exact, 1e-5)


def test_one_table_for_keys_alone() -> None:
    cos, sin = tables("cpu")
    with pytest.raises(ValueError, match="cos_k, sin_k: got one of them, expected both or neither"):
        apply_rotary_emb_qkv_(torch.zeros(1, 2, 3, 1, 16), cos, sin, cos)


# ---- the module -------------------------------------------------------------------------------


def angles(seqlen: int, dim: int, base: float, device: str) -> tuple[Tensor, Tensor]:
    """From the definition: pair i turns by base^(-2 i / dim) a position."""
    pairs = torch.arange(dim // 2, device=device, dtype=torch.float64)
    position = torch.arange(seqlen, device=device, dtype=torch.float64)
    angle = position[:, None] * base ** (-2.0 * pairs / dim)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module(dtype: torch.dtype, device: str) -> None:
    layer = RotaryEmbedding(12, base=500.0, device=device).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    qkv = randn(2, 7, 3, 3, 16, dtype=dtype, device=device).detach()
    cos, sin = angles(30, 12, 500.0, device)
    for offset in (0, 9, 3):  # the tables grow once
        given = qkv.clone()
        result = layer(given, seqlen_offset=offset)
        assert result is given
        expected = [rotated(x.double(), cos, sin, [offset] * 2, False) for x in qkv.unbind(2)[:2]]
        assert_equals(result[:, :, 0], expected[0], tolerance)
        assert_equals(result[:, :, 1], expected[1], tolerance)
        assert torch.equal(result[:, :, 2], qkv[:, :, 2])
    assert layer._tables[0].shape[0] == 16
    assert list(layer.state_dict()) == []


def test_module_with_queries_and_keys_apart(device: str) -> None:
    layer = RotaryEmbedding(16, interleaved=True, device=device)
    q = randn(2, 5, 4, 16, dtype=torch.float32, device=device).detach()
    kv = randn(2, 5, 2, 2, 16, dtype=torch.float32, device=device).detach()
    offsets = int32([2, 6], device)
    given = (q.clone(), kv.clone())
    new_q, new_kv = layer(*given, seqlen_offset=offsets, max_seqlen=11)
    assert new_q is given[0]
    assert new_kv is given[1]
    cos, sin = angles(30, 16, 10000.0, device)
    assert_equals(new_q, rotated(q.double(), cos, sin, [2, 6], True), 1e-5)
    assert_equals(new_kv[:, :, 0], rotated(kv[:, :, 0].double(), cos, sin, [2, 6], True), 1e-5)
    assert torch.equal(new_kv[:, :, 1], kv[:, :, 1])
    with pytest.raises(ValueError, match="max_seqlen: got None, expected an int"):
        layer(*given, seqlen_offset=offsets)


def test_xpos(device: str) -> None:
    """Scores depend on the distance alone and decay with it, arXiv:2212.10554."""
    layer = RotaryEmbedding(16, scale_base=8.0, device=device)
    one = torch.ones(1, 1, 1, 16, device=device, dtype=torch.float32)
    qkv = one[:, :, None].expand(1, 12, 3, 1, 16).clone()
    q, k, _ = layer(qkv).double().unbind(2)
    scores = q[0, :, 0] @ k[0, :, 0].T
    for distance in range(6):
        diagonal = scores.diagonal(-distance)
        assert_equals(diagonal, diagonal[:1].expand_as(diagonal), 1e-4)
    cos, _ = angles(12, 16, 10000.0, device)
    pairs = torch.arange(8, device=device, dtype=torch.float64)
    zeta = ((2 * pairs / 16) + 0.4) / 1.4
    expected = 2 * (zeta ** (5 / 8.0) * cos[5]).sum()
    assert_equals(scores[7, 2], expected, 1e-4)
    plain = layer(one.clone(), one[:, :, None].expand(1, 1, 2, 1, 16).clone())
    assert all(x.isfinite().all() for x in plain)


def test_tables_of_inference_are_not_used_for_training() -> None:
    layer = RotaryEmbedding(16)
    x = randn(1, 3, 3, 2, 16, dtype=torch.float32)
    with torch.inference_mode():
        layer(x.detach().clone())
    layer(x * 1.0).sum().backward()
    assert x.grad is not None
