"""Attention problems for tests: sizes and options, random inputs, the ops' argument lists."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import (
    assert_close_2x,
    assert_equals,
    cu_seqlens,
    int32,
    max_error,
    randn,
    rng_state,
)
from torch import Tensor

from flash_attn_ext._philox import keep_mask, keep_threshold
from flash_attn_ext.reference import attention_reference, varlen_attention_reference

GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One problem; `alibi` is the number of dimensions of the slopes, 0 = none."""

    batch_size: int = 2
    num_heads_q: int = 4
    num_heads_kv: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 47
    head_dim: int = 16
    head_dim_v: int = 24
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: int = 0
    dropout_p: float = 0.0
    softmax_scale: float | None = None
    dtype: torch.dtype = torch.float64

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def slopes(self, device: str) -> Tensor | None:
        """Slopes of the case, fp32, the same at each call."""
        shape = {0: None, 1: (self.num_heads_q,), 2: (self.batch_size, self.num_heads_q)}[
            self.alibi
        ]
        if shape is None:
            return None
        generator = torch.Generator().manual_seed(7)
        return torch.rand(shape, generator=generator).to(device)

    def rng(self, device: str) -> Tensor | None:
        return rng_state(device=device) if self.dropout_p > 0 else None

    def options(self, device: str) -> tuple[Any, ...]:
        """alibi_slopes ... dropout_p, as in the schemas."""
        scores = (self.scale, *self.window, self.softcap)
        return (self.slopes(device), self.rng(device), *scores, self.dropout_p)

    def reference_options(self, device: str, max_q: int, max_k: int) -> dict[str, Any]:
        """The same for the reference, the dropout mask drawn for max_q x max_k."""
        mask, rng = None, self.rng(device)
        if rng is not None and keep_threshold(self.dropout_p) < 256:
            mask = keep_mask(
                rng,
                torch.arange(self.batch_size, device=device)[:, None],
                torch.arange(self.num_heads_q, device=device),
                range(max_q),
                range(max_k),
                self.num_heads_q,
                self.dropout_p,
            )
        return {
            "softmax_scale": self.scale,
            "window_size": self.window,
            "softcap": self.softcap,
            "alibi_slopes": self.slopes(device),
            "dropout_p": self.dropout_p,
            "dropout_mask": mask,
        }

    def inputs(self, device: str) -> list[Tensor]:
        """q, k, v of one length, leaves."""
        q_shape = (self.batch_size, self.seqlen_q, self.num_heads_q, self.head_dim)
        k_shape = (self.batch_size, self.seqlen_k, self.num_heads_kv, self.head_dim)
        return self._random(q_shape, k_shape, (*k_shape[:-1], self.head_dim_v), device)

    def packed_inputs(self, total_q: int, total_k: int, device: str) -> list[Tensor]:
        """q, k, v of packed sequences, leaves."""
        q_shape = (total_q, self.num_heads_q, self.head_dim)
        k_shape = (total_k, self.num_heads_kv, self.head_dim)
        return self._random(q_shape, k_shape, (*k_shape[:-1], self.head_dim_v), device)

    def _random(self, *shapes_and_device: Any) -> list[Tensor]:
        *shapes, device = shapes_and_device
        return [randn(*shape, dtype=self.dtype, device=device) for shape in shapes]


