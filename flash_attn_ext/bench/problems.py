"""What is computed: sizes, work and tensors of self-attention, packed sequences and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BWD_FLOPS = 2.5  # of the forward's: five products instead of two

Call = Callable[[], Tensor]
"""Computes ``out``, in the layout of the public functions."""


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

    def __str__(self) -> str:
        """Short: what a row of a table is called."""
        heads = str(self.num_heads)
        if self.num_heads_kv != self.num_heads:
            heads += f"/{self.num_heads_kv}"
        mask = "causal" if self.causal else "full"
        return f"{self.batch_size} x {self.seqlen}, {heads} heads, head_dim {self.head_dim}, {mask}"

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

    def part(self, x: Tensor) -> Tensor:
        """The sequence of a tensor that is checked, [seqlen, heads, head_dim]."""
        return x[-1]


@dataclass(frozen=True)
class PackedProblem:
    """Causal self-attention of packed sequences."""

    seqlens: tuple[int, ...]
    num_heads: int
    head_dim: int

    def __str__(self) -> str:
        """Short: what a row of a table is called."""
        shortest, longest = min(self.seqlens), max(self.seqlens)
        lengths = str(longest) if shortest == longest else f"{shortest} to {longest}"
        sequences = f"{len(self.seqlens)} sequences of {lengths}"
        return f"{sequences}, {self.num_heads} heads, head_dim {self.head_dim}, causal"

    @property
    def causal(self) -> bool:
        """As the other problems have it."""
        return True

    @property
    def num_heads_kv(self) -> int:
        """As the other problems have it."""
        return self.num_heads

    def flops(self) -> float:
        """Of the forward."""
        return sum(
            Problem(1, n, self.num_heads, self.num_heads, self.head_dim, True).flops()
            for n in self.seqlens
        )

    def tensors(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v, random, leaves."""
        shape = (sum(self.seqlens), self.num_heads, self.head_dim)
        return [
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        ]

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Where sequences begin, and the end of the last one."""
        ends = torch.tensor([0, *self.seqlens]).cumsum(0)
        return ends.to(device=device, dtype=torch.int32)

    def part(self, x: Tensor) -> Tensor:
        """The sequence of a tensor that is checked: one from the middle."""
        middle = len(self.seqlens) // 2
        begin = sum(self.seqlens[:middle])
        return x[begin : begin + self.seqlens[middle]]


@dataclass(frozen=True)
class DecodeProblem:
    """One query of each sequence against its cache, which is full."""

    batch_size: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int
    head_dim: int

    def __str__(self) -> str:
        """Short: what a row of a table is called."""
        heads = f"{self.num_heads}/{self.num_heads_kv} heads"
        return f"batch {self.batch_size}, {self.seqlen_k} keys, {heads}, head_dim {self.head_dim}"

    @property
    def causal(self) -> bool:
        """As the other problems have it; one query at the end sees every key."""
        return False

    def flops(self) -> float:
        """Of q k^T and p v."""
        return 4.0 * self.batch_size * self.num_heads * self.seqlen_k * self.head_dim

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """What has to be read: keys and values."""
        keys = self.batch_size * self.seqlen_k * self.num_heads_kv
        return 2 * keys * self.head_dim * dtype.itemsize

    def tensors(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Q [batch, 1, heads, head_dim] and the cache [batch, seqlen_k, ...], random."""
        q = (self.batch_size, 1, self.num_heads, self.head_dim)
        k = (self.batch_size, self.seqlen_k, self.num_heads_kv, self.head_dim)
        return [torch.randn(shape, device=device, dtype=dtype) for shape in (q, k, k)]

    def part(self, x: Tensor) -> Tensor:
        """The sequence of a tensor that is checked."""
        return x[-1]


AnyProblem = Problem | PackedProblem | DecodeProblem


def backward(
    call: Call, tensors: Sequence[Tensor], dout: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """The backward of one call, which can be run again and again."""
    out = call()
    if dout is None:
        dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, list(tensors), dout, retain_graph=True)
