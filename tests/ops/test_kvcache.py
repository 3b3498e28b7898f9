"""Attention against a cache: generation, append, rotary, pages, and the helpers of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_equals, cu_seqlens, int32, randn
from torch import Tensor
from torch._subclasses import FakeTensorMode

import flash_attn_ext as fa
from flash_attn_ext.reference import combine_reference, kvcache_attention_reference

pytestmark = pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")


def plain(*shape: int, device: str) -> Tensor:
    return randn(*shape, device=device).detach()


def angles(rows: int, pairs: int, device: str) -> tuple[Tensor, Tensor]:
    values = torch.rand(rows, pairs, dtype=torch.float64, device=device) * 6
    return values.cos(), values.sin()


def check(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor | None, Tensor | None] = (None, None),
    **options: Any,
) -> None:
    """Result, lse and both caches equal those of the reference."""
    as_lists = {
        name: value.tolist() if isinstance(value, Tensor) and value.dtype == torch.int32 else value
        for name, value in options.items()
        if name not in ("page_table", "max_seqlen_q")
    }
    table = options.get("page_table")
    if isinstance(as_lists.get("cache_seqlens"), int):
        starts = options.get("cu_seqlens_q")
        batch_size = len(q) if starts is None else len(starts) - 1
        as_lists["cache_seqlens"] = [options["cache_seqlens"]] * batch_size
    expected = kvcache_attention_reference(q, *caches, *new, page_table=table, **as_lists)
    k_cache, v_cache = (x.clone() for x in caches)
    q_before = q.clone()
    out, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, *new, return_softmax_lse=True, **options
    )
    assert torch.equal(q, q_before)
    assert_equals(out, expected.out, 1e-12)
    assert_equals(lse, expected.lse, 1e-12, "lse")
    assert_equals(k_cache, expected.k_cache, 1e-12, "k_cache")
    assert_equals(v_cache, expected.v_cache, 1e-12, "v_cache")


def contiguous(device: str, rows: int = 3) -> tuple[Tensor, Tensor]:
    return plain(rows, 10, 2, 8, device=device), plain(rows, 10, 2, 12, device=device)


def paged(page_size: int, device: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A cache of three sequences of at most 12 keys, in shuffled pages."""
    columns = -(-12 // page_size)
    table = torch.randperm(3 * columns).to(device=device, dtype=torch.int32).view(3, columns)
    pages = 3 * columns + 1
    caches = (
        plain(pages, page_size, 2, 8, device=device),
        plain(pages, page_size, 2, 12, device=device),
    )
    return caches, table


MASKS = [{}, {"causal": True}, {"window_size": (3, 1)}, {"softcap": 2.0, "softmax_scale": 0.5}]


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("cache_seqlens", [None, 4, [7, 0, 3]])
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_without_append(
    options: dict[str, Any], cache_seqlens: Any, seqlen_q: int, device: str
) -> None:
    if isinstance(cache_seqlens, list):
        cache_seqlens = int32(cache_seqlens, device)
    q = plain(3, seqlen_q, 4, 8, device=device)
    check(q, contiguous(device), cache_seqlens=cache_seqlens, **options)


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("seqlen_new", [1, 3])
def test_append(options: dict[str, Any], seqlen_new: int, device: str) -> None:
    q = plain(3, seqlen_new, 4, 8, device=device)
    new = plain(3, seqlen_new, 2, 8, device=device), plain(3, seqlen_new, 2, 12, device=device)
    lengths = int32([7, 0, 3], device)
    check(q, contiguous(device), new, cache_seqlens=lengths, **options)
    check(q, contiguous(device), new, cache_seqlens=5, **options)


@pytest.mark.parametrize("page_size", [None, 1, 3, 16])
@pytest.mark.parametrize("append", [False, True])
def test_rows_leftpad_and_pages(page_size: int | None, append: bool, device: str) -> None:
    caches, table = (contiguous(device), None) if page_size is None else paged(page_size, device)
    q = plain(2, 2, 4, 8, device=device)
    new = (plain(2, 2, 2, 8, device=device), plain(2, 2, 2, 12, device=device))
    check(
        q,
        caches,
        new if append else (None, None),
        causal=True,
        cache_seqlens=int32([7, 4], device),
        cache_batch_idx=int32([2, 0], device),
        cache_leftpad=int32([3, 0], device),
        **({} if table is None else {"page_table": table}),
    )


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_equal_a_contiguous_cache(page_size: int, device: str) -> None:
    caches, table = paged(page_size, device)
    flat = [torch.stack([x[row.long()].flatten(0, 1) for row in table]) for x in caches]
    q = plain(3, 2, 4, 8, device=device)
    new = (plain(3, 2, 2, 8, device=device), plain(3, 2, 2, 12, device=device))
    lengths = int32([9, 0, 4], device)
    cos, sin = angles(table.shape[1] * page_size, 3, device)
    options = {"cache_seqlens": lengths, "causal": True, "rotary_cos": cos, "rotary_sin": sin}
    expected = fa.flash_attn_with_kvcache(q, *flat, *new, **options)
    actual = fa.flash_attn_with_kvcache(q, *caches, *new, block_table=table, **options)
    assert_equals(actual, expected, 1e-12)
    for pages, rows in zip(caches, flat, strict=True):
        now = torch.stack([pages[row.long()].flatten(0, 1) for row in table])
        assert torch.equal(now, rows)


@pytest.mark.parametrize("rotary_seqlens", [None, [4, 0, 9]])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 3, 4])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, None)}])
def test_rotary(
    options: dict[str, Any],
    pairs: int,
    interleaved: bool,
    rotary_seqlens: list[int] | None,
    device: str,
) -> None:
    cos, sin = angles(12, pairs, device)
    new = plain(3, 2, 2, 8, device=device), plain(3, 2, 2, 12, device=device)
    plain_window = tuple(-1 if side is None else side for side in options.get("window_size", ()))
    check(
        plain(3, 2, 4, 8, device=device),
        contiguous(device),
        new,
        cache_seqlens=int32([7, 0, 3], device),
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=interleaved,
        rotary_seqlens=None if rotary_seqlens is None else int32(rotary_seqlens, device),
        **({"window_size": plain_window} if plain_window else options),
    )


