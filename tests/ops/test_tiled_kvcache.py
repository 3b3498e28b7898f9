"""Tiled backend, attention against a cache: contiguous, indexed, padded, paged, appended to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_cases import op
from cache_cases import CASES, CacheCase, build, expected
from helpers import assert_equals, cu_seqlens, int32
from torch import Tensor

pytestmark = pytest.mark.usefixtures("length_reading")

F64 = torch.float64
SMALL = CacheCase(cache_seqlens=(9, 0, 30), slots=41, heads=(4, 2), head_dims=(16, 24))


def _tensor(values: tuple[int, ...] | None, device: str) -> Tensor | None:
    return None if values is None else int32(list(values), device)


def _build(case: CacheCase, device: str) -> dict[str, Any]:
    """Arguments of the reference on the device."""
    return {k: None if x is None else x.to(device) for k, x in build(case, F64).items()}


def _run(case: CacheCase, data: dict[str, Any], device: str) -> tuple[Tensor, Tensor]:
    """Calls the op; the caches in `data` are written."""
    scale = data["q"].shape[-1] ** -0.5 if case.scale is None else case.scale
    caches = (data["q"], data["k_cache"], data["v_cache"])
    seqlens = _tensor(case.cache_seqlens, device)
    tail = (
        *(data["page_table"], scale, *case.window, case.softcap, data["alibi_slopes"]),
        *(_tensor(case.batch_idx, device), _tensor(case.leftpad, device)),
        cu_seqlens(list(case.seqlens_q), device) if case.packed_q else None,
        *(max(case.seqlens_q), case.num_splits, 0),
    )
    if data["k"] is None:
        return op("kvcache_fwd")(*caches, seqlens, *tail)
    new_starts = cu_seqlens(list(case.seqlens_new or ()), device) if case.packed_new else None
    rotary = (data["rotary_cos"], data["rotary_sin"], case.rotary == "interleaved")
    return op("kvcache_append_fwd")(
        *(*caches, data["k"], data["v"], seqlens, *rotary, *tail),
        *(_tensor(case.rotary_seqlens, device), new_starts),
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference(case: CacheCase, device: str) -> None:
    data = _build(case, device)
    q_before = data["q"].clone()
    exact = expected(case, data)
    out, lse = _run(case, data, device)
    assert_equals(out, exact.out, 1e-10)
    assert_equals(lse, exact.lse, 1e-10, "lse")
    assert torch.equal(data["q"], q_before)
    for name in ("k_cache", "v_cache"):
        written = getattr(exact, name)
        assert torch.equal(data[name].isnan(), written.isnan())
        assert_equals(data[name].nan_to_num(), written.nan_to_num(), 1e-12, name)


@pytest.mark.parametrize("seqlens_q", [(0, 0, 0), (1, 1, 1)], ids=str)
def test_empty_cache_and_queries(seqlens_q: tuple[int, ...], device: str) -> None:
    case = dataclasses.replace(SMALL, cache_seqlens=(0, 0, 0), seqlens_q=seqlens_q)
    out, lse = _run(case, _build(case, device), device)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_no_sequences(device: str) -> None:
    data = _build(SMALL, device)
    out, lse = op("kvcache_fwd")(
        data["q"][:0], data["k_cache"], data["v_cache"], int32([], device), softmax_scale=1.0
    )
    assert out.shape == (0, 1, 4, 24)
    assert lse.shape == (0, 4, 1)


def test_no_pages(device: str) -> None:
    """A pool without pages and a table without columns: every sequence is empty."""
    case = dataclasses.replace(SMALL, cache_seqlens=(0, 0, 0), page_size=4)
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
    case = dataclasses.replace(SMALL, cache_seqlens=(41, 41, 41), seqlens_new=(2, 2, 2))
    data = _build(case, device)
    before = data["k_cache"].clone()
    results = []
    for length in (41, 45):
        longer = dataclasses.replace(case, cache_seqlens=(length,) * 3)
        results.append(_run(longer, data, device))
        assert torch.equal(data["k_cache"], before)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_types(dtype: torch.dtype, device: str) -> None:
    """The same cache in fewer bits: within a few roundings of the fp64 result."""
    case = CASES["append_paged"]
    data = _build(case, device)
    data |= {name: data[name].to(dtype) for name in ("q", "k_cache", "v_cache", "k", "v")}
    exact = expected(case, data)
    out, lse = _run(case, data, device)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_equals(out, exact.out, 8 * torch.finfo(dtype).eps)
    assert_equals(lse, exact.lse, 1e-5, "lse")
