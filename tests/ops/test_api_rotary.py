"""apply_rotary_emb: positions, both pairings, in place, packed sequences, gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equals, cu_seqlens, int32, randn
from torch import Tensor

from flash_attn_ext.layers.rotary import apply_rotary_emb, apply_rotary_emb_func
from flash_attn_ext.reference import rotary_reference

pytestmark = pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")


def tables(device: str, rows: int = 12, pairs: int = 3) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, pairs, dtype=torch.float64, device=device) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 4, [7, 2]])
@pytest.mark.parametrize("pairs", [1, 3, 4])
def test_fixed_length(pairs: int, offset: int | list[int], interleaved: bool, device: str) -> None:
    x, (cos, sin) = randn(2, 5, 4, 8, device=device), tables(device, pairs=pairs)
    offsets = int32(offset if isinstance(offset, list) else [offset] * 2, device)
    positions = offsets.long()[:, None] + torch.arange(5, device=device)
    expected = rotary_reference(x, cos, sin, positions, interleaved=interleaved)
    given = offsets if isinstance(offset, list) else offset
    actual = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=given)
    assert_equals(actual, expected, 1e-12)
    weights = torch.randn_like(expected)
    assert_equals(
        torch.autograd.grad(actual, x, weights)[0],
        torch.autograd.grad(expected, x, weights)[0],
        1e-12,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, [7, 0, 2]])
def test_packed_sequences(offset: int | list[int], interleaved: bool, device: str) -> None:
    x, (cos, sin) = randn(9, 4, 8, device=device), tables(device)
    starts = offset if isinstance(offset, list) else [0] * 3
    positions = torch.cat(
        [torch.arange(n) + start for n, start in zip((4, 0, 5), starts, strict=True)]
    ).to(device)
    expected = rotary_reference(x, cos, sin, positions, interleaved=interleaved)
    actual = apply_rotary_emb(
        x,
        cos,
        sin,
        interleaved=interleaved,
        seqlen_offsets=int32(offset, device) if isinstance(offset, list) else offset,
        cu_seqlens=cu_seqlens([4, 0, 5], device),
        max_seqlen=torch.tensor(5),
    )
    assert_equals(actual, expected, 1e-12)
    (gradient,) = torch.autograd.grad(actual, x, actual.detach())
    assert_equals(gradient, x, 1e-12)  # a rotation's gradient rotates back


def test_in_place(device: str) -> None:
    leaf, (cos, sin) = randn(2, 5, 4, 8, device=device), tables(device)
    expected = apply_rotary_emb(leaf, cos, sin).detach()
    x = leaf.detach().clone()
    assert apply_rotary_emb(x, cos, sin, inplace=True) is x
    assert_equals(x, expected, 1e-12)

    packed = torch.stack([leaf.detach()] * 3, dim=2)
    apply_rotary_emb(packed[:, :, 1], cos, sin, inplace=True)
    assert_equals(packed[:, :, 1], expected, 1e-12)
    assert torch.equal(packed[:, :, 0], leaf)


def test_in_place_gradient(device: str) -> None:
    leaf, (cos, sin) = randn(2, 5, 4, 8, device=device), tables(device)
    x = leaf.clone()
    assert apply_rotary_emb(x, cos, sin, inplace=True) is x
    (gradient,) = torch.autograd.grad(x, leaf, x.detach())
    assert_equals(gradient, leaf, 1e-12)


def test_gradcheck(device: str) -> None:
    x, (cos, sin) = randn(1, 3, 2, 8, device=device), tables(device)

    def function(x: Tensor) -> Tensor:
        return apply_rotary_emb(x, cos, sin, interleaved=True)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_any_strides(device: str) -> None:
    x, (cos, sin) = randn(2, 5, 4, 8, device=device), tables(device)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert_equals(apply_rotary_emb(strided, cos, sin), apply_rotary_emb(x, cos, sin), 1e-12)


def test_half_precision(device: str) -> None:
    x = randn(2, 5, 4, 8, dtype=torch.bfloat16, device=device)
    cos, sin = (table.bfloat16() for table in tables(device))
    positions = torch.arange(5, device=device).expand(2, 5)
    out = apply_rotary_emb(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert_equals(out, rotary_reference(x, cos, sin, positions), 2e-2)


def test_other_name() -> None:
    assert apply_rotary_emb_func is apply_rotary_emb