@pytest.mark.parametrize("page_size", [None, 3])
def test_ragged_queries_and_keys(page_size: int | None, device: str) -> None:
    caches, table = (contiguous(device), None) if page_size is None else paged(page_size, device)
    cos, sin = angles(12, 2, device)
    starts = cu_seqlens([3, 0, 2], device)
    check(
        plain(5, 4, 8, device=device),
        caches,
        (plain(5, 2, 8, device=device), plain(5, 2, 12, device=device)),
        cu_seqlens_q=starts,
        cu_seqlens_k_new=starts,
        max_seqlen_q=torch.tensor(3) if page_size is None else 3,
        cache_seqlens=int32([4, 2, 0], device),
        causal=True,
        rotary_cos=cos,
        rotary_sin=sin,
        **({} if table is None else {"page_table": table}),
    )


def test_alibi(device: str) -> None:
    slopes = torch.rand(3, 4, device=device)
    q = plain(3, 2, 4, 8, device=device)
    check(q, contiguous(device), cache_seqlens=5, alibi_slopes=slopes)


def test_values_are_not_read_from_stand_ins() -> None:
    """Under FakeTensorMode only shapes exist."""
    with FakeTensorMode():
        q, caches = torch.empty(2, 1, 4, 8), [torch.empty(2, 6, 2, 8) for _ in "kv"]
        lengths = torch.empty(2, dtype=torch.int32)
        out = fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths)
    assert out.shape == (2, 1, 4, 8)


def test_a_larger_cache_than_the_batch(device: str) -> None:
    q, caches = plain(2, 1, 4, 8, device=device), contiguous(device, rows=3)
    out = fa.flash_attn_with_kvcache(q, *caches)
    assert_equals(out, fa.flash_attn_func(q, *(x[:2] for x in caches)), 1e-12)


@pytest.mark.parametrize("page_size", [None, 3])
@pytest.mark.parametrize("window", [(-1, -1), (4, 0)])
def test_generation_equals_full_attention(
    page_size: int | None, window: tuple[int, int], device: str
) -> None:
    """A prompt of 4 tokens, then one token a step."""
    q, k, v = (plain(3, 10, heads, 8, device=device) for heads in (4, 2, 2))
    expected = fa.flash_attn_func(q, k, v, causal=True, window_size=window)
    if page_size is None:
        caches, table = tuple(x.new_full((3, 10, 2, 8), torch.nan) for x in (k, v)), None
    else:
        pages, table = paged(page_size, device)
        caches = tuple(torch.full_like(pages[0], torch.nan) for _ in (k, v))
    length, outs = 0, []
    for step in (4, *[1] * 6):
        rows = slice(length, length + step)
        outs.append(
            fa.flash_attn_with_kvcache(
                q[:, rows],
                *caches,
                k[:, rows],
                v[:, rows],
                cache_seqlens=length,
                block_table=table,
                causal=True,
                window_size=window,
            )
        )
        length += step
    assert_equals(torch.cat(outs, dim=1), expected, 1e-12)


