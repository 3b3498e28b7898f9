"""Tiled backend, attention against a cache: contiguous, indexed, padded, paged, appended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_cases import op
from helpers import assert_equals, cu_seqlens, int32, poisoned_empty, randn
from torch import Tensor

from flash_attn_ext.reference import CacheResult, kvcache_attention_reference

pytestmark = pytest.mark.usefixtures("length_reading")

HEADS_Q, HEADS_KV, HEAD_DIM, HEAD_DIM_V, SLOTS = 4, 2, 16, 24, 41


@dataclass(frozen=True)
class CacheCase:
    """What is in the cache and how it is found; lengths are those before the append."""

    cache_seqlens: tuple[int, ...] | None = (9, 0, 30)
    batch_idx: tuple[int, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    page_size: int | None = None
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    seqlens_q: tuple[int, ...] = (3, 3, 3)
    packed_q: bool = False
    seqlens_new: tuple[int, ...] | None = None
    packed_new: bool = False
    rotary: str | None = None  # "interleaved" | "halves"
    rotary_seqlens: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        return 5 if self.batch_idx is not None else len(self.seqlens_q)


CASES = {
    "plain": CacheCase(),
    "whole_cache": CacheCase(cache_seqlens=None),
    "equal_lengths": CacheCase(cache_seqlens=(12, 12, 12), window=(-1, 0)),
    "causal": CacheCase(window=(-1, 0)),
    "window": CacheCase(window=(5, 1), softcap=2.0, alibi=True),
    "batch_idx": CacheCase(batch_idx=(4, 1, 0)),
    "leftpad": CacheCase(leftpad=(4, 0, 29), window=(-1, 0)),
    "paged": CacheCase(page_size=8),
    "page_of_one": CacheCase(page_size=1, window=(20, 0)),
    "paged_batch_idx_leftpad": CacheCase(
        page_size=5, batch_idx=(3, 0, 4), leftpad=(2, 0, 7), window=(-1, 0)
    ),
    "packed_q": CacheCase(seqlens_q=(5, 0, 2), packed_q=True, window=(-1, 0), alibi=True),
    "packed_q_paged": CacheCase(
        seqlens_q=(5, 0, 2), packed_q=True, page_size=7, batch_idx=(1, 2, 4), leftpad=(1, 0, 3)
    ),
    "append": CacheCase(seqlens_new=(3, 3, 3), window=(-1, 0)),
    "append_indexed": CacheCase(seqlens_new=(3, 3, 3), batch_idx=(4, 1, 0), leftpad=(1, 2, 0)),
    "append_paged": CacheCase(seqlens_new=(4, 4, 4), page_size=8, window=(-1, 0)),
    "append_packed": CacheCase(
        seqlens_q=(5, 0, 2),
        packed_q=True,
        seqlens_new=(2, 0, 6),
        packed_new=True,
        window=(-1, 0),
        page_size=3,
    ),
    "rotary": CacheCase(seqlens_new=(3, 3, 3), rotary="interleaved"),
    "rotary_causal": CacheCase(seqlens_new=(3, 3, 3), rotary="halves", window=(-1, 0)),
    "rotary_window": CacheCase(seqlens_new=(3, 3, 3), rotary="halves", window=(20, -1)),
    "rotary_packed": CacheCase(
        seqlens_q=(5, 0, 2),
        packed_q=True,
        seqlens_new=(2, 0, 6),
        packed_new=True,
        rotary="interleaved",
        rotary_seqlens=(7, 1, 2),
        window=(-1, 0),
    ),
}


def _list(values: tuple[int, ...] | None) -> list[int] | None:
    return None if values is None else list(values)


def _tensor(values: tuple[int, ...] | None, device: str) -> Tensor | None:
    return None if values is None else int32(list(values), device)


def _sequences(seqlens: tuple[int, ...], packed: bool, heads: int, dim: int, device: str) -> Tensor:
    shape = (sum(seqlens),) if packed else (len(seqlens), seqlens[0])
    return randn(*shape, heads, dim, device=device).detach()


def _build(case: CacheCase, device: str) -> dict[str, Any]:
    """Arguments of the reference; all that no sequence uses is NaN."""
    used = [0 if s is None else s for s in (case.cache_seqlens or (SLOTS,) * 3)]
    rows = case.batch_idx or range(case.num_rows)
    if case.page_size is None:
        shape: tuple[int, ...] = (case.num_rows, SLOTS)
        table = None
    else:
        max_pages = -(-SLOTS // case.page_size)
        shape = (case.num_rows * max_pages + 3, case.page_size)
        table = torch.randperm(shape[0])[: case.num_rows * max_pages].view(case.num_rows, max_pages)
    like = torch.empty(0, dtype=torch.float64, device=device)
    k_cache = poisoned_empty((*shape, HEADS_KV, HEAD_DIM), like)
    v_cache = poisoned_empty((*shape, HEADS_KV, HEAD_DIM_V), like)
    leftpad = case.leftpad or (0,) * len(used)
    for row, pad, length in zip(rows, leftpad, used, strict=False):
        for slot in range(pad, length):
            at = (
                (row, slot)
                if table is None
                else (int(table[row, slot // case.page_size]), slot % case.page_size)
            )
            k_cache[at] = torch.randn(HEADS_KV, HEAD_DIM, dtype=torch.float64)
            v_cache[at] = torch.randn(HEADS_KV, HEAD_DIM_V, dtype=torch.float64)
    angles = torch.rand(60, 4, dtype=torch.float64, device=device) * 6
    new = case.seqlens_new
    return {
        "q": _sequences(case.seqlens_q, case.packed_q, HEADS_Q, HEAD_DIM, device),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": None if not new else _sequences(new, case.packed_new, HEADS_KV, HEAD_DIM, device),
        "v": None if not new else _sequences(new, case.packed_new, HEADS_KV, HEAD_DIM_V, device),
        "page_table": None if table is None else int32(table.tolist(), device),
        "rotary_cos": angles.cos() if case.rotary else None,
        "rotary_sin": angles.sin() if case.rotary else None,
        "alibi_slopes": torch.rand(3, HEADS_Q, device=device) if case.alibi else None,
    }


def _expected(case: CacheCase, data: dict[str, Any]) -> CacheResult:
    starts = cu_seqlens(list(case.seqlens_q)).tolist() if case.packed_q else None
    new_starts = cu_seqlens(list(case.seqlens_new or ())).tolist() if case.packed_new else None
    return kvcache_attention_reference(
        **data,
        cache_seqlens=_list(case.cache_seqlens),
        cache_batch_idx=_list(case.batch_idx),
        cache_leftpad=_list(case.leftpad),
        cu_seqlens_q=starts,
        cu_seqlens_k_new=new_starts,
        rotary_seqlens=_list(case.rotary_seqlens),
        rotary_interleaved=case.rotary == "interleaved",
        window_size=case.window,
        softcap=case.softcap,
    )


def _run(case: CacheCase, data: dict[str, Any], device: str) -> tuple[Tensor, Tensor]:
    """Calls the op; the caches in `data` are written."""
    cache = (
        _tensor(case.cache_seqlens, device),
        _tensor(case.batch_idx, device),
        _tensor(case.leftpad, device),
        data["page_table"],
        cu_seqlens(list(case.seqlens_q), device) if case.packed_q else None,
        max(case.seqlens_q),
    )
    scores = (data["alibi_slopes"], HEAD_DIM**-0.5, *case.window, case.softcap, 0, 0)
    caches = (data["q"], data["k_cache"], data["v_cache"])
    if data["k"] is None:
        return op("kvcache_fwd")(*caches, *cache, *scores)
    new_starts = cu_seqlens(list(case.seqlens_new or ()), device) if case.packed_new else None
    rotary = (
        data["rotary_cos"],
        data["rotary_sin"],
        _tensor(case.rotary_seqlens, device),
        case.rotary == "interleaved",
    )
    return op("kvcache_append_fwd")(
        *caches, data["k"], data["v"], new_starts, *cache, *rotary, *scores
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference(case: CacheCase, device: str) -> None:
    data = _build(case, device)
    q_before = data["q"].clone()
    expected = _expected(case, data)
    out, lse = _run(case, data, device)
    assert_equals(out, expected.out, 1e-10)
    assert_equals(lse, expected.lse, 1e-10, "lse")
    assert torch.equal(data["q"], q_before)
    for name in ("k_cache", "v_cache"):
        written = getattr(expected, name)
        assert torch.equal(data[name].isnan(), written.isnan())
        assert_equals(data[name].nan_to_num(), written.nan_to_num(), 1e-12, name)


@pytest.mark.parametrize("seqlens_q", [(0, 0, 0), (1, 1, 1)], ids=str)
def test_empty_cache_and_queries(seqlens_q: tuple[int, ...], device: str) -> None:
    case = CacheCase(cache_seqlens=(0, 0, 0), seqlens_q=seqlens_q)
    out, lse = _run(case, _build(case, device), device)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_no_sequences(device: str) -> None:
    case = CacheCase()
    data = _build(case, device)
    out, lse = op("kvcache_fwd")(
        *(data["q"][:0], data["k_cache"], data["v_cache"], int32([], device)),
        *(None, None, None, None, 3, None, 1.0, -1, -1, 0.0, 0, 0),
    )
    assert out.shape == (0, 3, HEADS_Q, HEAD_DIM_V)
    assert lse.shape == (0, HEADS_Q, 3)


def test_no_pages(device: str) -> None:
    """A pool without pages and a table without columns: every sequence is empty."""
    case = CacheCase(cache_seqlens=(0, 0, 0), page_size=4)
    data = _build(case, device)
    for columns in (2, 0):
        data |= {
            "k_cache": data["k_cache"][:0],
            "v_cache": data["v_cache"][:0],
            "page_table": data["page_table"][:, :columns],
        }
        out, _ = _run(case, data, device)
        assert (out == 0).all()


def test_lengths_past_the_cache_are_cut(device: str) -> None:
    """The cache has 41 slots: 45 and 41 mean the same, and nothing outside is read or written."""
    data = _build(CacheCase(cache_seqlens=(41, 41, 41), seqlens_new=(2, 2, 2)), device)
    before = data["k_cache"].clone()
    results = []
    for length in (41, 45):
        case = CacheCase(cache_seqlens=(length,) * 3, seqlens_new=(2, 2, 2))
        results.append(_run(case, data, device))
        assert torch.equal(data["k_cache"], before)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_types(dtype: torch.dtype, device: str) -> None:
    """The same cache in fewer bits: within a few roundings of the fp64 result."""
    case = CASES["append_paged"]
    data = _build(case, device)
    data |= {name: data[name].to(dtype) for name in ("q", "k_cache", "v_cache", "k", "v")}
    expected = _expected(case, data)
    out, lse = _run(case, data, device)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_equals(out, expected.out, 8 * torch.finfo(dtype).eps)
    assert_equals(lse, expected.lse, 1e-5, "lse")
