"""One build at a time in a folder.

Two ninjas in one folder mix up their records, and an object that is older than its sources then
counts as up to date. The second may be that of a build that was killed: it lives on. So a build
waits for another one, and for compilers that still run; and measured.py, which starts every
compiler, refuses to start one for a build that has ended, upon which its ninja stops.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .log import say

OWNER = "FA_BUILD_PID"
"""Environment of ninja and the compilers: the process of their build."""
COMPILERS_LOCK = "compilers.lock"
"""Beside the folder of the logs; each compiler holds it, shared."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """The body runs while no other build and no compiler of one works in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "build.lock", "w") as builds,
        open(folder / COMPILERS_LOCK, "w") as compilers,
    ):
        _lock(builds, f"another build works in {folder}: waiting for it")
        _lock(compilers, "compilers of a build that was stopped still run: waiting for them")
        fcntl.flock(compilers, fcntl.LOCK_UN)  # our own may take it
        os.environ[OWNER] = str(os.getpid())
        yield


def _lock(file: IO[str], while_waiting: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(while_waiting)
        fcntl.flock(file, fcntl.LOCK_EX)
