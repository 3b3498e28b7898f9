"""The same values in other strides; what lies between them is NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inside(x: Tensor, *margins: tuple[int, int]) -> Tensor:
    """A view of a larger tensor; (before, after) for each of the last dimensions."""
    margins = ((0, 0),) * (x.dim() - len(margins)) + margins
    size = [b + n + a for n, (b, a) in zip(x.shape, margins, strict=True)]
    buffer = torch.full(size, torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(b, b + n) for n, (b, _) in zip(x.shape, margins, strict=True))]
    view.copy_(x)
    return view


def heads_first(x: Tensor) -> Tensor:
    """[..., tokens, heads, dim], stored as [..., heads, tokens, dim]."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def dim_first(x: Tensor) -> Tensor:
    """The elements of a row lie apart: stored as [..., dim, heads]."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads_first": heads_first,
    "inside_larger": lambda x: inside(x, (3, 2), (1, 2), (8, 16)),  # rows still 16-byte aligned
    "unaligned_begin": lambda x: inside(x, (0, 0), (0, 0), (1, 7)),
    "unaligned_rows": lambda x: inside(x, (0, 0), (0, 0), (0, 1)),
    "unaligned_tokens": lambda x: inside(x.flatten(-2), (0, 4)).unflatten(-1, x.shape[-2:]),
    "dim_first": dim_first,
}
"""Name -> function that stores a tensor [..., tokens, heads, dim] in another way."""
