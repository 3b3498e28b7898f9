"""What a build leaves to be read: ``_build_info.json`` in the package and a table on the screen."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .progress import duration
from .ptxas import KernelUsage, grave_warnings

_GLIBC = re.compile(rb"GLIBC_(\d+)\.(\d+)(?!\d)")
_BUDGET_CPU_SECONDS, _BUDGET_MB = 15.0, 1024  # of one .cu; architecture.md, section 4


@dataclass(frozen=True)
class ObjectCost:
    """What one object file cost.

    Attributes:
        name: "_sm80/sm80_combine".
        seconds: on the clock.
        cpu_seconds: of all passes of the compiler.
        peak_mb: of the largest pass.
        kilobytes: size of the object.
    """

    name: str
    seconds: float
    cpu_seconds: float
    peak_mb: int
    kilobytes: int


@dataclass
class BuildResult:
    """Everything the report is made from.

    Attributes:
        objects: cost of each object, those of an earlier build included.
        libraries: bytes of each shared object, by file name.
        kernels: by object name.
        warnings: lines of ptxas that need a look.
        seconds: of this build.
    """

    objects: list[ObjectCost] = field(default_factory=list)
    libraries: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, list[KernelUsage]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def read_costs(records: Mapping[str, Path]) -> list[ObjectCost]:
    """Reads the records of the compiler launcher (``X.o.json``), by object name."""
    costs = []
    for name, record in records.items():
        try:
            cost = json.loads(record.read_text())
            size = record.with_suffix("").stat().st_size
        except (OSError, ValueError):
            continue
        costs.append(
            ObjectCost(name, cost["seconds"], cost["cpu_seconds"], cost["peak_mb"], size // 1024)
        )
    return costs


def read_warnings(logs: Sequence[Path]) -> list[str]:
    """Returns the grave warnings of ptxas, each with the object it belongs to."""
    return [
        f"{log.stem}: {line}"
        for log in logs
        for line in grave_warnings(log.read_text(errors="replace"))
    ]


def glibc_min(libraries: Sequence[Path]) -> str:
    """Returns the newest glibc version that the libraries refer to: "2.34"; "" if none."""
    found = {
        (int(match[1]), int(match[2]))
        for path in libraries
        for match in _GLIBC.finditer(path.read_bytes())
    }
    return ".".join(map(str, max(found))) if found else ""


def git_sha(root: Path) -> str:
    """Returns the commit of the source, with "+changes" if it was edited; "" without git."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+changes" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()


def build_info(facts: Mapping[str, Any], result: BuildResult) -> dict[str, Any]:
    """Returns the content of ``_build_info.json``: the given facts and what the build measured."""
    return {
        **facts,
        "build_seconds": round(result.seconds, 1),
        "cpu_seconds": round(sum(cost.cpu_seconds for cost in result.objects), 1),
        "peak_compiler_mb": max((cost.peak_mb for cost in result.objects), default=0),
        "objects": [asdict(cost) for cost in result.objects],
        "libraries": result.libraries,
        "kernels": [
            {"object": name, **asdict(kernel)}
            for name, kernels in result.kernels.items()
            for kernel in kernels
        ],
        "ptxas_warnings": result.warnings,
    }


def table(result: BuildResult) -> str:
    """Returns the report of a build: objects by cost, libraries, totals, spills."""
    lines: list[str] = []
    if result.objects:
        width = max(len(cost.name) for cost in result.objects)
        lines.append(f"{'object':<{width}}  seconds  CPU-s  peak MB  size KB  regs  spill B")
        for cost in sorted(result.objects, key=lambda cost: -cost.cpu_seconds):
            kernels = result.kernels.get(cost.name.rpartition("/")[2], [])
            registers = str(max((k.registers for k in kernels), default=0) or "-")
            spills = str(sum(k.spill_store_bytes + k.spill_load_bytes for k in kernels) or "-")
            over = cost.cpu_seconds > _BUDGET_CPU_SECONDS or cost.peak_mb > _BUDGET_MB
            lines.append(
                f"{cost.name:<{width}}  {cost.seconds:7.1f}  {cost.cpu_seconds:5.1f}  "
                f"{cost.peak_mb:7d}  {cost.kilobytes:7d}  {registers:>4}  {spills:>7}"
                + (f"  over {_BUDGET_CPU_SECONDS:g} CPU-s or {_BUDGET_MB} MB" if over else "")
            )
    for file, size in sorted(result.libraries.items()):
        lines.append(f"{file}: {size / 1024:.0f} KB")
    cpu_seconds = sum(cost.cpu_seconds for cost in result.objects)
    peak = max((cost.peak_mb for cost in result.objects), default=0)
    spilling = [k for kernels in result.kernels.values() for k in kernels if k.spill_store_bytes]
    lines.append(
        f"{duration(result.seconds)} on the clock, {cpu_seconds:.0f} CPU-seconds, "
        f"compiler peak {peak} MB, "
        f"{sum(map(len, result.kernels.values()))} kernels, {len(spilling)} with spills"
    )
    lines += [f"spills: {k.name} ({k.arch}): {k.spill_store_bytes} bytes stored" for k in spilling]
    lines += [f"ptxas warning: {warning}" for warning in result.warnings]
    return "\n".join(lines)
