"""Reads what ``ptxas -v`` prints: registers, spills and shared memory of every kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")

# Messages of ptxas that mean a kernel does not do what its source says: C7508 is an ignored
# setmaxnreg, C7510 to C7515 are the reasons for a serialised wgmma.
_GRAVE = re.compile(r"\(C75\d\d\)|wgmma.*serializ|setmaxnreg.*ignored", re.IGNORECASE)


@dataclass(frozen=True)
class KernelUsage:
    """What one kernel needs on one architecture.

    Attributes:
        name: demangled if a demangler is there.
        arch: "sm_80".
        registers: per thread.
        stack_bytes: per thread, local memory; like the next two, of the kernel and of the
            functions it calls.
        spill_store_bytes: per thread.
        spill_load_bytes: per thread.
        smem_bytes: static shared memory per block; the dynamic part is in the plan.
    """

    name: str
    arch: str
    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    smem_bytes: int = 0


def parse_log(text: str) -> list[KernelUsage]:
    """Returns the kernels of one log, in its order."""
    kernels: list[KernelUsage] = []
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            kernels.append(KernelUsage(match[1], match[2]))
        elif not kernels:
            continue
        elif match := _STACK.search(line):
            kernels[-1] = replace(
                kernels[-1],
                stack_bytes=kernels[-1].stack_bytes + int(match[1]),
                spill_store_bytes=kernels[-1].spill_store_bytes + int(match[2]),
                spill_load_bytes=kernels[-1].spill_load_bytes + int(match[3]),
            )
        elif match := _USED.search(line):
            smem = _SMEM.search(line)
            kernels[-1] = replace(
                kernels[-1], registers=int(match[1]), smem_bytes=int(smem[1]) if smem else 0
            )
    return kernels


def grave_warnings(text: str) -> list[str]:
    """Returns the lines that say ptxas serialised a wgmma or ignored a register request."""
    return [line.strip() for line in text.splitlines() if _GRAVE.search(line)]


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Maps mangled names to readable ones; to themselves without c++filt."""
    filt = shutil.which("c++filt")
    if not filt or not names:
        return {name: name for name in names}
    output = subprocess.run(
        [filt], input="\n".join(names), capture_output=True, text=True, timeout=60, check=False
    ).stdout.splitlines()
    if len(output) != len(names):
        return {name: name for name in names}
    return dict(zip(names, output, strict=True))


def read_logs(logs: Iterable[Path]) -> dict[str, list[KernelUsage]]:
    """Returns the kernels of each log by the log's stem, which is the object's name."""
    parsed = {log.stem: parse_log(log.read_text(errors="replace")) for log in sorted(logs)}
    readable = demangled([kernel.name for kernels in parsed.values() for kernel in kernels])
    return {
        stem: [replace(kernel, name=readable[kernel.name]) for kernel in kernels]
        for stem, kernels in parsed.items()
        if kernels
    }
