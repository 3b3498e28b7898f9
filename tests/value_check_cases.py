"""Random tables of value checks, and what the kernel finds in them, in the plainest code."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import cu_seqlens, int32

from flash_attn_ext import _cache_checks, _value_checks
from flash_attn_ext._value_checks import Check, LengthTerms, Row

NO_PAGE = 2_147_480_000
NOTHING = [-1, 0, 0, -1, 0, 0, 0]


def length_of(terms: LengthTerms, sequence: int) -> int:
    length = terms.constant
    if terms.values is not None:
        length += int(terms.values[sequence])
    if terms.cu_seqlens is not None:
        length += terms.sign * int(terms.cu_seqlens[sequence + 1] - terms.cu_seqlens[sequence])
    return length


def violations(row: Row, sequence: int) -> Iterator[list[int]]:
    """[row, column, got, low, high] of everything that a row of the table refuses."""
    high = length_of(row.limit, sequence)
    if row.kind == _value_checks._RANGE:
        got = length_of(row.value, sequence)
        if not 0 <= got <= high:
            yield [sequence, -1, got, 0, high]
    elif row.kind == _value_checks._ASCENDING:
        assert row.value.cu_seqlens is not None
        ends = row.value.cu_seqlens.tolist()
        if sequence == 0 and ends[0] != 0:
            yield [0, -1, ends[0], 0, 0]
        if not ends[sequence] <= ends[sequence + 1] <= high:
            yield [sequence + 1, -1, ends[sequence + 1], ends[sequence], high]
    else:
        assert row.page_table is not None
        table_row = sequence if row.table_rows is None else int(row.table_rows[sequence])
        num_pages = -(-length_of(row.value, sequence) // row.page_size)
        for column, page in enumerate(row.page_table[table_row, :num_pages].tolist()):
            if not 0 <= page <= high:
                yield [table_row, column, page, 0, high]


def first_violation(rows: Sequence[Row], batch_size: int) -> list[int]:
    """The record of the kernel."""
    for sequence in range(batch_size):
        for index, row in enumerate(rows):
            for found in violations(row, sequence):
                return [index, sequence, *found]
    return NOTHING


def broken(values: list[int], rate: float) -> list[int]:
    """Some of the values replaced by others, most of them near."""
    wrong = [-1, 0, 1, 7, 8, 9, 40, NO_PAGE]
    return [random.choice(wrong) if random.random() < rate else x for x in values]


def cache_call(rate: float) -> dict[str, Any]:
    """Arguments of a call with a cache; ``rate``: of wrong values."""
    batch, num_pages, max_pages, page_size = random.randint(1, 5), 9, 4, random.choice([1, 3, 8])
    is_paged, is_packed = random.random() < 0.7, random.random() < 0.5
    capacity = max_pages * page_size
    new = [random.randint(0, 2) for _ in range(batch)] if is_packed else [2] * batch
    lengths = [random.randint(0, capacity - n) for n in new] if capacity >= 2 else [0] * batch
    table = torch.randint(0, num_pages, (batch + 2, max_pages), dtype=torch.int32)
    for row in table:
        row.copy_(int32(broken(row.tolist(), rate / 2)))
    call: dict[str, Any] = {"cache_seqlens": int32(broken(lengths, rate))}
    if is_paged:
        call["page_table"] = table
    if is_packed:
        call["cu_seqlens_k_new"] = int32(broken(cu_seqlens(new).tolist(), rate))
        call["cu_seqlens_q"] = int32(broken(cu_seqlens([3] * batch).tolist(), rate))
    if is_paged or random.random() < 0.5:
        call["cache_batch_idx"] = int32(broken(random.sample(range(batch + 2), batch), rate))
    if random.random() < 0.5:
        filled = [n + m for n, m in zip(lengths, new, strict=True)]
        call["cache_leftpad"] = int32(broken([random.randint(0, n) for n in filled], rate))
    if random.random() < 0.3:
        call["rotary_seqlens"] = int32(broken([random.randint(0, 8) for _ in range(batch)], rate))
    shape = (num_pages, page_size) if is_paged else (batch + 2, capacity)
    sizes: dict[str, Any] = {
        "q": torch.empty((3 * batch, 2, 8) if is_packed else (batch, 3, 2, 8)),
        "max_seqlen_q": 3,
        "k_cache": torch.empty(*shape, 2, 8),
        "k": torch.empty((sum(new), 2, 8) if is_packed else (batch, 2, 2, 8)),
        "batch_size": batch,
        "rotary_cos": torch.empty(9, 4),
    }
    names = ("cache_batch_idx", "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new")
    return {**dict.fromkeys((*names, "rotary_seqlens")), **sizes, **call}


def varlen_call(rate: float) -> dict[str, Any]:
    """Arguments of varlen attention with pages or without."""
    batch, num_pages, max_pages, page_size = random.randint(1, 5), 9, 4, random.choice([1, 3, 8])
    is_paged = random.random() < 0.6
    lengths_q = [random.randint(0, 8) for _ in range(batch)]
    lengths_k = [random.randint(0, max_pages * page_size) for _ in range(batch)]
    table = torch.randint(0, num_pages, (batch, max_pages), dtype=torch.int32)
    for row in table:
        row.copy_(int32(broken(row.tolist(), rate / 2)))
    used = [random.randint(0, n) for n in lengths_k]
    with_cu = not is_paged or random.random() < 0.5
    with_used = not with_cu or random.random() < 0.5
    return {
        "total_q": sum(lengths_q),
        "k_shape": (num_pages, page_size) if is_paged else (sum(lengths_k), 2),
        "page_table": table if is_paged else None,
        "cu_seqlens_q": int32(broken(cu_seqlens(lengths_q).tolist(), rate)),
        "cu_seqlens_k": int32(broken(cu_seqlens(lengths_k).tolist(), rate)) if with_cu else None,
        "seqused_q": int32(broken([n // 2 for n in lengths_q], rate)),
        "seqused_k": int32(broken(used, rate)) if with_used else None,
        "max_seqlen_q": max(lengths_q) + random.choice([0, 0, 0, -1]),
        "max_seqlen_k": max(lengths_k) + random.choice([0, 0, 0, -1]),
    }


class Calls:
    """What the checks of a call were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checks: list[Check] = []
        self.batch_size = 0
        for module in (_value_checks, _cache_checks):
            monkeypatch.setattr(module, "check", self.keep)

    def keep(self, checks: list[Check], batch_size: int, device: torch.device) -> None:
        self.checks, self.batch_size = checks, batch_size

    def of(self, form: str, rate: float) -> list[Row]:
        """The table of a random call."""
        if form == "cache":
            _cache_checks.cache_values(**cache_call(rate))
        else:
            _value_checks.varlen(**varlen_call(rate))
        return [row for one in self.checks for row in one.rows()]

    def are_refused(self) -> bool:
        """What the checks of the CPU say."""
        try:
            for one in self.checks:
                one.read(self.batch_size)
        except ValueError:
            return True
        return False
