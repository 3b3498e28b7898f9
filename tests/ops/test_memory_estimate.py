"""estimate_memory and max_seqlen: by hand without a GPU, and measured on one."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers import NEEDS_CUDA, NEEDS_INTROSPECT, cu_seqlens, require

import flash_attn_ext as fa
from flash_attn_ext import _load
from flash_attn_ext.layers.attention import FlashAttentionLayer
from flash_attn_ext.memory import AttentionShape, MemoryEstimate, estimate_memory, max_seqlen

GQA = AttentionShape(num_heads_q=8, num_heads_kv=2, head_dim=128)
MIB = 1 << 20


def test_attention_by_hand() -> None:
    """2 sequences of 4096: 16 MiB of q, 4 of k and of v, lse of 256 KiB; in fp32 dq of 32 MiB, dk
    and dv of 8, as CTAs share the query heads of so few key/value heads.
    """
    require(NEEDS_INTROSPECT)
    found = estimate_memory(GQA, 2, 4096, arch="h100")
    assert found.parts == {
        "workspace of the backward": (32 + 2 * 8) * MIB,
        "q, k, v": 24 * MIB,
        "dq, dk, dv": 24 * MIB,
        "out": 16 * MIB,
        "dout": 16 * MIB,
        "lse": MIB // 4,
        "delta": MIB // 4,
    }
    assert found.peak_bytes == sum(found.parts.values())
    assert found.kept_bytes == (24 + 16 + 16) * MIB + MIB // 4
    forward = estimate_memory(GQA, 2, 4096, backward=False, arch="h100")
    assert forward.peak_bytes == (24 + 16) * MIB + MIB // 4
    assert "     128.5 MiB  at the peak" in str(found)


def test_layer_by_hand() -> None:
    require(NEEDS_INTROSPECT)
    shape = AttentionShape(8, 2, 128, width=1024, num_layers=3, rotary_dim=64)
    found = estimate_memory(shape, 2, 4096, arch="h100")
    weights = 2 * (1024 * 1024) * 2 + 2 * (1024 * 256) * 2
    assert found.parts["parameters"] == 3 * weights
    assert found.parts["hidden states"] == (3 + 1) * 16 * MIB
    assert found.parts["gradients of hidden states"] == 16 * MIB
    assert found.parts["out"] == 3 * 16 * MIB  # kept by each layer
    assert found.parts["workspace of the backward"] == (32 + 16) * MIB  # of one layer at a time
    assert found.parts["rotary tables"] == 3 * 2 * 4096 * 32 * 2
    assert found.parts["gradients of parameters"] == 1024 * 1024 * 2  # of o_proj, so far
    forward = estimate_memory(shape, 2, 4096, backward=False, arch="h100")
    assert forward.parts["hidden states"] == 3 * 16 * MIB  # first, a layer's input and result
    assert forward.peak_bytes < found.kept_bytes


def test_options_that_take_memory() -> None:
    require(NEEDS_INTROSPECT)

    def peak(shape: AttentionShape = GQA, **options: Any) -> int:
        return estimate_memory(shape, 2, 4000, arch="a100", **options).peak_bytes

    assert peak(deterministic=True) > peak()  # turns of the additions
    assert peak(varlen=True) > peak()  # a tile for each sequence
    assert peak(AttentionShape(8, 2, 100)) > 1.2 * peak(AttentionShape(8, 2, 104))  # copies


def test_longest_sequence() -> None:
    require(NEEDS_INTROSPECT)
    for shape in (GQA, AttentionShape(8, 2, 128, width=1024)):
        for options in ({}, {"backward": False}, {"varlen": True}):
            longest = max_seqlen(shape, 2, 10**9, arch="h100", multiple_of=64, **options)
            assert longest % 64 == 0
            fits, not_fits = (
                estimate_memory(shape, 2, n, arch="h100", **options).peak_bytes
                for n in (longest, longest + 64)
            )
            assert fits <= 10**9 < not_fits
    assert max_seqlen(GQA, 2, 1000, arch="h100") == 0
    assert max_seqlen(GQA, 2, 10**18, arch="h100") == 1 << 23


def test_impossible_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    require(NEEDS_INTROSPECT)
    with pytest.raises(ValueError, match="seqlen: got 0, expected at least 1"):
        estimate_memory(GQA, 1, 0, arch="h100")
    with pytest.raises(ValueError, match="num_layers: got 2, expected 1 because width is None"):
        estimate_memory(AttentionShape(8, 2, 128, num_layers=2), 1, 8, arch="h100")
    with pytest.raises(ValueError, match="memory_bytes: got None"):
        max_seqlen(GQA, 1, arch="h100")
    with pytest.raises(fa.UnsupportedError, match="no kernel computes this on h100"):
        estimate_memory(AttentionShape(8, 2, 128, dtype=torch.float32), 1, 64, arch="h100")
    monkeypatch.setattr(_load.status(), "introspect", None)
    with pytest.raises(fa.UnsupportedError, match="plans cannot be asked for"):
        estimate_memory(GQA, 1, 64, arch="h100")


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def attention_peak(
    shape: AttentionShape, batch_size: int, seqlen: int, backward: bool, varlen: bool
) -> int:
    """Most bytes of flash_attn_func, everything it is given included."""
    base = allocated()
    torch.cuda.reset_peak_memory_stats()
    rows = (batch_size * seqlen,) if varlen else (batch_size, seqlen)
    q, k, v = (
        torch.zeros(*rows, heads, shape.head_dim, dtype=shape.dtype, device="cuda")
        for heads in (shape.num_heads_q, shape.num_heads_kv, shape.num_heads_kv)
    )
    dout = torch.zeros_like(q) if backward else None
    for x in (q, k, v):
        x.requires_grad_(backward)
    if varlen:
        ends = cu_seqlens([seqlen] * batch_size, "cuda")
        out = fa.flash_attn_varlen_func(q, k, v, ends, ends, seqlen, seqlen, causal=True)
    else:
        out = fa.flash_attn_func(q, k, v, causal=True)
    if backward:
        out.backward(dout)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


def layers_peak(shape: AttentionShape, batch_size: int, seqlen: int, backward: bool) -> int:
    """Most bytes of the layers, parameters included."""
    assert shape.width is not None
    base = allocated()
    torch.cuda.reset_peak_memory_stats()
    heads = (shape.num_heads_q, shape.num_heads_kv, shape.head_dim)
    options = {"rotary_dim": shape.rotary_dim, "device": "cuda", "dtype": shape.dtype}
    layers = torch.nn.Sequential(
        *(FlashAttentionLayer(shape.width, *heads, **options) for _ in range(shape.num_layers))
    )
    sizes = (batch_size, seqlen, shape.width)
    x = torch.zeros(sizes, dtype=shape.dtype, device="cuda", requires_grad=backward)
    dy = torch.zeros_like(x) if backward else None
    with torch.set_grad_enabled(backward):
        y = layers(x)
    if backward:
        y.backward(dy)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


def assert_within_5_percent(measured: int, estimate: MemoryEstimate) -> None:
    print(f"measured {measured / MIB:.1f} MiB, estimated {estimate.peak_bytes / MIB:.1f} MiB")
    assert measured == pytest.approx(estimate.peak_bytes, rel=0.05)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "batch_size", "seqlen"),
    [
        ((16, 16), 64, 4, 4096),
        ((16, 2), 128, 1, 16384),
        ((8, 8), 256, 2, 5000),
        ((8, 8), 100, 2, 8192),
    ],
)
def test_measured_attention(
    heads: tuple[int, int],
    head_dim: int,
    batch_size: int,
    seqlen: int,
    backward: bool,
    varlen: bool,
) -> None:
    require(NEEDS_CUDA)
    require(NEEDS_INTROSPECT)
    shape = AttentionShape(*heads, head_dim)
    estimate = estimate_memory(shape, batch_size, seqlen, backward=backward, varlen=varlen)
    attention_peak(shape, 1, 128, backward, varlen)  # libraries are loaded
    measured = attention_peak(shape, batch_size, seqlen, backward, varlen)
    assert_within_5_percent(measured, estimate)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("shape", "batch_size", "seqlen"),
    [
        (AttentionShape(16, 16, 128, width=2048), 1, 16384),
        (AttentionShape(32, 8, 128, width=4096), 2, 4096),
        (AttentionShape(16, 4, 64, width=1024, num_layers=4, rotary_dim=0), 4, 8192),
        (AttentionShape(8, 2, 256, width=2048, num_layers=3), 1, 16384),
    ],
)
def test_measured_layers(
    shape: AttentionShape, batch_size: int, seqlen: int, backward: bool
) -> None:
    require(NEEDS_CUDA)
    require(NEEDS_INTROSPECT)
    estimate = estimate_memory(shape, batch_size, seqlen, backward=backward)
    layers_peak(shape, 1, 128, backward)  # libraries are loaded, cuBLAS has its workspace
    measured = layers_peak(shape, batch_size, seqlen, backward)
    assert_within_5_percent(measured, estimate)


def test_measured_longest_sequence() -> None:
    """The length that max_seqlen names runs in that memory."""
    require(NEEDS_CUDA)
    require(NEEDS_INTROSPECT)
    limit = 2 * 10**9
    longest = max_seqlen(GQA, 1, limit)
    assert 0.95 * limit < attention_peak(GQA, 1, longest, True, False) <= 1.05 * limit
