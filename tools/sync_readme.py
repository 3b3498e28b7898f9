"""Copies into README.zh-CN.md what no translation changes: code, and blocks that tools wrote.

    python tools/sync_readme.py [--check]

The two files have the same blocks (tools/blocks.py) by name and the same fenced code by order; a
new one is first put into both. The text between them is translated by hand, tests/host/test_docs.py
compares its names, links and numbers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ORIGINAL, TRANSLATION = Path("README.md"), Path("README.zh-CN.md")

_BLOCK_OR_CODE = re.compile(
    r"<!-- begin: (?P<name>\S+) -->\n.*?<!-- end: (?P=name) -->|^```\w*\n.*?^```$",
    re.MULTILINE | re.DOTALL,
)


def synced(translation: str, original: str) -> str:
    """The translation with the blocks and the code of the original.

    Raises:
        ValueError: they do not have the same blocks and as much code between them.
    """
    ours, theirs = (list(_BLOCK_OR_CODE.finditer(text)) for text in (translation, original))
    kinds = [[match["name"] or "code" for match in found] for found in (ours, theirs)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{TRANSLATION}: has {', '.join(kinds[0])}; expected as in {ORIGINAL}: "
            f"{', '.join(kinds[1])}; put what is missing into it, an empty block is enough"
        )
    parts = iter(theirs)
    return _BLOCK_OR_CODE.sub(lambda _: next(parts)[0], translation)


def main(argv: list[str]) -> int:
    """Writes the translation, or with --check says whether it is stale; 1 if it is."""
    original, translation = (x.read_text(encoding="utf-8") for x in (ORIGINAL, TRANSLATION))
    result = synced(translation, original)
    if result == translation:
        print(f"{TRANSLATION}: code and blocks are up to date")
    elif argv == ["--check"]:
        print(f"{TRANSLATION}: code or blocks are stale; run: python tools/sync_readme.py")
        return 1
    else:
        TRANSLATION.write_text(result, encoding="utf-8")
        print(f"{TRANSLATION}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
