"""The public functions over packed sequences of different lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_equals, cu_seqlens, int32, randn
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext.reference import varlen_attention_reference

pytestmark = pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")

SEQLENS_Q = [4, 0, 1, 5]
SEQLENS_K = [6, 3, 0, 5]
STARTS_Q = [0, 4, 4, 5, 10]
STARTS_K = [0, 6, 9, 9, 14]


def inputs(device: str, head_dim_v: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k = randn(10, 4, 8, device=device), randn(14, 2, 8, device=device)
    return q, k, randn(14, 2, head_dim_v, device=device)


def lengths(device: str) -> tuple[Tensor, Tensor, int, int]:
    return cu_seqlens(SEQLENS_Q, device), cu_seqlens(SEQLENS_K, device), 5, 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (2, 1), "softcap": 2.0},
        {"softmax_scale": 0.3, "window_size": (None, 0)},
    ],
)
def test_results_and_gradients(options: dict[str, Any], device: str) -> None:
    leaves = inputs(device, head_dim_v=12)
    actual = fa.flash_attn_varlen_func(
        *leaves, *lengths(device), return_softmax_lse=True, **options
    )
    window = options.get("window_size", (-1, -1))
    plain = {**options, "window_size": tuple(-1 if side is None else side for side in window)}
    expected = varlen_attention_reference(*leaves, STARTS_Q, STARTS_K, **plain)
    for a, b, name in zip(actual, expected, ("out", "lse"), strict=True):
        assert_equals(a, b, 1e-12, name)
    weights = torch.randn_like(actual[0])
    for a, b, name in zip(
        torch.autograd.grad(actual[0], leaves, weights),
        torch.autograd.grad(expected[0], leaves, weights),
        ("dq", "dk", "dv"),
        strict=True,
    ):
        assert_equals(a, b, 1e-11, name)


@pytest.mark.parametrize("causal", [False, True])
def test_seqused(causal: bool, device: str) -> None:
    leaves = inputs(device)
    used_q, used_k = [2, 0, 1, 5], [5, 3, 0, 0]
    actual = fa.flash_attn_varlen_func(
        *leaves,
        *lengths(device),
        causal=causal,
        seqused_q=int32(used_q, device),
        seqused_k=int32(used_k, device),
        return_softmax_lse=True,
    )
    expected = varlen_attention_reference(
        *leaves, STARTS_Q, STARTS_K, seqused_q=used_q, seqused_k=used_k, causal=causal
    )
    for a, b in zip(actual, expected, strict=True):
        assert_equals(a, b, 1e-12)
    weights = torch.randn_like(actual[0])
    for a, b in zip(
        torch.autograd.grad(actual[0], leaves, weights),
        torch.autograd.grad(expected[0], leaves, weights),
        strict=True,
    ):
        assert_equals(a, b, 1e-11)


def test_alibi_of_each_sequence(device: str) -> None:
    leaves = inputs(device)
    slopes = torch.rand(4, 4, device=device)
    out = fa.flash_attn_varlen_func(*leaves, *lengths(device), alibi_slopes=slopes)
    expected = varlen_attention_reference(*leaves, STARTS_Q, STARTS_K, alibi_slopes=slopes)
    assert_equals(out, expected[0], 1e-12)


def test_dropout_mask(device: str) -> None:
    leaves = inputs(device)
    out, lse, dmask = fa.flash_attn_varlen_func(
        *leaves, *lengths(device), dropout_p=0.3, return_attn_probs=True
    )
    assert dmask.shape == (4, 4, 128, 128)
    assert not dmask.requires_grad
    is_kept = ~dmask[:, :, :5, :6].signbit()
    expected = varlen_attention_reference(
        *leaves, STARTS_Q, STARTS_K, dropout_p=0.3, dropout_mask=is_kept
    )
    assert_equals(out, expected[0], 1e-12)
    assert_equals(lse, expected[1], 1e-12)
    weights = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, weights),
        torch.autograd.grad(expected[0], leaves, weights),
        strict=True,
    ):
        assert_equals(a, b, 1e-11)


def test_packed_forms_equal_the_plain_one(device: str) -> None:
    qkv = randn(10, 3, 4, 8, device=device).detach()
    starts = cu_seqlens(SEQLENS_Q, device)
    longest = torch.tensor(5, dtype=torch.int32)
    expected = fa.flash_attn_varlen_func(*qkv.unbind(1), starts, starts, 5, 5, causal=True)
    for packed in (
        fa.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, causal=True),
        fa.flash_attn_varlen_qkvpacked_func(
            qkv.flatten(1, 2), starts, 5, causal=True, num_heads_q=4
        ),
        fa.flash_attn_varlen_kvpacked_func(
            qkv[:, 0], qkv[:, 1:], starts, starts, 5, longest, causal=True
        ),
    ):
        assert torch.equal(packed, expected)


def test_empty_batch(device: str) -> None:
    q, k, v = (torch.zeros(0, heads, 8, device=device) for heads in (4, 2, 2))
    nothing = int32([0], device)
    out, lse = fa.flash_attn_varlen_func(q, k, v, nothing, nothing, 0, 0, return_softmax_lse=True)
    assert out.shape == (0, 4, 8)
    assert lse.shape == (4, 0)


def test_out_and_sink(device: str) -> None:
    q, k, v = (x.detach() for x in inputs(device))
    sink = randn(4, dtype=torch.float32, device=device).detach()
    expected = fa.flash_attn_varlen_func(q, k, v, *lengths(device), causal=True)
    out = torch.full_like(q, torch.nan)
    assert fa.flash_attn_varlen_func(q, k, v, *lengths(device), causal=True, out=out) is out
    assert_equals(out, expected, 1e-12)

    result, lse = fa.flash_attn_varlen_func(
        q, k, v, *lengths(device), causal=True, learnable_sink=sink, return_softmax_lse=True
    )
    plain_lse = fa.flash_attn_varlen_func(
        q, k, v, *lengths(device), causal=True, return_softmax_lse=True
    )[1]
    assert_equals(lse, torch.logaddexp(plain_lse, sink.double()[:, None]), 1e-12)
    weight = torch.exp(plain_lse - lse).transpose(0, 1)[..., None]
    assert_equals(result, expected * weight, 1e-12)


def in_pages(x: Tensor, seqlens: list[int], page_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Packed rows in shuffled pages, NaN in everything that is not a key."""
    counts = [-(-length // page_size) for length in seqlens]
    ids = torch.randperm(sum(counts) + 2)
    pages = x.new_full((len(ids), page_size, *x.shape[1:]), torch.nan)
    table = torch.full((len(seqlens), max(counts)), -(2**31), dtype=torch.int32)
    start, used = 0, 0
    for row, (length, count) in enumerate(zip(seqlens, counts, strict=True)):
        table[row, :count] = ids[used : used + count]
        for position in range(length):
            page = table[row, position // page_size]
            pages[page, position % page_size] = x[start + position]
        start, used = start + length, used + count
    return pages, table.to(device)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("word", ["page_table", "block_table"])
def test_pages(page_size: int, word: str, device: str) -> None:
    q, k, v = (x.detach() for x in inputs(device))
    expected = fa.flash_attn_varlen_func(q, k, v, *lengths(device), causal=True)
    state = torch.random.get_rng_state()
    k_pages, table = in_pages(k, SEQLENS_K, page_size, device)
    torch.random.set_rng_state(state)
    v_pages, _ = in_pages(v, SEQLENS_K, page_size, device)
    starts_q, starts_k, max_q, max_k = lengths(device)
    options: dict[str, Any] = {"causal": True, word: table}
    used = int32(SEQLENS_K, device)
    by_seqused = fa.flash_attn_varlen_func(
        q, k_pages, v_pages, starts_q, None, max_q, max_k, seqused_k=used, **options
    )
    assert_equals(by_seqused, expected, 1e-12)
    by_cumulative = fa.flash_attn_varlen_func(
        q, k_pages, v_pages, starts_q, starts_k, max_q, max_k, **options
    )
    assert_equals(by_cumulative, expected, 1e-12)


def test_backward_through_pages_is_an_error(device: str) -> None:
    q = randn(10, 4, 8, device=device)
    pages = torch.zeros(3, 2, 2, 8, dtype=q.dtype, device=device)
    out = fa.flash_attn_varlen_func(
        q,
        pages,
        pages,
        *(cu_seqlens([10], device), None, 10, 6),
        page_table=int32([0, 1, 2], device)[None],
        seqused_k=int32([6], device),
    )
    with pytest.raises(fa.UnsupportedError, match="no backward through a paged cache"):
        out.sum().backward()
