"""Compiler launcher: runs one compiler command and records what it cost.

``python -I measured.py LOG_FOLDER VERBOSE COMPILER ARGS...`` runs the compiler. For a compilation
(``-c ... -o X.o``) it writes beside the object

    X.o.json    {"seconds", "cpu_seconds", "peak_mb"}

and, if the compiler printed anything, LOG_FOLDER/X.log with all of it, where ptxas.py finds the
registers and spills. Output of a compilation that succeeds is shown only if it holds a warning or
VERBOSE is 1. Anything else (``--version``, a link) is handed over unchanged.

The peak is the largest process of the compilation: a driver like nvcc runs its passes one after
another. A compilation is refused if its build has ended, see lock.py. Started once for each object,
so it imports little.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time


def run(log_folder: str, verbose: bool, command: list[str]) -> int:
    """Runs one compiler command; returns its exit status."""
    target = command[command.index("-o") + 1] if "-o" in command[:-1] else ""
    if "-c" not in command or not target.endswith(".o"):
        os.execvp(command[0], command)
    if not _build_lives():
        print(f"{target}: its build has ended, nothing is compiled", file=sys.stderr)
        return 1
    with open(os.path.join(os.path.dirname(log_folder), "compilers.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return _compile(log_folder, verbose, command, target)


def _build_lives() -> bool:
    """Whether the process that started this build is there; true if none is named."""
    try:
        os.kill(int(os.environ.get("FA_BUILD_PID", os.getpid())), 0)
    except ProcessLookupError:
        return False
    return True


def _compile(log_folder: str, verbose: bool, command: list[str], target: str) -> int:
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if output:
        os.makedirs(log_folder, exist_ok=True)
        name = os.path.basename(target).removesuffix(".o") + ".log"
        with open(os.path.join(log_folder, name), "wb") as log:
            log.write(output)
    if verbose or process.returncode != 0 or b"warning" in output.lower():
        sys.stderr.buffer.write(output)
    if process.returncode == 0:
        record = {
            "seconds": round(time.monotonic() - start, 2),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_mb": usage.ru_maxrss // 1024,  # Linux counts KiB
        }
        with open(target + ".json", "w") as file:
            json.dump(record, file)
    return process.returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2] == "1", sys.argv[3:]))
