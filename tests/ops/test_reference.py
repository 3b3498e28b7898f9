"""The reference itself: against documented masks, other implementations and hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_equals, int32, max_error, randn

from flash_attn_ext.reference import (
    attention_reference,
    combine_reference,
    kvcache_attention_reference,
    rotary_reference,
    varlen_attention_reference,
    visible_keys,
)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "window", "expected"),
    [
        (2, 5, (-1, 0), ["11110", "11111"]),  # the two examples of flash-attn's documentation
        (5, 2, (-1, 0), ["00", "00", "00", "10", "11"]),
        (2, 5, (-1, -1), ["11111", "11111"]),
        (3, 3, (1, 0), ["100", "110", "011"]),
        (3, 5, (1, 1), ["01110", "00111", "00011"]),
        (3, 3, (-1, 1), ["110", "111", "111"]),
        (3, 3, (0, -1), ["111", "011", "001"]),
    ],
)
def test_visible_keys(
    seqlen_q: int, seqlen_k: int, window: tuple[int, int], expected: list[str]
) -> None:
    visible = visible_keys(seqlen_q, seqlen_k, window)
    assert ["".join(str(int(x)) for x in row) for row in visible] == expected


def test_visible_keys_of_shorter_sequences() -> None:
    """2 of 4 queries and 3 of 5 keys: the diagonal ends at the last existing pair."""
    visible = visible_keys(4, 5, (-1, 0), (2, 3))
    assert visible.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0] * 5, [0] * 5]


@pytest.mark.parametrize("causal", [False, True])
def test_equals_pytorch(causal: bool) -> None:
    """scaled_dot_product_attention of equal lengths, values and gradients."""
    q, k, v = randn(2, 9, 4, 8), randn(2, 9, 2, 8), randn(2, 9, 2, 8)
    result = attention_reference(q, k, v, causal=causal)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    assert_equals(result.out, expected, 1e-12)
    dout = torch.randn_like(expected)
    grads = torch.autograd.grad(result.out, (q, k, v), dout)
    for a, b in zip(grads, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        assert_equals(a, b, 1e-12)


def test_one_query_by_hand() -> None:
    """Two keys with scores softcap(s) - slope * distance; the second value is dropped."""
    q, v = torch.tensor([2.0]).view(1, 1, 1, 1), torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    k = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    result = attention_reference(
        q,
        k,
        v,
        softmax_scale=0.5,
        softcap=4.0,
        alibi_slopes=torch.tensor([0.25]),
        dropout_p=0.5,
        dropout_mask=torch.tensor([True, False]).view(1, 1, 1, 2),
    )
    scores = [4 * math.tanh(1 / 4) - 0.25, 4 * math.tanh(3 / 4)]
    total = sum(math.exp(s) for s in scores)
    assert result.lse.item() == pytest.approx(math.log(total), abs=1e-12)
    assert result.probs[0, 0, 0, 0].item() == pytest.approx(math.exp(scores[0]) / total, abs=1e-12)
    assert result.out.item() == pytest.approx(2 * 10 * math.exp(scores[0]) / total, abs=1e-11)


def test_rows_without_a_key() -> None:
    q, k, v = randn(1, 4, 1, 3), randn(1, 2, 1, 3), randn(1, 2, 1, 3)
    result = attention_reference(q, k, v, causal=True)
    assert (result.out[:, :2] == 0).all()
    assert (result.lse[..., :2] == -torch.inf).all()
    grads = torch.autograd.grad(result.out.sum() + result.lse[..., 2:].sum(), (q, k, v))
    assert (grads[0][:, :2] == 0).all()
    assert all(g.isfinite().all() for g in grads)


def test_no_keys_and_no_sequences() -> None:
    empty = attention_reference(randn(2, 3, 1, 4), randn(2, 0, 1, 4), randn(2, 0, 1, 5))
    assert empty.out.shape == (2, 3, 1, 5)
    assert (empty.out == 0).all()
    assert (empty.lse == -torch.inf).all()
    assert attention_reference(*(randn(0, 3, 1, 4) for _ in range(3))).out.shape == (0, 3, 1, 4)


def test_what_does_not_exist_is_not_read() -> None:
    q, k, v = (randn(2, 5, 1, 4).detach() for _ in range(3))
    expected = attention_reference(q[:, :3], k[:, :4], v[:, :4], causal=True)
    q[:, 3:], k[:, 4:], v[:, 4:] = torch.nan, torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    result = attention_reference(*leaves, causal=True, seqlens_q=[3, 3], seqlens_k=[4, 4])
    assert_equals(result.out[:, :3], expected.out, 1e-14)
    assert (result.out[:, 3:] == 0).all()
    grads = torch.autograd.grad(result.out.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("reorder", [False, True])
def test_plain_pytorch_in_the_same_dtype(reorder: bool) -> None:
    q, k, v = (randn(2, 40, 2, 32, dtype=torch.bfloat16) for _ in range(3))
    exact = attention_reference(q, k, v, causal=True)
    plain = attention_reference(q, k, v, causal=True, upcast=False, reorder=reorder)
    assert exact.out.dtype == torch.float64
    assert plain.out.dtype == torch.bfloat16
    assert 1e-4 < max_error(plain.out, exact.out) < 0.1


def test_varlen_equals_the_sequences_alone() -> None:
    q, k, v = randn(8, 2, 4), randn(9, 1, 4), randn(9, 1, 3)
    slopes = torch.rand(3, 2)
    out, lse = varlen_attention_reference(
        *(q, k, v, [0, 3, 3, 7], [0, 2, 6, 9]),
        seqused_q=[3, 0, 2],
        alibi_slopes=slopes,
        causal=True,
    )
    for begin, end, keys, batch in [(0, 3, slice(0, 2), 0), (3, 5, slice(6, 9), 2)]:
        one = attention_reference(
            *(q[None, begin:end], k[None, keys], v[None, keys]),
            causal=True,
            alibi_slopes=slopes[batch],
        )
        assert_equals(out[begin:end], one.out[0], 1e-14)
        assert_equals(lse[:, begin:end], one.lse[0], 1e-14)
    assert (out[5:] == 0).all()
    assert (lse[:, 5:] == -torch.inf).all()


def test_varlen_without_rows() -> None:
    out, lse = varlen_attention_reference(
        randn(0, 2, 4), randn(3, 1, 4), randn(3, 1, 5), [0, 0], [0, 3]
    )
    assert out.shape == (0, 2, 5)
    assert lse.shape == (2, 0)


def test_combine_of_two_halves_is_the_whole() -> None:
    q, k, v = randn(1, 3, 2, 4), randn(1, 8, 2, 4), randn(1, 8, 2, 5)
    whole = attention_reference(q, k, v)
    parts = [attention_reference(q, k[:, s], v[:, s]) for s in (slice(0, 3), slice(3, 8))]
    out, lse = combine_reference(
        torch.stack([p.out for p in parts]), torch.stack([p.lse.transpose(1, 2) for p in parts])
    )
    assert_equals(out, whole.out, 1e-12)
    assert_equals(lse.transpose(1, 2), whole.lse, 1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_complex_product(interleaved: bool) -> None:
    x = randn(3, 2, 6).detach()
    angles = torch.rand(4, 2, dtype=torch.float64)
    positions = torch.tensor([3, 1, 9])  # the last one is outside the table
    result = rotary_reference(x, angles.cos(), angles.sin(), positions, interleaved=interleaved)
    pairs = x[..., :4].unflatten(-1, (2, 2))
    if not interleaved:
        pairs = pairs.transpose(-1, -2)
    turned = torch.view_as_complex(pairs[:2].contiguous())
    turned = turned * torch.exp(1j * angles[positions[:2]])[:, None]
    pairs = torch.view_as_real(turned)
    if not interleaved:
        pairs = pairs.transpose(-1, -2)
    assert_equals(result[:2, :, :4], pairs.flatten(-2), 1e-14)
    assert torch.equal(result[..., 4:], x[..., 4:])
    assert torch.equal(result[2], x[2])
    back = rotary_reference(
        result, angles.cos(), angles.sin(), positions, interleaved=interleaved, conjugate=True
    )
    assert_equals(back, x, 1e-14)


def test_pages_are_a_cache_in_another_order() -> None:
    q, cache = randn(2, 1, 2, 4).detach(), randn(2, 6, 1, 4).detach()
    new = randn(2, 1, 1, 4).detach()
    table = int32([[4, 0, 2], [1, 5, 3]])
    pages = torch.empty(6, 2, 1, 4, dtype=torch.float64)
    pages[table.long()] = cache.unflatten(1, (3, 2))
    arguments = {"cache_seqlens": [3, 5], "causal": True, "cache_leftpad": [1, 0]}
    plain = kvcache_attention_reference(q, cache, cache, new, new, **arguments)
    paged = kvcache_attention_reference(q, pages, pages, new, new, page_table=table, **arguments)
    assert torch.equal(plain.out, paged.out)
    assert torch.equal(plain.k_cache, paged.k_cache[table.long()].flatten(1, 2))
    assert torch.equal(plain.k_cache[0, 3], new[0, 0])
    keys = torch.cat([cache[0, 1:3], new[0]])[None]
    assert_equals(plain.out[:1], attention_reference(q[:1], keys, keys, causal=True).out, 1e-14)
