"""The calls that bench_attention.py compares: ours and PyTorch's own, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable

from flash_attn_ext.bench.problems import (
    BWD_FLOPS,
    Call,
    DecodeProblem,
    PackedProblem,
    Problem,
    backward,
)
from flash_attn_ext.bench.providers import DECODE, DENSE, VARLEN, ours, plain, sdpa

PROVIDERS: dict[str, Callable[..., Call]] = {
    name: DENSE[name] for name in ("ours", "sdpa_flash", "sdpa_cudnn")
}
"""Name -> function (problem, [q, k, v]) -> call."""

PACKED_PROVIDERS: dict[str, Callable[..., Call]] = {
    "ours": VARLEN["ours"],
    "sdpa_flash": VARLEN["torch_varlen"],
}

__all__ = [
    "BWD_FLOPS",
    "DECODE",
    "PACKED_PROVIDERS",
    "PROVIDERS",
    "Call",
    "DecodeProblem",
    "PackedProblem",
    "Problem",
    "backward",
    "ours",
    "plain",
    "sdpa",
]
