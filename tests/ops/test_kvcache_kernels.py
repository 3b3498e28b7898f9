"""Attention against a cache on a GPU: every set of kernels against fp64.

The rule is that of attention_cases: at most twice the error of plain PyTorch in the same dtype.
What no sequence uses is NaN in the caches and a page id far outside the pool in the page table, so
a read of it shows. A problem that no kernel takes is an error here, never a test of the tiled
backend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cache_cases import CASES, CacheCase, build, expected
from helpers import assert_close_2x, assert_equals, cu_seqlens, int32
from kernel_cases import BF16, DEVICE, DTYPES
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext import UnsupportedError, plans

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

NO_PAGE = 2_147_480_000


def _tensor(values: tuple[int, ...] | None) -> Tensor | None:
    return None if values is None else int32(list(values), DEVICE)


def on_device(case: CacheCase, data: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the call; page ids behind the length are garbage."""
    moved = {name: None if x is None else x.to(DEVICE) for name, x in data.items()}
    if case.page_size is not None and case.cache_seqlens is not None:
        rows = case.batch_idx or range(case.num_rows)
        new = case.seqlens_new or (0,) * len(case.cache_seqlens)
        table = torch.full_like(moved["page_table"], NO_PAGE)
        for row, length, added in zip(rows, case.cache_seqlens, new, strict=True):
            pages = -(-(length + added) // case.page_size)
            table[row, :pages] = moved["page_table"][row, :pages]
        moved["page_table"] = table
    return moved | {
        "cache_seqlens": _tensor(case.cache_seqlens),
        "cache_batch_idx": _tensor(case.batch_idx),
        "cache_leftpad": _tensor(case.leftpad),
        "cu_seqlens_q": cu_seqlens(list(case.seqlens_q), DEVICE) if case.packed_q else None,
        "max_seqlen_q": max(case.seqlens_q) if case.packed_q else None,
        "cu_seqlens_k_new": cu_seqlens(list(case.seqlens_new or ()), DEVICE)
        if case.packed_new
        else None,
        "rotary_seqlens": _tensor(case.rotary_seqlens),
        "rotary_interleaved": case.rotary == "interleaved",
        "softmax_scale": case.scale,
        "window_size": case.window,
        "softcap": case.softcap,
        "num_splits": case.num_splits,
        "return_softmax_lse": True,
    }


def check(case: CacheCase, dtype: torch.dtype) -> None:
    """Result, lse and caches of a call against the reference."""
    data = build(case, dtype)
    call = on_device(case, data)
    out, lse = fa.flash_attn_with_kvcache(**call)
    exact, plain = expected(case, data), expected(case, data, upcast=False)
    assert_close_2x(out.cpu(), exact.out, plain.out)
    assert_close_2x(lse.cpu(), exact.lse, plain.lse, name="lse")
    for name in ("k_cache", "v_cache"):
        written, wanted = call[name].cpu(), getattr(plain, name)
        assert torch.equal(written.isnan(), wanted.isnan())
        rounding = torch.finfo(dtype).eps * 8 if case.rotary else 0.0
        assert_equals(written.nan_to_num(), wanted.nan_to_num(), rounding, name)


def test_the_plan_is_a_kernel(kernels: str) -> None:
    q = torch.empty(2, 1, 8, 64, dtype=BF16, device=DEVICE)
    cache = torch.empty(2, 100, 2, 64, dtype=BF16, device=DEVICE)
    step = plans.explain(q, cache, cache, form="kvcache").attention
    assert (step.family, step.backend) == ("decode", plans.KERNEL)
    assert kernels == "native" or step.kernel == "sm80_decode_hdim64_bf16"


def test_the_plan_of_many_rows_is_wgmma(kernels: str) -> None:
    q = torch.empty(3, 9, 16, 128, dtype=BF16, device=DEVICE)
    cache = torch.empty(3, 333, 2, 128, dtype=BF16, device=DEVICE)
    step = plans.explain(q, cache, cache, form="kvcache").attention
    is_sm90 = kernels == "native" and torch.cuda.get_device_capability()[0] == 9
    assert step.tile == ((128, 64) if is_sm90 else (64, 64))


def test_what_no_kernel_takes_is_an_error() -> None:
    """The guard of this file: without it the tiled backend could pass all tests."""
    q = torch.empty(2, 1, 4, 63, dtype=BF16, device=DEVICE)
    cache = torch.empty(2, 100, 4, 63, dtype=BF16, device=DEVICE)
    with pytest.raises(UnsupportedError, match="no kernel takes these inputs"):
        fa.flash_attn_with_kvcache(q, cache, cache)


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases(case: CacheCase, dtype: torch.dtype) -> None:
    check(case, dtype)


SHORT_CASES = [pytest.param(case, id=name) for name, case in CASES.items() if case.slots < 1000]


def check_by_tiles(case: CacheCase, head_dim: int, many_tiles: bool) -> None:
    tiles = len(case.seqlens_q) * case.heads[1]
    times = 144 // tiles + 1 if many_tiles else 1
    heads = (case.heads[0] * times, case.heads[1] * times)
    check(replace(case, head_dims=(head_dim, head_dim), heads=heads), BF16)


@pytest.mark.parametrize("many_tiles", [False, True], ids=["few_tiles", "many_tiles"])
@pytest.mark.parametrize("case", SHORT_CASES)
def test_cases_at_head_dim_128(case: CacheCase, many_tiles: bool) -> None:
    check_by_tiles(case, 128, many_tiles)


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize(
    ("head_dim", "many_tiles"),
    [(64, True), (96, False), (96, True), (192, True)],
    ids=lambda value: str(value) if value > 1 else ("many_tiles" if value else "few_tiles"),
)
@pytest.mark.parametrize("case", SHORT_CASES)
def test_cases_by_tiles(case: CacheCase, head_dim: int, many_tiles: bool) -> None:
    """SM90 has other CTAs for few rows where tiles are few beside SMs than where they are many."""
    check_by_tiles(case, head_dim, many_tiles)


@pytest.mark.parametrize("num_splits", [1, 2, 7])
@pytest.mark.parametrize(
    "name",
    ["long", "many_queries_causal", "pages_of_16", "packed_q", "few_tiles", "many_tiles_paged"],
)
def test_splits(name: str, num_splits: int) -> None:
    check(CacheCase(**{**CASES[name].__dict__, "num_splits": num_splits}), BF16)


@DTYPES
@pytest.mark.parametrize(
    "head_dims",
    [*((d, d) for d in (8, 32, 64, 72, 96, 128, 160, 192, 200, 256)), (192, 128), (64, 256)],
    ids=str,
)
def test_head_dims(head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    for options in ({}, {"seqlens_q": (20, 20, 20), "window": (-1, 0), "page_size": 16}):
        check(CacheCase(head_dims=head_dims, **options), dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000])
def test_lengths(length: int) -> None:
    for seqlen_q in (1, 2, 5, 16):
        if seqlen_q <= length:
            check(
                CacheCase(
                    cache_seqlens=(length, max(0, length - 1)),
                    slots=length + 3,
                    seqlens_q=(seqlen_q, seqlen_q),
                    window=(-1, 0),
                ),
                BF16,
            )


def test_many_sequences() -> None:
    """More sequences than threads of a CTA, of very different lengths."""
    lengths = tuple(int(n) for n in torch.randint(0, 200, (300,)))
    check(CacheCase(cache_seqlens=lengths, slots=200, seqlens_q=(1,) * 300, page_size=16), BF16)


def test_cache_with_strides() -> None:
    """Keys and values in one tensor, heads before tokens."""
    kv = torch.randn(2, 2, 4, 100, 64, dtype=BF16, device=DEVICE)
    k, v = kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2)
    q = torch.randn(2, 1, 4, 64, dtype=BF16, device=DEVICE)
    out = fa.flash_attn_with_kvcache(q, k, v)
    assert torch.equal(out, fa.flash_attn_with_kvcache(q, k.contiguous(), v.contiguous()))