def test_sinks(device: str) -> None:
    q, caches = plain(3, 2, 4, 8, device=device), contiguous(device)
    sink = plain(4, device=device).float()
    keys, values = (x[:, :6] for x in caches)
    expected = fa.flash_attn_func(q, keys, values, s_aux=sink, return_softmax_lse=True)
    actual = fa.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=6, learnable_sink=sink, return_softmax_lse=True
    )
    for a, b in zip(actual, expected, strict=True):
        assert_equals(a, b, 1e-12)


def test_returns_only_out_by_default(device: str) -> None:
    q = plain(3, 1, 4, 8, device=device)
    assert isinstance(fa.flash_attn_with_kvcache(q, *contiguous(device)), Tensor)


def test_inputs_that_require_grad(device: str) -> None:
    """Inference without no_grad works; a backward is an error, not a missing gradient."""
    q = randn(3, 1, 4, 8, device=device)
    caches = contiguous(device)
    out, lse = fa.flash_attn_with_kvcache(q, *caches, return_softmax_lse=True)
    assert_equals(out, fa.flash_attn_with_kvcache(q.detach(), *caches), 1e-12)
    for result in (out, lse):
        with pytest.raises(fa.UnsupportedError, match="no backward through a cache"):
            result.sum().backward()
    with torch.no_grad():
        assert not fa.flash_attn_with_kvcache(q, *caches).requires_grad


# ---- combine and metadata ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 4), (7, 4)])
def test_combine(shape: tuple[int, ...], device: str) -> None:
    out_partial = plain(3, *shape, 8, device=device).float()
    lse_partial = plain(3, *shape, device=device).float()
    lse_partial[0, 0] = -torch.inf
    lse_partial[:, 1] = -torch.inf
    expected = combine_reference(out_partial, lse_partial)
    out, lse = fa.flash_attn_combine(out_partial, lse_partial)
    assert_equals(out, expected[0], 1e-5)
    assert_equals(lse, expected[1], 1e-5)
    half, _ = fa.flash_attn_combine(out_partial, lse_partial, out_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_equals(half, expected[0], 2e-2)
    buffer = torch.full_like(half, torch.nan)
    result, lse = fa.flash_attn_combine(out_partial, lse_partial, out=buffer)
    assert result is buffer
    assert torch.equal(buffer, half)
    assert_equals(lse, expected[1], 1e-5)


def test_combine_takes_any_strides(device: str) -> None:
    out_partial = plain(3, 8, 2, 5, 4, device=device).float().movedim(1, -1)
    lse_partial = plain(3, 2, 4, 5, device=device).float().transpose(-1, -2)
    expected = combine_reference(out_partial, lse_partial)
    for a, b in zip(fa.flash_attn_combine(out_partial, lse_partial), expected, strict=True):
        assert_equals(a, b, 1e-5)


def test_backward_through_combine_is_an_error(device: str) -> None:
    out_partial = randn(2, 1, 3, 2, 8, dtype=torch.float32, device=device)
    out, _ = fa.flash_attn_combine(out_partial, torch.zeros(2, 1, 3, 2, device=device))
    with pytest.raises(fa.UnsupportedError, match="use merge_states"):
        out.sum().backward()


def test_scheduler_metadata(device: str) -> None:
    lengths = int32([3, 4], device)
    metadata = fa.get_scheduler_metadata(
        2, 1, 10, 4, 2, 8, lengths, torch.float16, 12, page_size=4, causal=True, num_splits=3
    )
    assert (metadata.dtype, metadata.tolist()) == (torch.int32, [3])
    assert metadata.device == lengths.device
    q = plain(2, 1, 4, 8, device=device)
    caches = contiguous(device)
    out = fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths, scheduler_metadata=metadata)
    assert torch.equal(out, fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths))
