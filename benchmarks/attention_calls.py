"""The calls that bench_attention.py compares: ours and PyTorch's own, on the same tensors.

A provider is a function of a problem's tensors that returns `out`. FlashAttention-2 and cuDNN are
reached through torch.nn.functional.scaled_dot_product_attention, packed sequences through
torch.nn.attention.varlen; they want [batch, heads, seqlen, dim], which is a view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_ext

BWD_FLOPS = 2.5  # of the forward's: five products instead of two


@dataclass(frozen=True)
class Problem:
    """Self-attention of sequences of one length."""

    batch_size: int
    seqlen: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    head_dim_v: int | None = None  # None: head_dim

    def pairs(self) -> float:
        """(query, key) pairs of one head that count as work; causal: half of all, by convention."""
        full = float(self.seqlen) ** 2
        if self.window == (-1, -1):
            return full / 2 if self.causal else full
        left, right = self.window
        right = 0 if self.causal else right
        return float(
            sum(
                min(self.seqlen, i + right + 1 if right >= 0 else self.seqlen)
                - max(0, i - left if left >= 0 else 0)
                for i in range(self.seqlen)
            )
        )

    def flops(self) -> float:
        """Of the forward: q k^T and p v."""
        head_dims = self.head_dim + (self.head_dim_v or self.head_dim)
        return 2 * self.batch_size * self.num_heads * head_dims * self.pairs()

    def tensors(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v, random, leaves."""
        q = (self.batch_size, self.seqlen, self.num_heads, self.head_dim)
        k = (self.batch_size, self.seqlen, self.num_heads_kv, self.head_dim)
        v = (*k[:3], self.head_dim_v or self.head_dim)
        return [
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
            for shape in (q, k, v)
        ]


Call = Callable[[], Tensor]


def ours(problem: Problem, tensors: Sequence[Tensor], **options: Any) -> Call:
    """flash_attn_ext, whatever its plan says."""
    q, k, v = tensors
    causal, window = problem.causal, problem.window
    return lambda: flash_attn_ext.flash_attn_func(
        q, k, v, causal=causal, window_size=window, **options
    )


def sdpa(backend: SDPBackend, problem: Problem, tensors: Sequence[Tensor]) -> Call:
    """One backend of PyTorch's attention; an error where it does not take the problem."""
    if problem.window != (-1, -1):
        raise RuntimeError("PyTorch's attention has no window")
    q, k, v = (x.transpose(1, 2) for x in tensors)
    grouped = problem.num_heads != problem.num_heads_kv

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=problem.causal, enable_gqa=grouped
            )

    return call


def plain(problem: Problem, tensors: Sequence[Tensor]) -> Call:
    """PyTorch operations that store the scores."""
    q, k, v = (x.transpose(1, 2) for x in tensors)

    def call() -> Tensor:
        scores = q @ k.transpose(2, 3) * problem.head_dim**-0.5
        if problem.causal:
            ones = torch.ones(problem.seqlen, problem.seqlen, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(ones.triu(1), -torch.inf)
        return scores.softmax(-1) @ v

    return call


PROVIDERS: dict[str, Callable[..., Call]] = {
    "ours": ours,
    "sdpa_flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
}
"""Name -> function (problem, [q, k, v]) -> call."""


@dataclass(frozen=True)
class PackedProblem:
    """Causal self-attention of packed sequences."""

    seqlens: tuple[int, ...]
    num_heads: int
    head_dim: int

    def flops(self) -> float:
        return sum(
            Problem(1, n, self.num_heads, self.num_heads, self.head_dim, True).flops()
            for n in self.seqlens
        )

    def tensors(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        shape = (sum(self.seqlens), self.num_heads, self.head_dim)
        return [
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        ]

    def cu_seqlens(self, device: torch.device) -> Tensor:
        ends = torch.tensor([0, *self.seqlens]).cumsum(0)
        return ends.to(device=device, dtype=torch.int32)


def ours_packed(problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """flash_attn_ext."""
    q, k, v = tensors
    ends, longest = problem.cu_seqlens(q.device), max(problem.seqlens)
    return lambda: flash_attn_ext.flash_attn_varlen_func(
        q, k, v, ends, ends, longest, longest, causal=True
    )


def torch_packed(problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """PyTorch's FlashAttention-2 for packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = tensors
    ends, longest = problem.cu_seqlens(q.device), max(problem.seqlens)

    def call() -> Tensor:
        out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))
        return out[0] if isinstance(out, tuple) else out

    return call


PACKED_PROVIDERS: dict[str, Callable[..., Call]] = {
    "ours": ours_packed,
    "sdpa_flash": torch_packed,
}


def backward(call: Call, tensors: Sequence[Tensor]) -> Callable[[], object]:
    """The backward of one call, which can be run again and again."""
    out = call()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, list(tensors), dout, retain_graph=True)