def test_cache_of_one_memory() -> None:
    """All sequences read one cache: a stride of 0."""
    k, v = (torch.randn(1, 200, 2, 64, dtype=BF16, device=DEVICE) for _ in range(2))
    q = torch.randn(3, 9, 16, 64, dtype=BF16, device=DEVICE)
    out = fa.flash_attn_with_kvcache(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
    apart = fa.flash_attn_with_kvcache(q, k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1))
    assert_equals(out.float(), apart.float(), 1e-2, "out")


def test_no_page_at_all() -> None:
    pool = torch.empty(0, 16, 2, 64, dtype=BF16, device=DEVICE)
    q = torch.randn(3, 9, 16, 64, dtype=BF16, device=DEVICE)
    table = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    out = fa.flash_attn_with_kvcache(
        q, pool, pool, cache_seqlens=_tensor((0, 0, 0)), page_table=table
    )
    assert not out.any()


@DTYPES
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("seqlen", [1, 3, 70])
@pytest.mark.parametrize(("page_size", "head_dim", "rotary_dim"), [(None, 128, 128), (16, 96, 32)])
def test_append_in_the_call_equals_its_steps(
    interleaved: bool,
    seqlen: int,
    page_size: int | None,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
) -> None:
    """Bitwise: append_kv, rotary of q and attention in calls of their own."""
    case = CacheCase(
        head_dims=(head_dim, head_dim),
        seqlens_q=(seqlen,) * 3,
        seqlens_new=(seqlen,) * 3,
        slots=400,
        page_size=page_size,
        window=(-1, 0),
    )
    call = on_device(case, build(case, dtype))
    angles = torch.rand(400, rotary_dim // 2, device=DEVICE) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k, v, before = call.pop("k"), call.pop("v"), call["cache_seqlens"]
    apart = {name: call[name].clone() for name in ("k_cache", "v_cache")}
    call |= {"rotary_interleaved": interleaved}
    together = fa.flash_attn_with_kvcache(**call | {"rotary_cos": cos, "rotary_sin": sin}, k=k, v=v)
    ops = torch.ops.flash_attn_ext
    table = (cos, sin, None, interleaved)
    ops.append_kv.default(*apart.values(), k, v, before, None, call["page_table"], None, *table)
    q = ops.rotary.default(call["q"], cos, sin, before, None, seqlen, interleaved, False, False)
    steps = fa.flash_attn_with_kvcache(
        **call | apart | {"q": q, "cache_seqlens": before + seqlen, "rotary_cos": None}
    )
    assert all(torch.equal(a, b) for a, b in zip(together, steps, strict=True))
    for name, cache in apart.items():
        assert torch.equal(call[name].nan_to_num(), cache.nan_to_num())
        assert torch.equal(call[name].isnan(), cache.isnan())


def test_nothing_is_written_outside_the_caches() -> None:
    """Lengths and page ids that are out of range, among guard rows on both sides."""
    pool = torch.zeros(2, 14, 16, 2, 64, device=DEVICE, dtype=BF16)
    caches = pool[:, 3:11]
    table = torch.arange(8, dtype=torch.int32, device=DEVICE).view(4, 2)
    table[3] = torch.tensor([NO_PAGE, -NO_PAGE])
    q, k, v = (torch.randn(4, 5, heads, 64, device=DEVICE, dtype=BF16) for heads in (8, 2, 2))
    lengths = int32([30, 1_000_000, -3, 2], DEVICE)
    for page_table in (table, None):
        pool.zero_()
        rows = caches if page_table is not None else caches[:, :4]
        fa.flash_attn_with_kvcache(
            q, *rows, k, v, cache_seqlens=lengths, page_table=page_table, causal=True
        )
        assert (pool[:, :3] == 0).all()
        assert (pool[:, 11:] == 0).all()
        assert (rows[0] != 0).any()


@pytest.mark.parametrize("name", ["long", "few_tiles", "many_tiles_paged", "prompts"])
def test_results_repeat(name: str) -> None:
    call = on_device(CASES[name], build(CASES[name], BF16))
    first = fa.flash_attn_with_kvcache(**call)
    for _ in range(20):
        again = fa.flash_attn_with_kvcache(**call)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_split_does_not_depend_on_the_batch() -> None:
    """num_splits=1: bitwise the same alone, in a batch, and among other queries."""
    case = CacheCase(
        cache_seqlens=(700, 64, 1000), slots=1000, seqlens_q=(9, 9, 9), window=(-1, 0), num_splits=1
    )
    call = on_device(case, build(case, BF16))
    out, lse = fa.flash_attn_with_kvcache(**call)
    for batch, length in enumerate(case.cache_seqlens or ()):
        row = slice(batch, batch + 1)
        caches = {name: call[name][row] for name in ("k_cache", "v_cache")}
        alone = {**call, **caches, "q": call["q"][row], "cache_seqlens": int32([length], DEVICE)}
        out_alone, lse_alone = fa.flash_attn_with_kvcache(**alone)
        assert torch.equal(out_alone, out[row])
        assert torch.equal(lse_alone, lse[row])
        for query in range(9):
            one = {
                **alone,
                "q": call["q"][row, query : query + 1],
                "cache_seqlens": int32([length - 8 + query], DEVICE),
            }
            out_one, lse_one = fa.flash_attn_with_kvcache(**one)
            assert torch.equal(out_one[0, 0], out[batch, query])
            assert torch.equal(lse_one[0, :, 0], lse[batch, :, query])


def generate(num_splits: int, steps: list[int], page_size: int | None, d: int) -> Tensor:
    """Outputs of a sequence that enters the cache in steps, with rotary."""
    torch.manual_seed(3)
    total, heads_q, heads_kv = sum(steps), 8, 2
    q = torch.randn(1, total, heads_q, d).to(DEVICE, BF16)
    k, v = (torch.randn(1, total, heads_kv, d).to(DEVICE, BF16) for _ in range(2))
    angles = torch.rand(total + 16, d // 2).to(DEVICE) * 6
    shape = (1, total) if page_size is None else (-(-total // page_size), page_size)
    caches = [torch.full((*shape, heads_kv, d), torch.nan).to(DEVICE, BF16) for _ in range(2)]
    table = None
    if page_size is not None:
        table = torch.randperm(shape[0], dtype=torch.int32, device=DEVICE)[None]
    outs, length = [], int32([0], DEVICE)
    for rows in torch.arange(total, device=DEVICE).split(steps):
        outs.append(
            fa.flash_attn_with_kvcache(
                q[:, rows],
                *caches,
                k[:, rows],
                v[:, rows],
                rotary_cos=angles.cos().to(BF16),
                rotary_sin=angles.sin().to(BF16),
                cache_seqlens=length,
                page_table=table,
                causal=True,
                num_splits=num_splits,
            )
        )
        length += len(rows)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("page_size", [None, 16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_generation_equals_prefill(page_size: int | None, head_dim: int) -> None:
    """Token by token, in chunks and at once: the same to rounding, bitwise with one split."""
    prefill = generate(1, [512], page_size, head_dim)
    assert torch.equal(generate(1, [1] * 512, page_size, head_dim), prefill)
    assert torch.equal(generate(1, [64, 1, 70, 377], page_size, head_dim), prefill)
    last_place = 2**-5  # of bf16 below 8
    assert_equals(generate(0, [1] * 512, page_size, head_dim), prefill.double(), last_place)


def test_graph_with_changing_lengths() -> None:
    """One captured call serves every length; its counters are zero again behind each replay."""
    lengths = torch.tensor([0, 1, 64, 700, 1000], dtype=torch.int32, device=DEVICE)
    q = torch.randn(5, 1, 8, 64, device=DEVICE, dtype=BF16)
    k, v = (torch.randn(5, 1000, 2, 64, device=DEVICE, dtype=BF16) for _ in range(2))
    fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths) for _ in range(3)]
    for shift in range(4):
        lengths.copy_(lengths.roll(shift))
        q.normal_()
        graph.replay()
        direct = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
        assert all(torch.equal(out, direct) for out in outs)


@pytest.mark.parametrize("lengths", ["seqused_k", "cu_seqlens_k"])
def test_varlen_with_pages(lengths: str) -> None:
    case = CacheCase(
        cache_seqlens=(300, 31, 129),
        seqlens_q=(50, 7, 1),
        packed_q=True,
        page_size=16,
        window=(-1, 0),
    )
    data = build(case, BF16)
    call = on_device(case, data)
    kept = {"seqused_k": call["cache_seqlens"]}
    if lengths == "cu_seqlens_k":
        kept = {"cu_seqlens_k": cu_seqlens(list(case.cache_seqlens or ()), DEVICE)}
    arguments: dict[str, Any] = {
        "cu_seqlens_k": None,
        "max_seqlen_q": 50,
        "max_seqlen_k": 300,
        "block_table": call["page_table"],
        "causal": True,
        **kept,
    }
    q, k, v = call["q"], call["k_cache"], call["v_cache"]
    out = fa.flash_attn_varlen_func(q, k, v, call["cu_seqlens_q"], **arguments)
    exact, plain = expected(case, data), expected(case, data, upcast=False)
    assert_close_2x(out.cpu(), exact.out, plain.out)
    into = torch.full_like(out, torch.nan)
    fa.flash_attn_varlen_func(q, k, v, call["cu_seqlens_q"], **arguments, out=into)
    assert torch.equal(into, out)


def test_rows_behind_the_last_sequence_are_zero() -> None:
    q = torch.randn(40, 8, 64, device=DEVICE, dtype=BF16)
    cache = torch.randn(2, 100, 2, 64, device=DEVICE, dtype=BF16)
    starts = int32([0, 3, 5], DEVICE)
    out, lse = fa.flash_attn_with_kvcache(
        q, cache, cache, cu_seqlens_q=starts, max_seqlen_q=3, return_softmax_lse=True
    )
    assert (out[5:] == 0).all()
    assert (lse[:, 5:] == -torch.inf).all()
    assert out[:5].isfinite().all()
