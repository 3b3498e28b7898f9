"""Messages of the build: one prefix, on stderr, flushed, so that their order is kept under pip."""

from __future__ import annotations

import sys
from collections.abc import Sequence

PREFIX = "[flash_attn_ext]"


def say(message: str) -> None:
    """Prints one message; every line of it gets the prefix."""
    for line in message.splitlines():
        print(PREFIX, line, file=sys.stderr, flush=True)


def framed(lines: Sequence[str]) -> str:
    """Returns the lines inside a frame that stands out in pages of compiler output."""
    width = max(len(line) for line in lines)
    rule = "+" + "-" * (width + 2) + "+"
    return "\n".join([rule, *(f"| {line:<{width}} |" for line in lines), rule])
