"""merge_states against attention over the union of the keys."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equals, cu_seqlens, randn
from torch import Tensor

from flash_attn_ext import flash_attn_func, flash_attn_varlen_func, merge_states

pytestmark = pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")


def test_two_halves_are_the_whole(device: str) -> None:
    leaves = [randn(2, n, heads, 8, device=device) for n, heads in ((5, 4), (7, 2), (7, 2))]
    q, k, v = leaves
    options = {"return_softmax_lse": True}
    expected = flash_attn_func(q, k, v, **options)
    actual = merge_states(
        *flash_attn_func(q, k[:, :3], v[:, :3], **options),
        *flash_attn_func(q, k[:, 3:], v[:, 3:], **options),
    )
    weights = [torch.randn_like(x) for x in expected]
    for a, b in zip(actual, expected, strict=True):
        assert_equals(a, b, 1e-12)
    for a, b in zip(
        torch.autograd.grad(actual, leaves, weights),
        torch.autograd.grad(expected, leaves, weights),
        strict=True,
    ):
        assert_equals(a, b, 1e-11)


def test_varlen_layout(device: str) -> None:
    q, k, v = (randn(9, 2, 8, device=device).detach() for _ in range(3))
    starts = cu_seqlens([4, 5], device)
    parts = [
        flash_attn_varlen_func(
            q, k, v, starts, starts, 5, 5, window_size=window, return_softmax_lse=True
        )
        for window in ((-1, 0), (-1, -1))
    ]
    causal, everything = parts
    after = torch.log(torch.exp(everything[1]) - torch.exp(causal[1]))
    weight = torch.exp(causal[1] - everything[1]).transpose(0, 1)[..., None]
    out_after = (everything[0] - weight * causal[0]) / (1 - weight)
    is_last = after.isneginf() | after.isnan()
    after = after.masked_fill(is_last, -torch.inf)
    out_after = out_after.masked_fill(is_last.transpose(0, 1)[..., None], 0.0)
    out, lse = merge_states(*causal, out_after, after)
    assert_equals(out, everything[0], 1e-9)
    assert_equals(lse, everything[1], 1e-12)


def states(device: str) -> tuple[Tensor, ...]:
    return tuple(
        x for _ in "ab" for x in (randn(1, 4, 2, 8, device=device), randn(1, 2, 4, device=device))
    )


def test_rows_without_keys(device: str) -> None:
    out_a, lse_a, out_b, lse_b = (x.detach() for x in states(device))
    lse_a[..., :2] = -torch.inf
    lse_b[..., 1:3] = -torch.inf
    out_a[:, :2] = 0.0
    out_b[:, 1:3] = 0.0
    leaves = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = merge_states(*leaves)
    assert torch.equal(out[:, 0], out_b[:, 0])
    assert torch.equal(out[:, 2], out_a[:, 2])
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))
    assert lse[..., 1].isneginf().all()
    assert torch.equal(lse[..., 0], lse_b[..., 0])
    finite = lse.masked_fill(lse.isneginf(), 0.0)
    gradients = torch.autograd.grad(out.square().sum() + finite.sum(), leaves)
    assert all(x.isfinite().all() for x in gradients)


def test_gradcheck(device: str) -> None:
    assert torch.autograd.gradcheck(merge_states, states(device))


def test_far_apart_and_dtypes(device: str) -> None:
    out_a, lse_a, out_b, lse_b = (x.detach() for x in states(device))
    out, lse = merge_states(
        out_a.bfloat16(), lse_a.float() + 2000, out_b.bfloat16(), lse_b.float() - 2000
    )
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, out_a.bfloat16())
    assert torch.equal(lse, lse_a.float() + 2000)
