"""make_plan of attention against a KV cache: which kernel, tile and number of CTAs."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
from plan_problems import ALL, BUILT, DEVICES, problem, reasons

# Rows, keys of a block, threads.
DEEP, MANY, WGMMA, WGMMA_FEW_TILES = (16, 64, 128), (64, 64, 128), (128, 128, 384), (128, 64, 384)
WIDE = {64: (16, 256, 256), 96: (16, 256, 256), 128: (16, 128, 256), 192: DEEP, 256: DEEP}
SMALL = {64: (16, 128, 128), 96: (16, 64, 64), 128: (16, 64, 64), 192: (16, 64, 64), 256: DEEP}


def tile(plan: dict[str, Any]) -> tuple[int, int, int]:
    m, n = plan["tile"]
    return m, n, plan["num_threads"]


@pytest.mark.parametrize("device", [*DEVICES])
def test_decode_on_each_device(introspect: ModuleType, device: str) -> None:
    """Two CTAs to an SM at most, if both fit, share out the blocks of keys; or a wide one."""
    major, _, num_sms, smem_kb = DEVICES[device]
    own = "sm90" if major == 9 else "sm80"
    for head_dim, dtype in itertools.product(BUILT, ("fp16", "bf16")):
        sizes = {"head_dim": head_dim - 8, "head_dim_v": head_dim, "seqlen_k": 100_000}
        plan = introspect.make_plan(
            problem("decode", dtype=dtype, **sizes, seqlen_q=4), device, ALL
        )
        assert plan["kernel"] == f"{own}_decode_hdim{head_dim}_{dtype}"
        assert tile(plan) == (WIDE[head_dim] if own == "sm90" else DEEP)
        # 2 sequences with 4 KV heads are 8 tiles, each for as many CTAs.
        two = smem_kb * 1024 >= 2 * plan["smem_bytes"] and head_dim in (64, 256)
        assert plan["num_ctas"] == min((1 + two) * num_sms // 8 * 8, 768)
        assert plan["smem_bytes"] <= smem_kb * 1024
        words = plan["num_ctas"] * (2 * 16 * (head_dim + 8) + 1)
        assert plan["workspace_bytes"] == 4 * words


@pytest.mark.parametrize(
    ("fields", "expected", "num_ctas"),
    [
        ({"seqlen_q": 1, "num_heads_kv": 1, "num_heads_q": 16}, WIDE[128], 2),
        ({"seqlen_q": 1, "num_heads_kv": 1, "num_heads_q": 17}, WGMMA_FEW_TILES, 2 * 2),
        ({"seqlen_q": 16}, WIDE[128], 2 * 4),
        ({"seqlen_q": 17}, WGMMA_FEW_TILES, 2 * 4 * 2),
        ({"seqlen_q": 129}, WGMMA, 2 * 4 * 2),
        ({"seqlen_q": 17, "batch_size": 17}, WGMMA, 17 * 4),
        ({"seqlen_q": 65, "softcap": True}, MANY, 2 * 4 * 2 * 2),
        ({"seqlen_q": 1, "num_splits": 1}, MANY, 2 * 4),  # no tile is split
        ({"seqlen_q": 1, "num_splits": 3}, WIDE[128], 2 * 4),
        ({"seqlen_q": 1, "seqlen_k": 0}, WIDE[128], 2 * 4),
        ({"seqlen_q": 1, "varlen": True, "total_q": 2}, WIDE[128], 3 * 4),
        ({"batch_size": 0}, WGMMA_FEW_TILES, 0),
    ],
)
def test_decode_tile(
    introspect: ModuleType, fields: dict[str, int], expected: tuple[int, ...], num_ctas: int
) -> None:
    """Rows are queries and the query heads of one KV head; no more CTAs than blocks of keys."""
    plan = introspect.make_plan(problem("decode", **fields), "h100", ALL)
    assert (tile(plan), plan["num_ctas"]) == (expected, num_ctas)
    assert (plan["workspace_bytes"] == 0) == (fields.get("num_splits") == 1 or num_ctas == 0)


@pytest.mark.parametrize(
    ("fields", "on_h100"),
    [
        ({}, WGMMA),
        ({"dtype": "fp16", "head_dim": 56, "head_dim_v": 64}, WGMMA),
        ({"num_splits": 2, "window_left": 100, "varlen": True, "total_q": 50}, WGMMA),
        ({"leftpad": True}, WGMMA),
        ({"page_size": 16}, WGMMA),
        ({"page_size": 256}, WGMMA),
        ({"page_size": 8}, MANY),
        ({"page_size": 48}, MANY),
        ({"page_size": 192}, MANY),
        ({"leftpad": True, "page_size": 64}, MANY),
        ({"head_dim": 96, "head_dim_v": 96}, MANY),
        ({"broadcast": True}, MANY),
        ({"softcap": True}, MANY),
        ({"alibi": True}, MANY),
        ({"positive_scale": False}, MANY),
        ({"num_splits": 1}, MANY),
    ],
)
def test_decode_of_many_rows(
    introspect: ModuleType, fields: dict[str, Any], on_h100: tuple[int, ...]
) -> None:
    """wgmma where TMA can copy the keys, with the plain softmax, and only on SM90."""
    sizes = {"seqlen_q": 100, "seqlen_k": 100_000, "num_heads_kv": 1, "num_heads_q": 8}
    asked = problem("decode", **{**sizes, **fields})
    for device, expected in (("h100", on_h100), ("a100", MANY)):
        plan = introspect.make_plan(asked, device, ALL)
        assert tile(plan) == expected
        wgmma = expected[0] == 128
        assert plan["num_ctas"] <= (1 if wgmma else 2) * DEVICES[device][2]
    assert tile(introspect.make_plan(asked, "h100", ["sm80"])) == MANY


@pytest.mark.parametrize(
    ("fields", "on_h100"),
    [
        ({}, WGMMA_FEW_TILES),
        ({"num_heads_q": 4 * 8}, WIDE[128]),
        ({"seqlen_k": 1024}, WIDE[128]),
        ({"batch_size": 2}, WIDE[128]),
        ({"batch_size": 34, "page_size": 64, "appends": True}, SMALL[128]),
        ({"batch_size": 128, "seqlen_k": 65536, "page_size": 64}, SMALL[128]),
        ({"appends": True}, WGMMA_FEW_TILES),
        ({"alibi": True}, WIDE[128]),
        ({"head_dim": 256, "head_dim_v": 256}, DEEP),
    ],
)
def test_decode_of_16_rows(
    introspect: ModuleType, fields: dict[str, Any], on_h100: tuple[int, ...]
) -> None:
    """Very few tiles of a long cache are cut so often that sharing the merge pays."""
    sizes = {"batch_size": 1, "seqlen_q": 1, "seqlen_k": 8192, "num_heads_kv": 4}
    asked = problem("decode", **{**sizes, "num_heads_q": 4 * 16, **fields})
    assert tile(introspect.make_plan(asked, "h100", ALL)) == on_h100
    assert tile(introspect.make_plan(asked, "a100", ALL)) == DEEP


@pytest.mark.parametrize("head_dim", BUILT)
def test_wide_and_small_ctas(introspect: ModuleType, head_dim: int) -> None:
    """Up to a tile for two SMs, or for one if the caches are short, a CTA is alone on its SM."""
    for batch_size, seqlen_k, expected in (
        (1, 65536, WIDE),
        (16, 65536, WIDE),
        (17, 65536, SMALL),
        (17, 4096, SMALL),
        (17, 4095, WIDE),
        (33, 4095, WIDE),
        (34, 64, SMALL),
    ):
        sizes = {"batch_size": batch_size, "seqlen_k": seqlen_k, "num_heads_kv": 4}
        asked = problem("decode", head_dim=head_dim, head_dim_v=head_dim, seqlen_q=1, **sizes)
        assert tile(introspect.make_plan(asked, "h200", ALL)) == expected[head_dim]
        assert tile(introspect.make_plan(asked, "h200", ["sm80"])) == DEEP


D96 = {"head_dim": 96, "head_dim_v": 96}


@pytest.mark.parametrize(
    ("device", "fields", "num_ctas"),
    [
        ("h200", {"batch_size": 1}, 16 * 8),  # one to an SM, as many for each tile
        ("h200", {"batch_size": 16, "seqlen_k": 1024}, 128),  # one for each tile
        ("h200", {"batch_size": 16, "seqlen_k": 1024, "varlen": True, "total_q": 16}, 128),
        ("h200", {"batch_size": 12, "seqlen_k": 1024}, 96),
        ("h200", {"batch_size": 6, "seqlen_k": 1024}, 2 * 48),
        ("h200", {"batch_size": 16}, 4 * 128),  # small ones
        ("h200", {"batch_size": 16, **D96}, 4 * 128),
        ("h200", {"batch_size": 24, "seqlen_k": 1024}, 2 * 192),
        ("h200", {"batch_size": 128, "seqlen_k": 4096}, 512),  # two tiles for each
        ("h200", {"batch_size": 83, "seqlen_k": 4096}, 528),  # cut: two for each were 332 CTAs
        ("h200", {"batch_size": 16, "head_dim": 192, "head_dim_v": 192}, 4 * 128),
        ("h200", {"batch_size": 16, "head_dim": 256, "head_dim_v": 256}, 256),
        ("h200", {"batch_size": 16, "alibi": True, "seqlen_q": 16}, 256),  # 64 rows
        ("a100", {"batch_size": 1}, 13 * 8),
        ("a100", {"batch_size": 128}, 103),  # ten tiles for each
        ("rtx4090", {"batch_size": 128}, 128),
    ],
)
def test_decode_ctas(
    introspect: ModuleType, device: str, fields: dict[str, Any], num_ctas: int
) -> None:
    """Full caches are cut at the ends of tiles or into equal parts."""
    sizes = {"seqlen_q": 1, "seqlen_k": 8192, "num_heads_q": 32, "num_heads_kv": 8}
    plan = introspect.make_plan(problem("decode", **{**sizes, **fields}), device, ALL)
    assert plan["num_ctas"] == num_ctas


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"dropout": True}, "dropout: decode has none"),
        (
            {"head_dim": 60},
            "head_dim=60: decode takes multiples of 8, as it never copies a cache",
        ),
        (
            {"head_dim_v": 60},
            "head_dim_v=60: decode takes multiples of 8, as it never copies a cache",
        ),
        (
            {"alignment_bytes": 8},
            "alignment_bytes=8: decode reads 16 bytes at a time and never copies a cache",
        ),
        (
            {"batch_size": 1 << 15, "seqlen_k": 1 << 22, "head_dim": 256, "head_dim_v": 256},
            f"blocks of keys={1 << 34}: decode takes at most 2147483647",
        ),
        ({"head_dim": 264}, "head_dim=264: decode is built for 64, 96, 128, 192, 256"),
        ({"dtype": "fp32"}, "dtype=fp32: decode is built for fp16, bf16"),
    ],
)
def test_decode_refuses(introspect: ModuleType, fields: dict[str, Any], why: str) -> None:
    sizes = {"num_heads_q": 8, "num_heads_kv": 8, "seqlen_q": 1}
    expected = [f"sm90: {why}", f"sm80: {why}"]
    assert reasons(introspect, problem("decode", **{**sizes, **fields}), "h100") == expected
