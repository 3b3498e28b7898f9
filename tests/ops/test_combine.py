"""Merge of partial results, on every device: kernel and tiled backend against the reference."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, op
from helpers import assert_close_2x, assert_equals, poisoned_empty

from flash_attn_ext.reference import attention_reference, combine_reference

pytestmark = pytest.mark.parametrize("overload", ["default", "tiled"])

SHAPES = {"batch": (2, 5, 3), "packed": (7, 3), "one_row": (1, 1, 1), "no_rows": (0, 5, 3)}


@pytest.mark.parametrize("num_splits", [1, 2, 5, 64])
@pytest.mark.parametrize("head_dim_v", [1, 6, 64, 200])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_reference(
    shape: tuple[int, ...], head_dim_v: int, num_splits: int, device: str, overload: str
) -> None:
    out_partial = torch.randn(num_splits, *shape, head_dim_v, device=device)
    lse_partial = torch.randn(num_splits, *shape, device=device) * 5
    out, lse = op("combine", overload)(out_partial, lse_partial, None)
    expected = combine_reference(out_partial, lse_partial)
    assert out.dtype == torch.float32
    assert_equals(out, expected[0], 1e-5)
    assert_equals(lse, expected[1], 1e-5, "lse")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_out_dtype(dtype: torch.dtype, device: str, overload: str) -> None:
    out_partial = torch.randn(3, 2, 5, 3, 64, device=device)
    lse_partial = torch.randn(3, 2, 5, 3, device=device)
    out, lse = op("combine", overload)(out_partial, lse_partial, dtype)
    expected = combine_reference(out_partial, lse_partial)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close_2x(out, expected[0], expected[0].to(dtype))


def test_parts_without_keys(device: str, overload: str) -> None:
    """lse -inf: the part may hold NaN. No part with a key: out 0, lse -inf."""
    lse_partial = torch.randn(4, 2, 5, 3, device=device)
    lse_partial[1] = -torch.inf
    lse_partial[:, 0, 2] = -torch.inf
    out_partial = torch.randn(4, 2, 5, 3, 32, device=device)
    out_partial = torch.where(lse_partial[..., None] == -torch.inf, torch.nan, out_partial)
    out, lse = op("combine", overload)(out_partial, lse_partial, None)
    expected = combine_reference(out_partial, lse_partial)
    assert (out[0, 2] == 0).all()
    assert (lse[0, 2] == -torch.inf).all()
    assert_equals(out, expected[0], 1e-5)
    assert_equals(lse, expected[1], 1e-5, "lse")


def test_weights_that_underflow(device: str, overload: str) -> None:
    """A part 200 nats below the best one counts nothing, one with lse 1000 does not overflow."""
    lse_partial = torch.tensor([1000.0, 800.0, -3000.0], device=device).view(3, 1, 1, 1)
    out_partial = torch.randn(3, 1, 1, 1, 8, device=device)
    out, lse = op("combine", overload)(out_partial, lse_partial, None)
    assert_equals(out, out_partial[0], 1e-6)
    assert lse.item() == 1000.0


def test_strides_and_out(device: str, overload: str) -> None:
    out_partial = torch.randn(3, 4, 2, 5, 40, device=device).permute(0, 2, 3, 1, 4)[..., 8:24]
    lse_partial = torch.randn(4, 5, 2, 3, device=device).permute(3, 2, 1, 0)
    expected = combine_reference(out_partial, lse_partial)
    buffer = poisoned_empty((2, 5, 4, 32), out_partial)
    lse = op("combine_out", overload)(out_partial, lse_partial, buffer[..., 4:20])
    assert_equals(buffer[..., 4:20], expected[0], 1e-5)
    assert_equals(lse, expected[1], 1e-5, "lse")
    assert buffer[..., :4].isnan().all()
    assert buffer[..., 20:].isnan().all()


def test_splits_of_attention_merge_to_the_whole(device: str, overload: str) -> None:
    inputs = Case(seqlen_k=60, dtype=torch.float32).inputs(device)
    q, k, v = (x.detach() for x in inputs)
    whole = attention_reference(q, k, v)
    parts = [
        op("fwd", overload)(
            *(q, k[:, keys], v[:, keys], None, None, 0.25, -1, -1, 0.0, 0.0, False, 0, 0)
        )
        for keys in (slice(0, 0), slice(0, 7), slice(7, 50), slice(50, 60))
    ]
    out, lse = op("combine", overload)(
        torch.stack([p[0] for p in parts]), torch.stack([p[1].transpose(1, 2) for p in parts]), None
    )
    assert_equals(out, whole.out, 1e-5)
    assert_equals(lse, whole.lse.transpose(1, 2), 1e-5, "lse")
