"""The checks of FLASH_ATTN_EXT_DEBUG=1 as far as no GPU is needed."""

from __future__ import annotations

import contextlib
import re
import types

import pytest
import torch
from helpers import int32
from torch import Tensor
from value_check_cases import NOTHING, Calls, first_violation

from flash_attn_ext import _value_checks
from flash_attn_ext._value_checks import LengthTerms, PageIds, Row


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("form", ["cache", "varlen"])
def test_the_table_refuses_what_the_cpu_refuses(
    form: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    num_refused = 0
    for _ in range(300):
        rows = calls.of(form, rate)
        assert len(rows) <= 8  # kMaxValueChecks
        assert all(len(row.name) < 32 and len(row.text) < 48 for row in rows)
        is_refused = calls.are_refused()
        assert (first_violation(rows, calls.batch_size) != NOTHING) == is_refused
        num_refused += is_refused
    assert num_refused < 150 or rate > 0.0
    assert num_refused > 30 or (rate == 0.0 and form == "cache")


@pytest.mark.parametrize(
    ("has_binder", "has_library", "is_captured", "text"),
    [
        (True, True, False, "page_table[1, 0]: got 9, expected 0 to 4, a page id; sequence 0"),
        (True, True, True, None),
        (True, False, False, "page_table[1, 0]: got 9, expected a page id below 5"),
        (True, False, True, None),
        (False, False, False, "page_table[1, 0]: got 9, expected a page id below 5"),
        (False, False, True, None),
    ],
)
def test_what_follows_from_the_record(
    has_binder: bool,
    has_library: bool,
    is_captured: bool,
    text: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read, unless a graph is captured; and what a machine without the kernel does instead."""
    reads: list[bool] = []

    def launch(rows: list[Row], batch_size: int, is_read: bool) -> Tensor:
        reads.append(is_read)
        record = first_violation(rows, batch_size) if is_read and has_library else []
        return torch.tensor(record, dtype=torch.int64)

    monkeypatch.setattr(_value_checks, "_launch", launch)
    status = types.SimpleNamespace(binder_loaded=has_binder)
    monkeypatch.setattr(_value_checks._load, "status", lambda: status)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_captured)
    lengths = LengthTerms(values=int32([2, 1]))
    pages = PageIds(int32([3, 9, 9, 3]).view(2, 2), int32([1, 0]), lengths, 1, 5)
    if text is None:
        _value_checks.check([pages], 2, torch.device("cuda"))
    else:
        with pytest.raises(ValueError, match=re.escape(text)):
            _value_checks.check([pages], 2, torch.device("cuda"))
    assert reads == ([not is_captured] if has_binder else [])