def finite(lse: Tensor) -> Tensor:
    """lse with rows without a key replaced by 0, so that a loss can use it."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def gradients(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, inputs: list[Tensor]
) -> list[Tensor]:
    """Gradients of (out * dout).sum() + (lse * dlse).sum(), the rows without keys left out."""
    loss = (out * dout.to(out.dtype)).sum() + (finite(lse) * dlse.to(lse.dtype)).sum()
    return list(torch.autograd.grad(loss, inputs))


def leaves(inputs: list[Tensor], upcast: bool) -> list[Tensor]:
    """The inputs, or fp64 copies of them, so that their gradients are not rounded to 16 bits."""
    return [x.detach().double().requires_grad_() for x in inputs] if upcast else inputs


@contextlib.contextmanager
def fallback_allowed(overload: str) -> Iterator[None]:
    """Where the tiled backend is the yardstick it may run, also if a fallback is an error."""
    with pytest.MonkeyPatch.context() as patch:
        if overload == "tiled":
            patch.setenv("FLASH_ATTN_EXT_FALLBACK", "allow")
        yield


def op(name: str, overload: str = "default") -> Any:
    return getattr(getattr(torch.ops.flash_attn_ext, name), overload)


NAMES = ("out", "lse", *GRADIENTS)


def compare(
    case: Case,
    actual: list[Tensor],
    expected: list[Tensor],
    *yardsticks: list[Tensor],
    roundings: float = 0.0,
) -> None:
    """out, lse and gradients: exact in fp64, else by the rule of twice the error.

    Args:
        case: the problem.
        actual: results under test.
        expected: in fp64.
        *yardsticks: plain PyTorch in the dtype of the case, and what else may be measured against;
            for each tensor the one with the largest error counts.
        roundings: error that is allowed beside it, in roundings of the largest element.
    """
    names = NAMES[: len(actual)]
    for name, a, e, *plain in zip(names, actual, expected, *yardsticks, strict=True):
        if case.dtype == torch.float64:
            assert_equals(a, e, 1e-10, name)
        else:
            yardstick = max(plain, key=lambda x: max_error(x, e))
            largest = finite(e).abs().max().item() if e.numel() else 0.0
            rounding = torch.finfo(case.dtype).eps / 2 * largest
            assert_close_2x(a, e, yardstick, 1e-5 + roundings * rounding, name)


@dataclass(frozen=True)
class How:
    """How a case is computed and measured.

    Attributes:
        overload: of the ops.
        layout: applied to q, k, v and dout on their way into the ops; same values, other strides.
        backward: whether gradients are computed too.
        with_dlse: whether lse has a gradient.
        deterministic: option of the backward.
        like_tiled: results may also have twice the error of the tiled backend. It shares with the
            kernels that delta is summed up from the rounded `out`; with few keys that is more than
            plain PyTorch rounds, which can even be exact there.
        roundings: as in `compare`, for results of so few elements that the largest error of plain
            PyTorch is small by chance.
    """

    overload: str = "default"
    layout: Callable[[Tensor], Tensor] = lambda x: x
    backward: bool = True
    with_dlse: bool = True
    deterministic: bool = True
    like_tiled: bool = False
    roundings: float = 0.0

    def overloads(self) -> list[str]:
        """The one under test, then the other yardstick."""
        return [self.overload, *(["tiled"] if self.like_tiled else [])]


TILED = How(overload="tiled")


def check_fixed(
    case: Case, device: str, how: How = How(), inputs: list[Tensor] | None = None
) -> None:
    """Forward and backward of a case against the reference; inputs: q, k, v, by default random."""
    inputs = case.inputs(device) if inputs is None else inputs
    references = []
    for upcast in (True, False):
        options = case.reference_options(device, case.seqlen_q, case.seqlen_k)
        operands = leaves(inputs, upcast)
        ref = attention_reference(*operands, upcast=upcast, **options)
        if upcast:
            dout = torch.randn_like(ref.out).to(case.dtype)
            dlse = torch.randn_like(ref.lse) if how.with_dlse else torch.zeros_like(ref.lse)
        grads = gradients(ref.out, ref.lse, dout, dlse, operands) if how.backward else []
        references.append([ref.out, ref.lse, *grads])

    q, k, v, dout = (how.layout(x.detach()) for x in (*inputs, dout))
    options = case.options(device)
    computed = []
    for overload in how.overloads():
        with fallback_allowed(overload):
            out, lse, _ = op("fwd", overload)(q, k, v, *options, False, 0, 0)
            computed.append([out, lse])
            if how.backward:
                arguments = (dout, q, k, v, out, lse, dlse.to(lse.dtype) if how.with_dlse else None)
                computed[-1] += op("bwd", overload)(*arguments, *options, how.deterministic, 0)
    compare(case, computed[0], *references, *computed[1:], roundings=how.roundings)


@dataclass(frozen=True)
class Packed:
    """Lengths of packed sequences. used_*: rows that exist, None = all; extra: rows behind."""

    seqlens_q: list[int]
    seqlens_k: list[int]
    used_q: list[int] | None = None
    used_k: list[int] | None = None
    extra: int = 0

    @property
    def total_q(self) -> int:
        return sum(self.seqlens_q) + self.extra

    @property
    def total_k(self) -> int:
        return sum(self.seqlens_k) + self.extra

    @property
    def max_seqlens(self) -> tuple[int, int]:
        return max(self.seqlens_q, default=0), max(self.seqlens_k, default=0)

    def tensors(self, device: str) -> tuple[Tensor | None, ...]:
        """cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k."""
        used = [None if u is None else int32(u, device) for u in (self.used_q, self.used_k)]
        return (cu_seqlens(self.seqlens_q, device), cu_seqlens(self.seqlens_k, device), *used)

    def reference_lengths(self) -> tuple[tuple[list[int], list[int]], dict[str, Any]]:
        starts = [cu_seqlens(x).tolist() for x in (self.seqlens_q, self.seqlens_k)]
        return (starts[0], starts[1]), {"seqused_q": self.used_q, "seqused_k": self.used_k}

    def exists(self, side: str, device: str) -> Tensor:
        """Boolean [total]: rows that belong to a sequence."""
        seqlens, used = (
            (self.seqlens_q, self.used_q) if side == "q" else (self.seqlens_k, self.used_k)
        )
        kept = torch.zeros(sum(seqlens) + self.extra, dtype=torch.bool, device=device)
        begin = 0
        for seqlen, length in zip(seqlens, seqlens if used is None else used, strict=True):
            kept[begin : begin + length] = True
            begin += seqlen
        return kept


def check_packed(case: Case, packed: Packed, device: str, how: How = How()) -> None:
    """Forward and backward of packed sequences; what belongs to no sequence is NaN."""
    inputs = case.packed_inputs(packed.total_q, packed.total_k, device)
    starts, used = packed.reference_lengths()
    references = []
    for upcast in (True, False):
        options = case.reference_options(device, *packed.max_seqlens)
        operands = leaves(inputs, upcast)
        out, lse = varlen_attention_reference(*operands, *starts, **used, upcast=upcast, **options)
        if upcast:
            dout = torch.randn_like(out).to(case.dtype)
            dlse = torch.randn_like(lse) if how.with_dlse else torch.zeros_like(lse)
        grads = []
        if how.backward and out.requires_grad:
            grads = gradients(out, lse, dout, dlse, operands)
        elif how.backward:  # no sequence has a query
            grads = [torch.zeros_like(x) for x in operands]
        references.append([out, lse, *grads])

    rows_q, rows_k = packed.exists("q", device), packed.exists("k", device)
    q, dout = (torch.where(rows_q[:, None, None], x.detach(), torch.nan) for x in (inputs[0], dout))
    k, v = (torch.where(rows_k[:, None, None], x.detach(), torch.nan) for x in inputs[1:])
    q, k, v, dout = map(how.layout, (q, k, v, dout))
    lengths, sizes, options = packed.tensors(device), packed.max_seqlens, case.options(device)
    dlse = torch.where(rows_q, dlse, torch.nan)
    computed = []
    for overload in how.overloads():
        with fallback_allowed(overload):
            out, lse, _ = op("varlen_fwd", overload)(
                q, k, v, *lengths, None, *sizes, *options, False, 0, 0
            )
            computed.append([out, lse])
            if how.backward:
                arguments = (dout, q, k, v, out, lse, dlse.to(lse.dtype) if how.with_dlse else None)
                computed[-1] += op("varlen_bwd", overload)(
                    *arguments, *lengths, *sizes, *options, how.deterministic, 0
                )
    compare(case, computed[0], *references, *computed[1:], roundings=how.roundings)
