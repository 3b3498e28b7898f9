"""Gate on what ptxas said about every kernel: spills, serialised wgmma, ignored setmaxnreg.

    python tools/check_ptxas.py [build/ptxas] [--allowed tools/allowed_spills.txt] [--table]

The build writes the output of `nvcc -Xptxas -v` to one log per object. This fails on any warning
C75xx (C7508: setmaxnreg ignored; C7510 to C7515: wgmma serialised), on "setmaxnreg ignored" in any
wording, and on spills or warnings about them in a kernel that the list of allowed spills does not
name. An entry of that list that allows nothing any more fails too. --table prints registers, shared
memory and spills of every kernel.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from build_tools.ptxas import KernelUsage, grave_warnings, read_logs

_ALLOWED = re.compile(r"(?P<arch>sm_\w+)\s+(?P<kernel>\S+)\s+(?P<max_bytes>\d+)\s+(?P<reason>\S.*)")


@dataclass(frozen=True)
class AllowedSpill:
    """One line of the list: kernels that may spill, how much, and why."""

    arch: str
    kernel: re.Pattern[str]  # searched in the demangled name
    max_bytes: int
    reason: str

    def covers(self, kernel: KernelUsage) -> bool:
        return self.arch == kernel.arch and self.kernel.search(kernel.name) is not None


def spill_bytes(kernel: KernelUsage) -> int:
    """Bytes that a thread spills: stores and loads together."""
    return kernel.spill_store_bytes + kernel.spill_load_bytes


def read_allowed(path: Path) -> list[AllowedSpill]:
    """The list of allowed spills; raises ValueError on a line that gives no reason."""
    allowed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if (match := _ALLOWED.fullmatch(line.strip())) is None:
            raise ValueError(
                f"{path}:{number}: {line.strip()!r}: expected `sm_NN kernel_regex max_bytes reason`"
            )
        pattern = re.compile(match["kernel"])
        allowed.append(
            AllowedSpill(match["arch"], pattern, int(match["max_bytes"]), match["reason"])
        )
    return allowed


def spill_problems(kernels: Sequence[KernelUsage], allowed: Sequence[AllowedSpill]) -> list[str]:
    """Kernels that spill without leave, and leave that nobody needs."""
    found = []
    for kernel in kernels:
        limit = max((a.max_bytes for a in allowed if a.covers(kernel)), default=0)
        if spill_bytes(kernel) > limit:
            found.append(
                f"{kernel.name} ({kernel.arch}) spills {spill_bytes(kernel)} bytes, "
                f"allowed {limit}; use fewer registers, or list it with its reason"
            )
    for entry in allowed:
        if not any(entry.covers(kernel) and spill_bytes(kernel) for kernel in kernels):
            found.append(
                f"allowed spill `{entry.arch} {entry.kernel.pattern}` matches no kernel that "
                "spills: remove the line"
            )
    return found


def print_table(kernels: Sequence[KernelUsage]) -> None:
    """One row a kernel, the most registers first."""
    print(f"{'regs':>5} {'smem':>7} {'spills':>7}  {'target':<8} kernel")
    for k in sorted(kernels, key=lambda k: (-k.registers, k.arch, k.name)):
        row = f"{k.registers:>5} {k.smem_bytes:>7} {spill_bytes(k):>7}  {k.arch:<8} {k.name}"
        print(row if len(row) <= 160 else f"{row[:157]}...")


def main(argv: list[str]) -> int:
    """Prints the report; 1 if a kernel is refused, 2 if there is nothing to read."""
    parser = argparse.ArgumentParser(description="spill and warning gate over the ptxas logs")
    parser.add_argument("logs", nargs="?", type=Path, default=Path("build/ptxas"))
    parser.add_argument(
        "--allowed", type=Path, default=Path(__file__).parent / "allowed_spills.txt"
    )
    parser.add_argument("--table", action="store_true", help="print every kernel")
    options = parser.parse_args(argv)

    logs = sorted(options.logs.glob("*.log"))
    kernels = [kernel for of_log in read_logs(logs).values() for kernel in of_log]
    if not kernels:
        print(f"check_ptxas: no kernel in {options.logs}/*.log; build with nvcc first")
        return 2
    found = [
        f"{log}: {line}" for log in logs for line in grave_warnings(log.read_text(errors="replace"))
    ]
    found += spill_problems(kernels, read_allowed(options.allowed))

    if options.table:
        print_table(kernels)
    for problem in found:
        print(f"error: {problem}")
    print(
        f"ptxas: {len(kernels)} kernels in {len(logs)} objects, "
        f"{sum(spill_bytes(k) > 0 for k in kernels)} spill, "
        f"at most {max(k.registers for k in kernels)} registers, {len(found)} errors"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
