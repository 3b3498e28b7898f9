"""The progress line of the build.

pip shows nothing of a build until it fails, but the terminal itself can be reached as /dev/tty.
Without a terminal (CI, a notebook) a log line is written at every tenth of the way instead.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from .log import PREFIX


def duration(seconds: float) -> str:
    """Writes a duration: 8s, 3m12s, 1h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def recorded_seconds(record: Path) -> float | None:
    """Returns the seconds that an object took when it was last compiled."""
    try:
        return float(json.loads(record.read_text())["seconds"])
    except (OSError, ValueError, KeyError):
        return None


def remaining_seconds(
    left: Sequence[str], past: Mapping[str, float], elapsed: float, done: int, jobs: int
) -> float | None:
    """Estimates the time that the objects in ``left`` still take; None if nothing is known yet.

    Args:
        left: names of the objects not yet finished.
        past: seconds of objects compiled in this or an earlier build.
        elapsed: seconds since the start.
        done: objects finished in this build.
        jobs: compilers that run at once.
    """
    if not left:
        return 0.0
    if not past:
        return elapsed / done * len(left) if done else None
    typical = sum(past.values()) / len(past)
    work = [past.get(name, typical) for name in left]
    return max(max(work), sum(work) / max(1, jobs))


class Progress:
    """Watches the records of the compiler launcher and shows how far the build is.

    Args:
        objects: the record (``X.o.json``) of each object, by the name to show.
        jobs: compilers that run at once.
        say: writes one log line; used where there is no terminal.
        terminal: the file of the terminal; tests give their own.
        interval: seconds between two looks.
    """

    def __init__(
        self,
        objects: Mapping[str, Path],
        jobs: int,
        say: Callable[[str], None],
        terminal: Path = Path("/dev/tty"),
        interval: float = 1.0,
    ) -> None:
        """Reads the seconds of the last build; nothing is shown before the context is entered."""
        self._objects = dict(objects)
        self._jobs = jobs
        self._say = say
        self._terminal = terminal
        self._interval = interval
        self._past = {
            name: seconds
            for name, record in objects.items()
            if (seconds := recorded_seconds(record)) is not None
        }
        self._seen = {name: self._stamp(name) for name in objects}
        self._finished: list[str] = []
        self._passed: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = time.monotonic()
        self._tenths = 0
        self._last_finish = 0.0  # seconds after the start

    def __enter__(self) -> Progress:
        """Starts to watch."""
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops to watch, after a last look."""
        self._stop.set()
        self._thread.join()

    def finish(self, names: Iterable[str]) -> None:
        """Counts objects as finished, those that were up to date and not compiled included."""
        self._passed.update(names)

    def _stamp(self, name: str) -> int:
        try:
            return self._objects[name].stat().st_mtime_ns
        except OSError:
            return 0

    def _look(self) -> None:
        for name, seen in self._seen.items():
            changed = name in self._passed or self._stamp(name) != seen
            if name not in self._finished and changed:
                self._finished.append(name)
                self._last_finish = time.monotonic() - self._start
                seconds = recorded_seconds(self._objects[name])
                if seconds is not None:
                    self._past[name] = seconds

    def line(self) -> str:
        """Returns the progress line of this moment."""
        elapsed = time.monotonic() - self._start
        left = [name for name in self._objects if name not in self._finished]
        done = len(self._finished)
        eta = remaining_seconds(left, self._past, elapsed, done, self._jobs)
        latest = self._finished[-1] if self._finished else "starting"
        # The estimate was made when the last object finished; once it is used up, nothing is known.
        if eta is not None:
            eta -= elapsed - self._last_finish
        eta_text = f"  ETA {duration(eta)}" if eta is not None and eta > 0 else ""
        return f"{done}/{len(self._objects)} objects  {latest}  {duration(elapsed)}{eta_text}"

    def _open_terminal(self) -> TextIO | None:
        try:
            return self._terminal.open("w")
        except OSError:
            return None

    def _watch(self) -> None:
        terminal = self._open_terminal()
        while True:
            stopping = self._stop.wait(self._interval)
            self._look()
            if terminal:
                terminal.write(f"\r\x1b[K{PREFIX} {self.line()}")
                terminal.flush()
            elif self._objects:
                tenths = 10 * len(self._finished) // len(self._objects)
                if tenths > self._tenths:
                    self._tenths = tenths
                    self._say(self.line())
            if stopping:
                break
        if terminal:
            terminal.write("\r\x1b[K")
            terminal.close()
