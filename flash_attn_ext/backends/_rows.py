"""Where the rows of a tile lie in memory: dense tensors, packed sequences, paged caches.

The loops of _tiles.py see every tensor as [batch, position, head, dim] and read and write runs of
positions. These classes give them that view. What lies outside a sequence's length is read as
`fill`, whatever its bytes are: 0 * NaN would be NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class DenseRows:
    """Rows of a tensor [batch, seqlen, heads, dim], any strides."""

    def __init__(self, x: Tensor, lengths: Tensor | None = None, min_length: int = 0) -> None:
        """Remembers where the rows are.

        Args:
            x: the tensor.
            lengths: int64 [batch], positions that exist in each sequence; None: all.
            min_length: what is known of the smallest length without reading it.
        """
        self.x = x
        self.lengths = lengths
        self.min_length = min_length

    def load(self, rows: range, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """The rows as [batch, heads, len(rows), dim]; may be a view of the tensor."""
        tile = self.x[:, rows.start : rows.stop].transpose(1, 2).to(dtype)
        if self.lengths is None or rows.stop <= self.min_length:
            return tile
        positions = torch.arange(rows.start, rows.stop, device=self.x.device)
        inside = positions < self.lengths[:, None]
        return torch.where(inside[:, None, :, None], tile, fill)

    def store(self, rows: range, values: Tensor) -> None:
        """Writes [batch, heads, len(rows), dim], converted to the tensor's dtype."""
        self.x[:, rows.start : rows.stop].copy_(values.transpose(1, 2))

    def add(self, rows: range, values: Tensor) -> None:
        """Adds [batch, heads, len(rows), dim] in place."""
        self.x[:, rows.start : rows.stop].add_(values.transpose(1, 2))

    def finish(self) -> None:
        """Everything is written: the writes went straight into the tensor."""


Locate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions int64 [n] -> indices [batch, n] into the first and second dimension of a tensor."""


class GatherRows:
    """Rows of a tensor [n0, n1, heads, dim] at computed indices; no length is read on the host."""

    def __init__(self, x: Tensor, locate: Locate, lengths: Tensor) -> None:
        """Remembers where the rows are.

        Args:
            x: the tensor.
            locate: finds a row; its result counts only for positions inside the length, there an
                index outside the tensor (a broken page id) is moved to the nearest one inside.
            lengths: int64 [batch].
        """
        self.x = x
        self.locate = locate
        self.lengths = lengths

    def _indices(self, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        positions = torch.arange(rows.start, rows.stop, device=self.x.device)
        first, second = self.locate(positions)
        inside = positions < self.lengths[:, None]
        return first, second, inside

    def load(self, rows: range, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """The rows as [batch, heads, len(rows), dim]."""
        first, second, inside = self._indices(rows)
        if self.x.shape[0] == 0 or self.x.shape[1] == 0:
            shape = (inside.shape[0], self.x.shape[2], len(rows), self.x.shape[3])
            return self.x.new_full(shape, fill, dtype=dtype)
        first = torch.where(inside, first, 0).clamp(0, self.x.shape[0] - 1)
        second = torch.where(inside, second, 0).clamp(0, self.x.shape[1] - 1)
        tile = self.x[first, second].transpose(1, 2).to(dtype)
        return torch.where(inside[:, None, :, None], tile, fill)


class PackedResult(GatherRows):
    """Rows of a result [total, heads, dim] that all sequences write at once.

    Positions past a sequence's length have nowhere to go and nobody may ask which they are, so the
    writes go to a copy with one row more, which takes them.
    """

    def __init__(self, x: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Remembers where the rows are.

        Args:
            x: the result; what it holds stays in the rows that are not written.
            starts: int64 [batch], first row of each sequence.
            lengths: int64 [batch].
        """
        total = x.shape[0]
        self.result = x
        copy = x.new_zeros(1, total + 1, *x.shape[1:])
        copy[0, :total].copy_(x)

        def locate(positions: Tensor) -> tuple[Tensor, Tensor]:
            row = starts[:, None] + positions
            row = torch.where(positions < lengths[:, None], row, total)
            return torch.zeros_like(row), row

        super().__init__(copy, locate, lengths)

    def store(self, rows: range, values: Tensor) -> None:
        """Writes [batch, heads, len(rows), dim], converted to the tensor's dtype."""
        first, second, _ = self._indices(rows)
        self.x.index_put_((first, second), values.transpose(1, 2).to(self.x.dtype))

    def add(self, rows: range, values: Tensor) -> None:
        """Adds [batch, heads, len(rows), dim]; no row of a sequence occurs twice in a tile."""
        first, second, _ = self._indices(rows)
        self.x.index_put_((first, second), self.x[first, second] + values.transpose(1, 2))

    def finish(self) -> None:
        """Copies what was written into the result."""
        self.result.copy_(self.x[0, :-1])
