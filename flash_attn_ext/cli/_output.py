"""What the commands print: tables, marks and JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MARKS = {"ok": "✔", "warning": "!", "error": "✘", "info": "·"}
_ASCII_MARKS = {"ok": "ok", "warning": "!", "error": "X", "info": "-"}


def mark(state: str) -> str:
    """The sign of a state ("ok", "warning", "error", "info") in what the terminal can show."""
    try:
        "".join(_MARKS.values()).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _ASCII_MARKS[state]
    return _MARKS[state]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right, None as "-"."""
    cells = [["-" if value is None else str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    numeric = [
        any(isinstance(row[i], (int, float)) for row in rows)
        and all(row[i] is None or isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def dict_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table whose columns are the keys, in the order of their first appearance."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    return table(header, [[row.get(key) for key in header] for row in rows])


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")


def _plain(value: object) -> Any:
    """What json cannot write by itself: dataclasses become objects, paths text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def print_json(document: object) -> None:
    """Prints the document with indentation; dataclasses and paths are understood."""
    print(json.dumps(document, indent=2, default=_plain))
