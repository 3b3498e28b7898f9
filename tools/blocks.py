"""Named blocks of Markdown that a tool writes or CI runs.

A block stands between two comments of its own, `<!-- begin: NAME -->` and `<!-- end: NAME -->`:

    python tools/blocks.py README.md test-command

prints the shell lines of the block's first fenced code, so that CI runs what the README says.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def _find(text: str, name: str) -> re.Match[str]:
    pattern = rf"<!-- begin: {re.escape(name)} -->\n(?P<body>.*?)<!-- end: {re.escape(name)} -->"
    found = list(re.finditer(pattern, text, re.DOTALL))
    if len(found) != 1:
        raise ValueError(f"block {name!r}: found {len(found)} times, expected exactly once")
    return found[0]


def read_block(text: str, name: str) -> str:
    """The lines between the markers of block ``name``."""
    return _find(text, name)["body"]


def replace_block(text: str, name: str, body: str) -> str:
    """``text`` with the lines of block ``name`` replaced by ``body``."""
    match = _find(text, name)
    return text[: match.start("body")] + body.strip("\n") + "\n" + text[match.end("body") :]


def fenced_code(text: str, language: str) -> list[str]:
    """The contents of every fenced code block in ``language``."""
    return [m["code"] for m in _FENCE.finditer(text) if m["language"] == language]


def update_main(
    argv: list[str], *, description: str, generators: Mapping[str, Callable[[], str]]
) -> int:
    """Command line of a tool that generates blocks of a Markdown file, by their names.

    Writes those that the file has, or with --check compares them and exits with 1 when one is
    stale.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", nargs="?", type=Path, default=Path("README.md"))
    parser.add_argument("--check", action="store_true", help="fail if a block is stale")
    options = parser.parse_args(argv)

    text = options.file.read_text(encoding="utf-8")
    names = [name for name in generators if f"<!-- begin: {name} -->" in text]
    if not names:
        raise ValueError(f"{options.file}: has none of the blocks {', '.join(generators)}")
    stale = False
    for name in names:
        before, text = text, replace_block(text, name, generators[name]())
        if before == text:
            print(f"{options.file}: block {name} is up to date")
        elif options.check:
            print(
                f"{options.file}: block {name} is stale; run: python {sys.argv[0]} {options.file}"
            )
            stale = True
        else:
            options.file.write_text(text, encoding="utf-8")
            print(f"{options.file}: block {name} written")
    return int(stale)


def main(argv: list[str]) -> int:
    """Prints the first shell code of a block."""
    file, name = argv
    (code, *_) = fenced_code(read_block(Path(file).read_text(encoding="utf-8"), name), "sh")
    print(code, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
