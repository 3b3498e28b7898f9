"""Tiled backend on a GPU: nothing is read back to the host, everything fits into a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import Case, Packed, op
from helpers import NEEDS_CUDA, assert_equals, int32, require
from torch import Tensor

pytestmark = pytest.mark.gpu

PACKED = Packed([17, 8, 12], [25, 30, 9], [11, 0, 12], [20, 30, 1], extra=2)
CASE = Case(batch_size=3, window=(9, 2), softcap=3.0, alibi=2, dropout_p=0.2, dtype=torch.float32)


def _fixed() -> Callable[[], tuple[Tensor, ...]]:
    q, k, v = (x.detach() for x in CASE.inputs("cuda"))
    options = CASE.options("cuda")

    def call() -> tuple[Tensor, ...]:
        out, lse, dmask = op("fwd", "tiled")(q, k, v, *options, True, 0, 0)
        grads = op("bwd", "tiled")(out, q, k, v, out, lse, lse, *options, True, 0)
        return (out, lse, dmask, *grads)

    return call


def _packed() -> Callable[[], tuple[Tensor, ...]]:
    q, k, v = (x.detach() for x in CASE.packed_inputs(PACKED.total_q, PACKED.total_k, "cuda"))
    options, lengths = CASE.options("cuda"), PACKED.tensors("cuda")
    sizes = PACKED.max_seqlens

    def call() -> tuple[Tensor, ...]:
        out, lse, dmask = op("varlen_fwd", "tiled")(
            q, k, v, *lengths, None, *sizes, *options, True, 0, 0
        )
        grads = op("varlen_bwd", "tiled")(
            out, q, k, v, out, lse, None, *lengths, *sizes, *options, True, 0
        )
        return (out, lse, dmask, *grads)

    return call


def _cache() -> Callable[[], tuple[Tensor, ...]]:
    q, new = torch.randn(3, 2, 4, 16, device="cuda"), torch.randn(3, 2, 2, 16, device="cuda")
    cache = torch.randn(20, 5, 2, 16, device="cuda")
    table = torch.randperm(20, device="cuda").int().view(4, 5)
    seqlens, rows = int32([7, 0, 22], "cuda"), int32([3, 0, 2], "cuda")
    leftpad = int32([1, 0, 6], "cuda")
    angles = torch.rand(30, 4, device="cuda")
    cos, sin = angles.cos(), angles.sin()

    def call() -> tuple[Tensor, ...]:
        k_cache, v_cache = cache.clone(), cache.clone()
        out, lse = op("kvcache_append_fwd", "tiled")(
            *(q, k_cache, v_cache, new, new, seqlens, cos, sin, True),
            *(table, 0.25, -1, 0, 0.0, None, rows, leftpad),
        )
        return out, lse, k_cache, v_cache

    return call


CALLS = {"fixed": _fixed, "packed": _packed, "cache": _cache}


@pytest.mark.parametrize("prepare", CALLS.values(), ids=CALLS)
def test_no_synchronisation(prepare: Callable[[], Callable[[], object]]) -> None:
    require(NEEDS_CUDA)
    call = prepare()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("prepare", CALLS.values(), ids=CALLS)
def test_cuda_graph(prepare: Callable[[], Callable[[], tuple[Tensor, ...]]]) -> None:
    require(NEEDS_CUDA)
    call = prepare()
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert_equals(a, b, 0.0)
