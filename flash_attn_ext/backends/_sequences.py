"""From the arguments of the ops to problems: fixed length, packed sequences, caches.

A `Side` knows where the rows of the queries (or of the keys) of a set of sequences lie; `problems`
pairs the two sides. Lengths on the CPU are read, which gives each packed sequence its exact tiles.
Lengths on a GPU are never read: all sequences run together up to the given maximum, and masks made
on the device hide what does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ._problem import Lengths, Options, Problem
from ._rows import DenseRows, GatherRows, PackedResult
from ._tiles import ResultRows, Rows


def lengths_are_readable(device: torch.device) -> bool:
    """True if reading a tensor's values costs no synchronisation."""
    return device.type == "cpu"


class Side(Protocol):
    """The queries or the keys of some sequences."""

    @property
    def lengths(self) -> Lengths:
        """Length of each sequence."""

    def reader(self, x: Tensor) -> Rows:
        """The rows of a tensor of the user's layout."""


@runtime_checkable
class ResultSide(Side, Protocol):
    """A side whose rows can be written."""

    def writer(self, x: Tensor) -> ResultRows:
        """The rows of a result of the user's layout; call `finish` after the last write."""


@dataclass(frozen=True)
class FixedSide:
    """[batch, seqlen, heads, dim], all of the same length."""

    seqlen: int

    @property
    def lengths(self) -> Lengths:
        """All equal."""
        return Lengths(self.seqlen, self.seqlen)

    def reader(self, x: Tensor) -> Rows:
        """The tensor as it is."""
        return DenseRows(x)

    def writer(self, x: Tensor) -> ResultRows:
        """The tensor as it is."""
        return DenseRows(x)


@dataclass(frozen=True)
class SliceSide:
    """One packed sequence with known ends: a run of rows of [total, heads, dim]."""

    begin: int
    end: int

    @property
    def lengths(self) -> Lengths:
        """Of the one sequence."""
        return Lengths(self.end - self.begin, self.end - self.begin)

    def reader(self, x: Tensor) -> Rows:
        """The run as a batch of one."""
        return DenseRows(x[self.begin : self.end].unsqueeze(0))

    def writer(self, x: Tensor) -> ResultRows:
        """The run as a batch of one."""
        return DenseRows(x[self.begin : self.end].unsqueeze(0))


@dataclass(frozen=True)
class PackedSide:
    """[total, heads, dim], sequences behind each other."""

    starts: Tensor  # int64 [batch]
    seqlens: Tensor  # int64 [batch]
    max_seqlen: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, seqused: Tensor | None, max_seqlen: int) -> PackedSide:
        """From the arguments of the ops; at most `seqused` rows of each sequence exist."""
        ends = cu_seqlens.long()
        seqlens = ends[1:] - ends[:-1]
        if seqused is not None:
            seqlens = torch.minimum(seqlens, seqused.long())
        return cls(ends[:-1], seqlens, max_seqlen)

    @property
    def lengths(self) -> Lengths:
        """Unknown on the host but for the maximum."""
        return Lengths(self.max_seqlen, 0, self.seqlens)

    def reader(self, x: Tensor) -> Rows:
        """Rows gathered tile by tile."""

        def locate(positions: Tensor) -> tuple[Tensor, Tensor]:
            row = self.starts[:, None] + positions
            return torch.zeros_like(row), row

        return GatherRows(x.unsqueeze(0), locate, self.seqlens)

    def writer(self, x: Tensor) -> ResultRows:
        """Rows scattered tile by tile."""
        return PackedResult(x, self.starts, self.seqlens)

    def one(self, sequence: int) -> SliceSide:
        """A single sequence; reads its length."""
        begin = int(self.starts[sequence])
        return SliceSide(begin, begin + int(self.seqlens[sequence]))


@dataclass(frozen=True)
class CacheSide:
    """Keys in a cache [caches, slots, heads, dim], or in pages [pages, page_size, heads, dim]."""

    seqlens: Tensor  # int64 [batch], keys that are seen
    bounds: tuple[int, int]  # smallest and largest length that is possible, on the host
    cache_rows: Tensor | None  # int64 [batch], row of the cache or page table; None: in order
    leftpad: Tensor | None  # int64 [batch], slots in front of the first key; None: 0
    page_table: Tensor | None  # [rows, max_pages], page ids
    page_size: int

    @property
    def lengths(self) -> Lengths:
        """Those of the keys after the left padding."""
        return Lengths(self.bounds[1], self.bounds[0], self.seqlens)

    def reader(self, x: Tensor) -> Rows:
        """A view where every sequence has its row of the cache, else rows gathered by tile."""
        if self.cache_rows is None and self.leftpad is None and self.page_table is None:
            return DenseRows(x[: self.seqlens.shape[0]], self.seqlens, self.bounds[0])

        def locate(positions: Tensor) -> tuple[Tensor, Tensor]:
            slots = positions.expand(self.seqlens.shape[0], -1)
            if self.leftpad is not None:
                slots = slots + self.leftpad[:, None]
            return cache_indices(slots, self.cache_rows, self.page_table, self.page_size)

        return GatherRows(x, locate, self.seqlens)

    def one(self, sequence: int) -> CacheSide:
        """A single sequence; reads its length."""
        seqlen = int(self.seqlens[sequence])
        at = slice(sequence, sequence + 1)
        rows = self.cache_rows
        return replace(
            self,
            seqlens=self.seqlens[at],
            bounds=(seqlen, seqlen),
            cache_rows=torch.tensor([sequence]) if rows is None else rows[at],
            leftpad=None if self.leftpad is None else self.leftpad[at],
        )


