"""Append to the KV cache, on every device: kernel and tiled backend, bit for bit."""

from __future__ import annotations

import pytest
import torch
from attention_cases import op
from helpers import assert_close_2x, cu_seqlens, int32, poisoned_empty
from torch import Tensor

from flash_attn_ext.reference import rotary_reference

pytestmark = pytest.mark.parametrize("overload", ["default", "tiled"])

HEADS = 3


def _slot(
    batch: int, slot: int, batch_idx: list[int] | None, table: Tensor | None, page_size: int
) -> tuple[int, int]:
    row = batch if batch_idx is None else batch_idx[batch]
    if table is None:
        return row, slot
    return int(table[row, slot // page_size]), slot % page_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (20, 36), (7, 3)], ids=str)
@pytest.mark.parametrize("page_size", [None, 1, 6, 16])
@pytest.mark.parametrize("batch_idx", [None, [3, 0, 2]], ids=["in_order", "batch_idx"])
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_writes_the_slots_and_nothing_else(
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    page_size: int | None,
    batch_idx: list[int] | None,
    packed: bool,
    device: str,
    overload: str,
) -> None:
    head_dim, head_dim_v = head_dims
    seqlens_new = [5, 0, 2] if packed else [4, 4, 4]
    cache_seqlens = [7, 0, 20]
    starts = cu_seqlens(seqlens_new).tolist()
    k = torch.randn(starts[-1], HEADS, head_dim, device=device).to(dtype)
    v = torch.randn(starts[-1], HEADS, head_dim_v, device=device).to(dtype)
    table = None
    shape = (4, 40)
    if page_size is not None:
        max_pages = -(-40 // page_size)
        shape = (4 * max_pages + 2, page_size)
        table = torch.randperm(shape[0])[: 4 * max_pages].view(4, max_pages)
    k_cache = poisoned_empty((*shape, HEADS, head_dim), k)
    v_cache = poisoned_empty((*shape, HEADS, head_dim_v), v)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for batch, begin in enumerate(starts[:-1]):
        for n in range(seqlens_new[batch]):
            at = _slot(batch, cache_seqlens[batch] + n, batch_idx, table, page_size or 1)
            expected_k[at], expected_v[at] = k[begin + n], v[begin + n]
    op("append_kv", overload)(
        k_cache,
        v_cache,
        k if packed else k.unflatten(0, (3, 4)),
        v if packed else v.unflatten(0, (3, 4)),
        int32(cache_seqlens, device),
        None if batch_idx is None else int32(batch_idx, device),
        None if table is None else int32(table.tolist(), device),
        cu_seqlens(seqlens_new, device) if packed else None,
        *(None, None, None, False),
    )
    assert torch.equal(k_cache.nan_to_num(nan=-9.0), expected_k.nan_to_num(nan=-9.0))
    assert torch.equal(v_cache.nan_to_num(nan=-9.0), expected_v.nan_to_num(nan=-9.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [10, 64])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
@pytest.mark.parametrize("rotary_seqlens", [None, [11, 2]], ids=["cache", "rotary_seqlens"])
def test_rotates_keys(
    dtype: torch.dtype,
    interleaved: bool,
    rotary_dim: int,
    num_heads: int,
    rotary_seqlens: list[int] | None,
    device: str,
    overload: str,
) -> None:
    k = torch.randn(2, 3, num_heads, 64, device=device).to(dtype)
    v = torch.randn(2, 3, num_heads, 64, device=device).to(dtype)
    angles = torch.rand(40, rotary_dim // 2, device=device) * 6.3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cache_seqlens = [5, 0]
    k_cache, v_cache = (
        torch.zeros(2, 9, num_heads, 64, device=device, dtype=dtype) for _ in range(2)
    )
    op("append_kv", overload)(
        *(k_cache, v_cache, k, v, int32(cache_seqlens, device), None, None, None, cos, sin),
        *(None if rotary_seqlens is None else int32(rotary_seqlens, device), interleaved),
    )
    base = torch.tensor(rotary_seqlens or cache_seqlens, device=device)[:, None]
    positions = base + torch.arange(3, device=device)
    expected = rotary_reference(k, cos, sin, positions, interleaved=interleaved)
    for batch, begin in enumerate(cache_seqlens):
        written = k_cache[batch, begin : begin + 3]
        assert_close_2x(written, expected[batch], expected[batch].to(dtype), name="k_cache")
        assert torch.equal(v_cache[batch, begin : begin + 3], v[batch])
    assert k_cache.count_nonzero() <= 6 * num_heads * 64


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_slots_outside_the_cache_are_dropped(paged: bool, device: str, overload: str) -> None:
    """The first sequence fits, the second one half, the third not at all."""
    k = torch.randn(3, 4, HEADS, 8, device=device)
    shape, table = ((3, 12), None) if not paged else ((9, 4), torch.arange(9).view(3, 3))
    k_cache, v_cache = (torch.zeros(*shape, HEADS, 8, device=device) for _ in range(2))
    op("append_kv", overload)(
        *(k_cache, v_cache, k, k, int32([2, 10, 12], device), None),
        *(None if table is None else int32(table.tolist(), device), None),
        *(None, None, None, False),
    )
    whole = k_cache.view(3, 12, HEADS, 8)
    assert torch.equal(whole[0, 2:6], k[0])
    assert torch.equal(whole[1, 10:], k[1, :2])
    assert whole.count_nonzero() == 6 * HEADS * 8
    assert torch.equal(k_cache, v_cache)


def test_nothing_fits(device: str, overload: str) -> None:
    cache = torch.randn(2, 5, HEADS, 8, device=device)
    k_cache, v_cache = cache.clone(), cache.clone()
    new = torch.randn(2, 3, HEADS, 8, device=device)
    lengths = int32([5, 9], device)
    op("append_kv", overload)(k_cache, v_cache, new, new, lengths, *(None,) * 6, False)
    assert torch.equal(k_cache, cache)
    assert torch.equal(v_cache, cache)


def test_page_ids_outside_the_pool_are_dropped(device: str, overload: str) -> None:
    cache = torch.zeros(4, 2, HEADS, 8, device=device)
    k_cache, v_cache = cache.clone(), cache.clone()
    new = torch.randn(2, 2, HEADS, 8, device=device)
    table = int32([[-1, 3], [77, 1]], device)
    lengths = int32([1, 1], device)
    op("append_kv", overload)(k_cache, v_cache, new, new, lengths, None, table, *(None,) * 4, False)
    assert torch.equal(k_cache[3, 0], new[0, 1])
    assert torch.equal(k_cache[1, 0], new[1, 1])
    assert k_cache.count_nonzero() == 2 * HEADS * 8


def test_no_pages(device: str, overload: str) -> None:
    """A table without columns has no slot; a pool without pages has none either."""
    new = torch.randn(1, 2, HEADS, 8, device=device)
    lengths = int32([0], device)
    for pages, table in [(2, [[]]), (0, [[0, 0]])]:
        k_cache = torch.zeros(pages, 4, HEADS, 8, device=device)
        v_cache = k_cache.clone()
        arguments = (lengths, None, int32(table, device), *(None,) * 4, False)
        op("append_kv", overload)(k_cache, v_cache, new, new, *arguments)
        assert not k_cache.count_nonzero()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_nothing_to_append(shape: tuple[int, int], device: str, overload: str) -> None:
    new = torch.randn(*shape, HEADS, 8, device=device)
    k_cache = torch.zeros(2, 5, HEADS, 8, device=device)
    lengths = int32([0] * shape[0], device)
    op("append_kv", overload)(k_cache, k_cache.clone(), new, new, lengths, *(None,) * 6, False)
    assert not k_cache.count_nonzero()


def test_strided_cache(device: str, overload: str) -> None:
    """Heads first in memory, keys and values interleaved."""
    storage = torch.zeros(2, HEADS, 9, 2, 8, device=device)
    k_cache, v_cache = storage.permute(3, 0, 2, 1, 4)
    k, v = torch.randn(2, 2, 3, HEADS, 8, device=device)
    lengths = int32([1, 6], device)
    op("append_kv", overload)(k_cache, v_cache, k, v, lengths, *(None,) * 6, False)
    assert torch.equal(k_cache[0, 1:4], k[0])
    assert torch.equal(v_cache[1, 6:9], v[1])
    assert storage.count_nonzero() == 2 * 2 * 3 * HEADS * 8
