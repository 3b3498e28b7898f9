"""Problems of attention against a cache, for every implementation: cases, tensors, results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers import cu_seqlens
from torch import Tensor

from flash_attn_ext.reference import CacheResult, kvcache_attention_reference


@dataclass(frozen=True)
class CacheCase:
    """What is in the cache and how it is found; lengths are those before the append."""

    cache_seqlens: tuple[int, ...] | None = (300, 0, 129)
    slots: int = 333
    heads: tuple[int, int] = (8, 2)
    head_dims: tuple[int, int] = (64, 64)
    batch_idx: tuple[int, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    page_size: int | None = None
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: int = 0  # dimensions of the slopes
    scale: float | None = None
    seqlens_q: tuple[int, ...] = (1, 1, 1)
    packed_q: bool = False
    seqlens_new: tuple[int, ...] | None = None
    packed_new: bool = False
    rotary: str | None = None  # "interleaved" | "halves"
    rotary_seqlens: tuple[int, ...] | None = None
    num_splits: int = 0

    @property
    def num_rows(self) -> int:
        return 5 if self.batch_idx is not None else len(self.seqlens_q)


CASES = {
    "plain": CacheCase(),
    "whole_cache": CacheCase(cache_seqlens=None),
    "equal_lengths": CacheCase(cache_seqlens=(12, 12, 12), window=(-1, 0)),
    "long": CacheCase(cache_seqlens=(5000, 70, 1), slots=5000),
    "values_of_another_size": CacheCase(head_dims=(32, 48), page_size=7),
    "mha": CacheCase(heads=(3, 3)),
    "mqa": CacheCase(heads=(20, 1)),
    "group_of_96": CacheCase(heads=(96, 1), window=(-1, 0), seqlens_q=(2, 2, 2)),
    "queries_causal": CacheCase(seqlens_q=(3, 3, 3), window=(-1, 0)),
    "many_queries_causal": CacheCase(seqlens_q=(70, 70, 70), window=(-1, 0)),
    "window": CacheCase(window=(40, 0), seqlens_q=(5, 5, 5)),
    "window_both": CacheCase(window=(100, 7), seqlens_q=(40, 40, 40)),
    "softcap": CacheCase(softcap=3.0),
    "alibi": CacheCase(alibi=1, seqlens_q=(4, 4, 4), window=(-1, 0)),
    "alibi_by_batch_softcap": CacheCase(alibi=2, softcap=5.0, seqlens_q=(33, 33, 33)),
    "negative_scale": CacheCase(scale=-0.1),
    "zero_scale": CacheCase(scale=0.0),
    "batch_idx": CacheCase(batch_idx=(4, 1, 0)),
    "leftpad": CacheCase(leftpad=(64, 0, 129), window=(-1, 0), seqlens_q=(2, 2, 2)),
    **{f"pages_of_{n}": CacheCase(page_size=n) for n in (1, 7, 16, 64, 100, 256)},
    "paged_batch_idx_leftpad": CacheCase(
        page_size=5, batch_idx=(3, 0, 4), leftpad=(20, 0, 7), window=(-1, 0), seqlens_q=(9, 9, 9)
    ),
    "packed_q": CacheCase(seqlens_q=(50, 0, 2), packed_q=True, window=(-1, 0), alibi=1),
    "packed_q_paged": CacheCase(
        seqlens_q=(5, 0, 2), packed_q=True, page_size=16, batch_idx=(1, 2, 4), leftpad=(1, 0, 3)
    ),
    "append": CacheCase(seqlens_new=(3, 3, 3), seqlens_q=(3, 3, 3), window=(-1, 0)),
    "append_indexed": CacheCase(seqlens_new=(3, 3, 3), batch_idx=(4, 1, 0), leftpad=(1, 2, 0)),
    "append_paged": CacheCase(seqlens_new=(4, 4, 4), page_size=16, batch_idx=(4, 1, 0)),
    "append_packed": CacheCase(
        seqlens_q=(5, 0, 2),
        packed_q=True,
        seqlens_new=(2, 0, 6),
        packed_new=True,
        window=(-1, 0),
        page_size=3,
    ),
    "rotary": CacheCase(seqlens_new=(1, 1, 1), rotary="interleaved"),
    "rotary_causal": CacheCase(
        seqlens_new=(3, 3, 3), seqlens_q=(3, 3, 3), rotary="halves", window=(-1, 0)
    ),
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
    "rotary_packed_paged_leftpad": CacheCase(
        seqlens_q=(70, 0, 2),
        packed_q=True,
        seqlens_new=(9, 1, 17),
        packed_new=True,
        leftpad=(3, 0, 100),
        page_size=5,
        batch_idx=(3, 0, 4),
        rotary="interleaved",
        window=(-1, 0),
    ),
    "new_keys_before_the_window": CacheCase(
        seqlens_new=(150, 150, 150), slots=500, rotary="halves", window=(20, 0)
    ),
    # SM90: many rows with wgmma, in few tiles and in many, and few rows of a long cache.
    "few_tiles": CacheCase(
        heads=(16, 2), head_dims=(128, 128), seqlens_q=(9, 9, 9), window=(-1, 0)
    ),
    "few_tiles_packed_window": CacheCase(
        heads=(28, 4), head_dims=(128, 96), seqlens_q=(15, 0, 7), packed_q=True, window=(60, 0)
    ),
    "many_tiles": CacheCase(
        heads=(32, 8), head_dims=(128, 128), seqlens_q=(99, 99, 99), slots=400, window=(-1, 0)
    ),
    "many_tiles_paged": CacheCase(
        cache_seqlens=(700, 0, 70),
        slots=704,
        heads=(32, 16),
        head_dims=(96, 128),
        seqlens_q=(80, 3, 5),
        packed_q=True,
        page_size=32,
        batch_idx=(4, 1, 0),
        window=(-1, 0),
    ),
    "prompts": CacheCase(
        cache_seqlens=(200, 40, 233),
        slots=256,
        heads=(32, 4),
        seqlens_q=(200, 40, 233),
        packed_q=True,
        page_size=64,
        window=(-1, 0),
    ),
    "many_rows_appended": CacheCase(
        heads=(16, 2),
        head_dims=(128, 128),
        seqlens_q=(9, 9, 9),
        seqlens_new=(9, 9, 9),
        page_size=16,
        rotary="halves",
        window=(-1, 0),
    ),
    "many_rows_leftpad": CacheCase(
        heads=(16, 2), leftpad=(64, 0, 129), seqlens_q=(20, 20, 20), window=(-1, 0)
    ),
    "many_rows_leftpad_paged": CacheCase(
        heads=(16, 2), leftpad=(64, 0, 129), seqlens_q=(20, 20, 20), page_size=64
    ),
    **{
        f"many_rows_pages_of_{n}": CacheCase(
            heads=(16, 2), head_dims=(128, 128), seqlens_q=(9, 9, 9), page_size=n
        )
        for n in (8, 64, 128, 192, 256)
    },
    "16_rows_long": CacheCase(
        cache_seqlens=(4500, 0, 1), slots=4544, heads=(16, 1), head_dims=(128, 128), page_size=64
    ),
    # A CTA has several tiles without a key one after the other, and then one with keys.
    "empty_sequences": CacheCase(
        cache_seqlens=((0,) * 5 + (40,)) * 100, slots=64, heads=(8, 4), seqlens_q=(1,) * 600
    ),
    "empty_tiles": CacheCase(
        cache_seqlens=(300, 0, 129), slots=400, heads=(45, 5), seqlens_q=(200,) * 3, window=(-1, 0)
    ),
    # Enough queries for the forward kernel of SM90.
    "prefill": CacheCase(heads=(36, 4), seqlens_q=(200, 200, 200), slots=400, window=(-1, 0)),
    "prefill_appended": CacheCase(
        heads=(36, 4),
        seqlens_q=(200, 200, 200),
        seqlens_new=(200, 200, 200),
        slots=555,
        leftpad=(50, 0, 0),
        rotary="interleaved",
        window=(-1, 0),
    ),
}
"""Name -> case."""


def _list(values: tuple[int, ...] | None) -> list[int] | None:
    return None if values is None else list(values)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _sequences(
    seqlens: tuple[int, ...], packed: bool, heads: int, dim: int, dtype: torch.dtype
) -> Tensor:
    shape = (sum(seqlens),) if packed else (len(seqlens), seqlens[0])
    return _random(*shape, heads, dim, dtype=dtype)


def build(case: CacheCase, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors of a call, on the CPU; all that no sequence uses is NaN."""
    heads_q, heads_kv = case.heads
    used = case.cache_seqlens or (case.slots,) * len(case.seqlens_q)
    rows = case.batch_idx or range(case.num_rows)
    contents = [torch.full((case.num_rows, case.slots, heads_kv, d), torch.nan, dtype=dtype)
                for d in case.head_dims]  # fmt: skip
    leftpad = case.leftpad or (0,) * len(used)
    for cache in contents:
        for row, pad, length in zip(rows, leftpad, used, strict=False):
            cache[row, pad:length] = _random(max(length - pad, 0), *cache.shape[2:], dtype=dtype)
    table = None
    if case.page_size is not None:
        max_pages = -(-case.slots // case.page_size)
        pages = case.num_rows * max_pages
        table = torch.randperm(pages + 3)[:pages].view(case.num_rows, max_pages)
        for i, cache in enumerate(contents):
            pool = torch.full((pages + 3, case.page_size, *cache.shape[2:]), torch.nan, dtype=dtype)
            padded = torch.nn.functional.pad(
                cache, (0, 0, 0, 0, 0, max_pages * case.page_size - case.slots), value=torch.nan
            )
            pool[table] = padded.view(*table.shape, *pool.shape[1:])
            contents[i] = pool
    angles = torch.rand(case.slots + 8, case.head_dims[0] // 4) * 6
    new, d, dv = case.seqlens_new, *case.head_dims
    slopes = {0: None, 1: torch.rand(heads_q), 2: torch.rand(len(case.seqlens_q), heads_q)}
    return {
        "q": _sequences(case.seqlens_q, case.packed_q, heads_q, d, dtype),
        "k_cache": contents[0],
        "v_cache": contents[1],
        "k": None if not new else _sequences(new, case.packed_new, heads_kv, d, dtype),
        "v": None if not new else _sequences(new, case.packed_new, heads_kv, dv, dtype),
        "page_table": None if table is None else table.int(),
        "rotary_cos": angles.cos().to(dtype) if case.rotary else None,
        "rotary_sin": angles.sin().to(dtype) if case.rotary else None,
        "alibi_slopes": slopes[case.alibi],
    }


def expected(case: CacheCase, data: dict[str, Any], upcast: bool = True) -> CacheResult:
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
        softmax_scale=case.scale,
        window_size=case.window,
        softcap=case.softcap,
        upcast=upcast,
    )
