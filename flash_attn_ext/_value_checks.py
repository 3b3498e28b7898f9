"""Checks of the values in index tensors: lengths, rows of a cache, page ids.

The checks of a call are one list. On the CPU each of them reads its tensors. On a GPU, where they
run with FLASH_ATTN_EXT_DEBUG=1 only, one kernel goes through all of them
(csrc/core/value_checks.h), and what it found first is read, which waits for the device. While a
CUDA graph is captured nothing can be read: the kernel becomes a part of the graph, and in a replay
it prints what it finds and traps. Without the compiled library a GPU's tensors are read as those of
the CPU, and not checked while a graph is captured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import _load
from ._checks import message

_MAX_INT32 = 2**31 - 1


class LengthTerms(NamedTuple):
    """Of sequence b: constant + values[b] + sign * (cu_seqlens[b + 1] - cu_seqlens[b])."""

    constant: int = 0
    values: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sign: int = 1

    def read(self, batch_size: int) -> list[int]:
        """The length of each sequence."""
        lengths = [self.constant] * batch_size
        if self.values is not None:
            lengths = [n + x for n, x in zip(lengths, self.values.tolist(), strict=True)]
        if self.cu_seqlens is not None:
            ends = itertools.pairwise(self.cu_seqlens.tolist())
            lengths = [
                n + self.sign * (end - begin) for n, (begin, end) in zip(lengths, ends, strict=True)
            ]
        return lengths


# ValueCheckKind of csrc/core/value_checks.h.
_RANGE, _ASCENDING, _PAGES = range(3)


class Row(NamedTuple):
    """A check as the kernel takes it: value, 0 <= value <= limit, and the words to say so."""

    kind: int
    name: str
    text: str
    value: LengthTerms
    limit: LengthTerms
    page_table: Tensor | None = None
    table_rows: Tensor | None = None
    page_size: int = 0


class Check(Protocol):
    """What holds for one argument."""

    def read(self, batch_size: int) -> None:
        """Raises ValueError unless it holds; reads the tensors."""

    def rows(self) -> Iterator[Row]:
        """The same for the kernel."""


class Ascending(NamedTuple):
    """``cu_seqlens`` x [batch + 1] begins with 0 and never falls.

    Attributes:
        name: of the argument.
        x: its value.
        total: number of rows that the sequences share; None = not known.
        max_name: of the argument ``max_seqlen``.
        max_seqlen: no sequence may be longer; None = no limit.
    """

    name: str
    x: Tensor
    total: int | None
    max_name: str = ""
    max_seqlen: int | None = None

    def read(self, batch_size: int) -> None:
        """See Check."""
        ends: list[int] = self.x.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        longest = max(lengths, default=0)
        if ends[0] != 0 or any(length < 0 for length in lengths):
            expected = "ascending values that begin with 0"
            raise ValueError(message(self.name, _preview(ends), expected))
        if self.total is not None and ends[-1] > self.total:
            expected = f"at most the {self.total} rows given"
            raise ValueError(message(f"{self.name}[-1]", ends[-1], expected))
        if self.max_seqlen is not None and longest > self.max_seqlen:
            expected = f"at least {longest}, the longest sequence of {self.name}"
            raise ValueError(message(self.max_name, self.max_seqlen, expected))

    def rows(self) -> Iterator[Row]:
        """See Check."""
        lengths = LengthTerms(cu_seqlens=self.x)
        total = LengthTerms(_MAX_INT32 if self.total is None else self.total)
        text = "ascending from 0, at most the rows given"
        yield Row(_ASCENDING, self.name, text, lengths, total)
        if self.max_seqlen is not None:
            limit = LengthTerms(self.max_seqlen)
            yield Row(_RANGE, f"length in {self.name}", self.max_name, lengths, limit)


def _preview(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"{list(values[:8])} and more"


class Bounded(NamedTuple):
    """0 <= x[b] <= limit of sequence b."""

    name: str
    x: Tensor
    limit: LengthTerms
    limit_name: str

    def read(self, batch_size: int) -> None:
        """See Check."""
        limits = self.limit.read(batch_size)
        for index, (value, limit) in enumerate(zip(self.x.tolist(), limits, strict=True)):
            if not 0 <= value <= limit:
                expected = f"0 to {limit}, {self.limit_name}"
                raise ValueError(message(f"{self.name}[{index}]", value, expected))

    def rows(self) -> Iterator[Row]:
        """See Check."""
        yield Row(_RANGE, self.name, self.limit_name, LengthTerms(values=self.x), self.limit)


class FitsPages(NamedTuple):
    """No sequence is longer than what a row of the page table can name."""

    lengths: LengthTerms
    capacity: int

    def read(self, batch_size: int) -> None:
        """See Check."""
        longest = max(self.lengths.read(batch_size), default=0)
        if longest > self.capacity:
            expected = f"at most max_pages * page_size = {self.capacity}"
            raise ValueError(message("seqlen_k", longest, expected, "give page_table more columns"))

    def rows(self) -> Iterator[Row]:
        """See Check."""
        text = "max_pages * page_size"
        yield Row(_RANGE, "seqlen_k", text, self.lengths, LengthTerms(self.capacity))


class PageIds(NamedTuple):
    """Every page id below the lengths exists; entries past them are never read.

    Attributes:
        page_table: [rows, max_pages].
        table_rows: [batch], the row of each sequence; None = 0, 1, 2 ...
        lengths: of the sequences, each fits its pages.
        page_size: keys in a page.
        num_pages: pages that there are.
    """

    page_table: Tensor
    table_rows: Tensor | None
    lengths: LengthTerms
    page_size: int
    num_pages: int

    def read(self, batch_size: int) -> None:
        """See Check."""
        table: list[list[int]] = self.page_table.tolist()
        rows = range(batch_size) if self.table_rows is None else self.table_rows.tolist()
        for row, length in zip(rows, self.lengths.read(batch_size), strict=True):
            for column in range((length + self.page_size - 1) // self.page_size):
                if not 0 <= table[row][column] < self.num_pages:
                    where = f"page_table[{row}, {column}]"
                    expected = f"a page id below {self.num_pages}"
                    raise ValueError(message(where, table[row][column], expected))

    def rows(self) -> Iterator[Row]:
        """See Check."""
        last = LengthTerms(self.num_pages - 1)
        pages = (self.page_table, self.table_rows, self.page_size)
        yield Row(_PAGES, "page_table", "a page id", self.lengths, last, *pages)


def check(checks: Sequence[Check], batch_size: int, device: torch.device) -> None:
    """Goes through the checks of a call in their order; a later one may rely on those before it.

    Args:
        checks: of tensors that `_checks.values_readable`.
        batch_size: number of sequences.
        device: of the tensors.

    Raises:
        ValueError: what was found first, with the sequence.
    """
    if not checks or (device.type == "cuda" and _on_device(checks, batch_size, device)):
        return
    for one in checks:
        one.read(batch_size)


def _on_device(checks: Sequence[Check], batch_size: int, device: torch.device) -> bool:
    """Whether the kernel has checked, or nothing can."""
    with torch.cuda.device(device):
        is_captured = torch.cuda.is_current_stream_capturing()
    if not _load.status().binder_loaded:
        return is_captured
    rows = [row for one in checks for row in one.rows()]
    record = _launch(rows, batch_size, is_read=not is_captured)
    if is_captured:
        return True
    if record.numel() == 0:  # no library for this device
        return False
    index, sequence, row, column, got, low, high = record.tolist()
    if index >= 0:
        name, text = rows[index].name, rows[index].text
        where = f"{name}[{row}]" if column < 0 else f"{name}[{row}, {column}]"
        raise ValueError(message(where, got, f"{low} to {high}, {text}", f"sequence {sequence}"))
    return True


def _launch(rows: Sequence[Row], batch_size: int, is_read: bool) -> Tensor:
    """Runs the op; returns its record, empty unless ``is_read``."""
    tensors: list[Tensor] = []

    def place(x: Tensor | None) -> int:
        if x is None:
            return -1
        tensors.append(x)
        return len(tensors) - 1

    def terms(lengths: LengthTerms) -> tuple[int, ...]:
        values, cu_seqlens = place(lengths.values), place(lengths.cu_seqlens)
        return values, cu_seqlens, lengths.constant, lengths.sign

    table: list[int] = []
    for row in rows:
        table += (row.kind, *terms(row.value), *terms(row.limit))
        table += (place(row.page_table), place(row.table_rows), row.page_size)
    texts = "".join(f"{row.name}\n{row.text}\n" for row in rows)
    record: Tensor = torch.ops.flash_attn_ext.value_checks(
        tensors, table, texts, batch_size, is_read
    )
    return record


def varlen(
    total_q: int,
    k_shape: Sequence[int],
    page_table: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    """The index tensors of varlen attention.

    ``k_shape`` is [total_k, ...], or [num_pages, page_size, ...] with page_table.
    """
    checks: list[Check] = [
        Ascending("cu_seqlens_q", cu_seqlens_q, total_q, "max_seqlen_q", max_seqlen_q)
    ]
    of_sequence = "the length of the sequence"
    if seqused_q is not None:
        limit = LengthTerms(cu_seqlens=cu_seqlens_q)
        checks.append(Bounded("seqused_q", seqused_q, limit, of_sequence))
    lengths, limit_name = LengthTerms(max_seqlen_k), "max_seqlen_k"
    if cu_seqlens_k is not None:
        total_k = k_shape[0] if page_table is None else None
        checks.append(
            Ascending("cu_seqlens_k", cu_seqlens_k, total_k, "max_seqlen_k", max_seqlen_k)
        )
        lengths, limit_name = LengthTerms(cu_seqlens=cu_seqlens_k), of_sequence
    if seqused_k is not None:
        checks.append(Bounded("seqused_k", seqused_k, lengths, limit_name))
        lengths = LengthTerms(values=seqused_k)
    if page_table is not None:
        num_pages, page_size = k_shape[:2]
        checks.append(FitsPages(lengths, page_table.shape[1] * page_size))
        checks.append(PageIds(page_table, None, lengths, page_size, num_pages))
    check(checks, cu_seqlens_q.shape[0] - 1, cu_seqlens_q.device)
