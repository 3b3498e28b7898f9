"""Rotary embedding, on every device: kernel and tiled backend against the reference."""

from __future__ import annotations

import pytest
import torch
from attention_cases import op
from helpers import assert_close_2x, assert_equals, cu_seqlens, int32
from torch import Tensor

from flash_attn_ext.reference import rotary_reference

pytestmark = pytest.mark.parametrize("overload", ["default", "tiled"])

HEADS, HEAD_DIM, POSITIONS = 3, 48, 50


def _tables(rotary_dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    angles = torch.rand(POSITIONS, rotary_dim // 2, device=device) * 6.3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _positions(seqlens: list[int], offsets: list[int], same: bool) -> list[list[int]]:
    return [
        [offset + (0 if same else i) for i in range(seqlen)]
        for seqlen, offset in zip(seqlens, offsets, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rotary_dim", [2, 10, 32, 48])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("conjugate", [False, True], ids=["forward", "conjugate"])
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
def test_equals_reference(
    dtype: torch.dtype,
    rotary_dim: int,
    interleaved: bool,
    conjugate: bool,
    in_place: bool,
    device: str,
    overload: str,
) -> None:
    x = torch.randn(2, 19, HEADS, HEAD_DIM, device=device).to(dtype)
    cos, sin = _tables(rotary_dim, dtype, device)
    offsets = [4, 30]
    positions = torch.tensor(_positions([19, 19], offsets, False), device=device)
    expected = rotary_reference(
        x, cos, sin, positions, interleaved=interleaved, conjugate=conjugate
    )
    arguments = (cos, sin, int32(offsets, device), None, 19, interleaved, conjugate, False)
    before = x.clone()
    if in_place:
        result = x
        op("rotary_", overload)(x, *arguments)
    else:
        result = op("rotary", overload)(x, *arguments)
        assert torch.equal(x, before)
    assert result.dtype == dtype
    assert_close_2x(result, expected, expected.to(dtype))
    assert torch.equal(result[..., rotary_dim:], before[..., rotary_dim:])


@pytest.mark.parametrize("num_heads", [1, 2, 5, 8])
@pytest.mark.parametrize("head_dim", [48, 52, 9], ids=lambda head_dim: f"head_dim{head_dim}")
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
def test_number_of_heads(
    num_heads: int, head_dim: int, in_place: bool, device: str, overload: str
) -> None:
    storage = torch.randn(2, 19, num_heads + 1, head_dim, device=device)
    x, behind = storage.split([num_heads, 1], dim=2)
    behind_before = behind.clone()
    cos, sin = _tables(32 if head_dim > 32 else 8, torch.float32, device)
    expected = rotary_reference(x, cos, sin, torch.arange(19, device=device).expand(2, 19))
    arguments = (cos, sin, None, None, 19, False, False, False)
    if in_place:
        op("rotary_", overload)(x, *arguments)
        assert torch.equal(behind, behind_before)
        result = x
    else:
        result = op("rotary", overload)(x, *arguments)
    assert_equals(result, expected, 1e-5)


@pytest.mark.parametrize("same_position", [False, True])
@pytest.mark.parametrize("offsets", [None, [3, 0, 20, 7]], ids=["start", "offsets"])
def test_packed(offsets: list[int] | None, same_position: bool, device: str, overload: str) -> None:
    seqlens = [5, 0, 17, 1]
    x = torch.randn(sum(seqlens), HEADS, HEAD_DIM, device=device)
    cos, sin = _tables(32, torch.float32, device)
    positions = _positions(seqlens, offsets or [0] * 4, same_position)
    expected = rotary_reference(
        x, cos, sin, torch.tensor([p for row in positions for p in row], device=device)
    )
    result = op("rotary", overload)(
        *(x, cos, sin, None if offsets is None else int32(offsets, device)),
        *(cu_seqlens(seqlens, device), 17, False, False, same_position),
    )
    assert_equals(result, expected, 1e-5)


@pytest.mark.parametrize("offsets", [None, [3, 11]], ids=["start", "offsets"])
def test_same_position(offsets: list[int] | None, device: str, overload: str) -> None:
    x = torch.randn(2, 6, HEADS, HEAD_DIM, device=device)
    cos, sin = _tables(48, torch.float32, device)
    positions = torch.tensor(_positions([6, 6], offsets or [0, 0], True), device=device)
    result = op("rotary", overload)(
        *(x, cos, sin, None if offsets is None else int32(offsets, device)),
        *(None, 6, True, False, True),
    )
    expected = rotary_reference(x, cos, sin, positions, interleaved=True)
    assert_equals(result, expected, 1e-5)


def test_positions_outside_the_table_are_not_rotated(device: str, overload: str) -> None:
    x = torch.randn(2, 6, HEADS, HEAD_DIM, device=device)
    cos, sin = _tables(48, torch.float32, device)
    offsets = int32([-3, POSITIONS - 2], device)
    result = op("rotary", overload)(x, cos, sin, offsets, None, 6, False, False, False)
    assert torch.equal(result[0, :3], x[0, :3])
    assert torch.equal(result[1, 2:], x[1, 2:])
    assert (result[0, 4] != x[0, 4]).any()


def test_forward_then_conjugate_gives_the_input(device: str, overload: str) -> None:
    x = torch.randn(2, 6, HEADS, HEAD_DIM, device=device)
    cos, sin = _tables(32, torch.float32, device)
    rest = (None, None, 6, True)
    turned = op("rotary", overload)(x, cos, sin, *rest, False, False)
    assert_equals(op("rotary", overload)(turned, cos, sin, *rest, True, False), x, 1e-5)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)], ids=str)
def test_nothing_to_rotate(shape: tuple[int, int], device: str, overload: str) -> None:
    x = torch.randn(*shape, HEADS, HEAD_DIM, device=device)
    cos, sin = _tables(32, torch.float32, device)
    result = op("rotary", overload)(x, cos, sin, None, None, shape[1], False, False, False)
    assert result.shape == x.shape


def test_empty_table(device: str, overload: str) -> None:
    x = torch.randn(2, 3, HEADS, HEAD_DIM, device=device)
    table = torch.empty(0, 16, device=device)
    result = op("rotary", overload)(x, table, table, None, None, 3, False, False, False)
    assert torch.equal(result, x)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_strides(interleaved: bool, device: str, overload: str) -> None:
    """q inside a packed qkv tensor, rotated in place; the neighbours stay."""
    qkv = torch.randn(2, 7, 3, HEADS, HEAD_DIM, device=device)
    before = qkv.clone()
    cos, sin = _tables(32, torch.float32, device)
    positions = torch.arange(7, device=device).expand(2, -1)
    expected = rotary_reference(qkv[:, :, 1], cos, sin, positions, interleaved=interleaved)
    op("rotary_", overload)(qkv[:, :, 1], cos, sin, None, None, 7, interleaved, False, False)
    assert_equals(qkv[:, :, 1], expected, 1e-5)
    assert torch.equal(qkv[:, :, ::2], before[:, :, ::2])


def test_fp64(device: str, overload: str) -> None:
    x = torch.randn(2, 7, HEADS, HEAD_DIM, dtype=torch.float64, device=device)
    cos, sin = _tables(32, torch.float64, device)
    positions = torch.arange(7, device=device).expand(2, -1)
    result = op("rotary", overload)(x, cos, sin, None, None, 7, False, False, False)
    assert_equals(result, rotary_reference(x, cos, sin, positions), 1e-13)


def test_rows_behind_the_last_sequence_are_copied(device: str, overload: str) -> None:
    """In place they are not touched, whatever implementation runs."""
    x = torch.randn(9, HEADS, HEAD_DIM, device=device)
    before = x.clone()
    cos, sin = _tables(48, torch.float32, device)
    starts, offsets = cu_seqlens([2, 3], device), int32([1, 2], device)
    op("rotary_", overload)(x, cos, sin, offsets, starts, 3, False, False, False)
    assert torch.equal(x[5:], before[5:])
    positions = torch.tensor([1, 2, 2, 3, 4], device=device)
    assert_equals(x[:5], rotary_reference(before[:5], cos, sin, positions), 1e-5)
