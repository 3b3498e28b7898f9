"""Checks of the text of every file: left-overs, machine paths, whitespace, size.

    python tools/check_text.py [FILE ...]

Without files: every file that git tracks or would track. Refused are commented-out prints, a TODO
without its issue (write `TODO(#12)`), paths of one machine, conflict markers, trailing blanks, a
missing last newline, CRLF, and files over 1 MB.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 1_000_000
CODE_SUFFIXES = frozenset({".py", ".h", ".cuh", ".cu", ".cpp", ".def", ".sh"})
FREE_OF_RULES = frozenset({"tools/check_text.py", "tests/host/test_tools_text.py"})
"""The rules themselves and their test spell out what they refuse."""

_EVERYWHERE = {
    r"(?<![\w/.~])/(?:home|root|work|Users)/\w": "path of one machine",
    r"^(?:<{7}|>{7}) ": "conflict marker",
    r"[ \t]+$": "trailing blanks",
    r"\r$": "CRLF line end",
}
_IN_CODE = {
    r"//\s*(?:std::)?f?printf\b|//\s*std::c(?:out|err)\b|^\s*#\s*print\(": "commented-out print",
    r"\b(?:TODO|FIXME|XXX)\b(?!\(#\d+\))": "no issue named; write TODO(#12)",
}


def problems(path: Path, name: str) -> Iterator[str]:
    """What is wrong with one file; ``name`` is how to call it."""
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        yield f"{name}: {len(data) / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB"
    if b"\0" in data[:8192] or name in FREE_OF_RULES:
        return
    text = data.decode("utf-8")
    if text and not text.endswith("\n"):
        yield f"{name}: no newline at the end"
    if text.endswith("\n\n"):
        yield f"{name}: blank line at the end"
    rules = _EVERYWHERE | (_IN_CODE if path.suffix in CODE_SUFFIXES else {})
    for number, line in enumerate(text.split("\n"), 1):
        for pattern, problem in rules.items():
            if re.search(pattern, line):
                yield f"{name}:{number}: {problem}"


def repository_files() -> list[str]:
    """Every file that git tracks, or would with `git add .`, relative to the current folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sorted({name for name in listed.split("\0") if name and Path(name).is_file()})


def main(argv: list[str]) -> int:
    """Prints what is wrong; 1 if anything is."""
    names = argv or repository_files()
    found = [p for name in names for p in problems(Path(name), Path(name).as_posix())]
    print("\n".join(found) or f"text: ok ({len(names)} files)")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
