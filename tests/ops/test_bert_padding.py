"""Padded to packed and back."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equals, randn

from flash_attn_ext.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("dims", [(), (4,), (2, 4)])
def test_round_trip(dims: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = randn(3, 5, *dims, device=device)
    mask = torch.tensor(MASK, device=device).to(dtype)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    assert torch.equal(packed, x[mask.bool()])
    assert indices.tolist() == [0, 1, 2, 11, 12, 13, 14]
    assert cu_seqlens.tolist() == [0, 3, 3, 7]
    assert (cu_seqlens.dtype, seqused.dtype) == (torch.int32, torch.int32)
    assert seqused.tolist() == [3, 0, 4]
    assert (max_seqlen, type(max_seqlen)) == (4, int)
    padded = pad_input(packed, indices, 3, 5)
    kept = mask.bool().view(3, 5, *[1] * len(dims))
    assert torch.equal(padded, torch.where(kept, x, 0.0))
    (gradient,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(gradient, kept.expand_as(x).double())


def test_unused_tokens_are_packed_but_not_counted(device: str) -> None:
    x = randn(2, 4, 3, device=device)
    used = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], device=device)
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]], device=device)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, used, unused)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 3, 7]
    assert max_seqlen == 4
    assert seqused.tolist() == [2, 1]
    assert packed.shape == (7, 3)


def test_concatenated_sequences(device: str) -> None:
    x = randn(3, 6, 4, device=device)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        x, lengths.to(device)
    )
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert max_seqlen == 6
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, *range(12, 18)]
    assert torch.equal(packed, x.flatten(0, 1)[indices])


def test_nothing_kept(device: str) -> None:
    x = randn(0, 5, 4, device=device)
    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, torch.zeros(0, 5, device=device))
    assert (packed.shape, cu_seqlens.tolist(), max_seqlen) == ((0, 4), [0], 0)
    assert pad_input(packed, indices, 0, 5).shape == (0, 5, 4)


def test_index_functions(device: str) -> None:
    x = randn(6, 3, device=device)
    indices = torch.tensor([4, 1], device=device)
    picked = index_first_axis(x, indices)
    assert torch.equal(picked, x[[4, 1]])
    back = index_put_first_axis(picked, indices, 6)
    assert torch.equal(back[[4, 1]], picked)
    assert_equals(back[[0, 2, 3, 5]], torch.zeros(4, 3, device=device), 0.0)
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert gradient[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_int32_indices(device: str) -> None:
    """As flash-attn takes them; transformers has such in a decoding step."""
    x = randn(3, 2, device=device)
    indices = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    padded = index_put_first_axis(x, indices, 6)
    assert torch.equal(padded[indices], x)
    assert torch.equal(index_first_axis(padded, indices), x)