def cache_indices(
    slots: Tensor, cache_rows: Tensor | None, page_table: Tensor | None, page_size: int
) -> tuple[Tensor, Tensor]:
    """Where slots of a cache lie: indices into its first and second dimension.

    Args:
        slots: int64 [batch, n], any values: the caller drops what is outside.
        cache_rows: int64 [batch], row of the cache or of the page table; None: 0, 1, 2 ...
        page_table: [rows, max_pages]; None: not paged.
        page_size: slots per page.

    Returns:
        Two int64 [batch, n]; the first is -1 for slots whose row or page is outside the tables.
    """
    batch_size = slots.shape[0]
    rows = torch.arange(batch_size, device=slots.device) if cache_rows is None else cache_rows
    rows = rows[:, None].expand_as(slots)
    if page_table is None:
        return rows, slots
    if page_table.numel() == 0:
        return torch.full_like(slots, -1), slots
    pages = slots.div(page_size, rounding_mode="floor")
    inside = (rows >= 0) & (rows < page_table.shape[0])
    inside &= (pages >= 0) & (pages < page_table.shape[1])
    ids = page_table[torch.where(inside, rows, 0), torch.where(inside, pages, 0)].long()
    return torch.where(inside, ids, -1), slots.remainder(page_size)


def cache_capacity(cache: Tensor, page_table: Tensor | None) -> int:
    """Slots that one sequence has in a cache."""
    return cache.shape[1] * (1 if page_table is None else page_table.shape[1])


def cache_side(
    cache: Tensor,
    seqlens: Tensor | None,
    batch_size: int,
    max_seqlen: int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
) -> CacheSide:
    """The keys of a cache.

    Args:
        cache: the key cache; its values are not read.
        seqlens: integer [batch], slots in use, left padding included; None: all.
        batch_size: number of sequences.
        max_seqlen: what is known of the largest length; None: what the cache holds.
        cache_batch_idx: integer [batch], row of the cache or page table.
        cache_leftpad: integer [batch], slots in front of the first key.
        page_table: [rows, max_pages], page ids.
    """
    capacity = cache_capacity(cache, page_table)
    largest = capacity if max_seqlen is None else min(capacity, max_seqlen)
    if seqlens is None:
        seqlens = torch.full((batch_size,), capacity, device=cache.device)
    seqlens = seqlens.long().clamp(0, largest)
    leftpad = None if cache_leftpad is None else cache_leftpad.long()
    if leftpad is not None:
        seqlens = (seqlens - leftpad).clamp(min=0)
    bounds = (0, largest)
    if lengths_are_readable(cache.device) and batch_size > 0:
        bounds = (int(seqlens.min()), int(seqlens.max()))
    rows = None if cache_batch_idx is None else cache_batch_idx.long()
    return CacheSide(seqlens, bounds, rows, leftpad, page_table, cache.shape[1])


def _problem(
    q: Tensor, num_heads_kv: int, batch: range, sides: tuple[Side, Side], options: Options
) -> Problem:
    lengths_q, lengths_k = sides[0].lengths, sides[1].lengths
    shift_min, shift_max = lengths_k.min - lengths_q.max, lengths_k.max - lengths_q.min
    if lengths_q.each is not None and lengths_q.each is lengths_k.each:
        shift_min = shift_max = 0
    return Problem(
        input_dtype=q.dtype,
        device=q.device,
        batch=batch,
        num_heads_q=q.shape[-2],
        num_heads_kv=num_heads_kv,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        shift_min=shift_min,
        shift_max=shift_max,
        options=options,
    )


Part = tuple[Problem, ResultSide, Side]


def problems(
    q: Tensor,
    num_heads_kv: int,
    batch_size: int,
    sides: tuple[FixedSide | PackedSide, FixedSide | PackedSide | CacheSide],
    options: Options,
) -> Iterator[Part]:
    """Sets of sequences that are computed together, with the sides that find their rows.

    Args:
        q: the queries; their values are not read.
        num_heads_kv: number of key heads.
        batch_size: number of sequences; none gives no problem.
        sides: queries and keys.
        options: of the op.
    """
    if batch_size == 0:
        return
    side_q, side_k = sides
    if (
        isinstance(side_q, PackedSide)
        and not isinstance(side_k, FixedSide)
        and lengths_are_readable(q.device)
    ):
        for sequence in range(batch_size):
            one_q, one_k = side_q.one(sequence), side_k.one(sequence)
            batch = range(sequence, sequence + 1)
            yield _problem(q, num_heads_kv, batch, (one_q, one_k), options), one_q, one_k
    else:
        yield _problem(q, num_heads_kv, range(batch_size), sides, options), side_q, side_k
