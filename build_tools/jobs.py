"""How many compilers may run at once: bounded by processors and by memory, cgroups included.

In a container the host's processors and memory are visible but not usable; a build that believes
them is killed for memory, or takes the host down.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_GB_PER_JOB = 1.0
"""GiB that one compiler may take: the budget of one .cu, twice what the largest takes today."""

_GIB = 1 << 30
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True)
class Jobs:
    """The number of compilers, and the sentence that explains it."""

    count: int
    reason: str


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _own_cgroups(root: Path) -> list[Path]:
    """Returns the cgroup folders that may bound this process, its own first."""
    base = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        parent = base if not controllers else base / controllers.removeprefix("name=")
        # Inside a container the path is often the host's and not visible; the mount itself is then
        # the container's own group, so every ancestor is tried up to the mount.
        group = parent / path.lstrip("/")
        while group != parent:
            folders.append(group)
            group = group.parent
        folders.append(parent)
    folders += [base, base / "cpu", base / "memory"]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def cgroup_cpus(root: Path) -> float:
    """Returns the processors that the cgroup allows, or infinity."""
    limit = float("inf")
    for folder in _own_cgroups(root):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
            limit = min(limit, int(quota) / int(period))
    return limit


def _cache_bytes(stat: str) -> int:
    """Returns the file cache that the kernel gives back under pressure, from a memory.stat."""
    for line in stat.splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def cgroup_memory_gib(root: Path) -> float:
    """Returns the memory that the cgroup still allows, in GiB, or infinity."""
    left = float("inf")
    for folder in _own_cgroups(root):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _read(folder / limit_name), _read(folder / usage_name)
            if limit.isdigit() and usage.isdigit() and int(limit) < _UNLIMITED:
                used = int(usage) - _cache_bytes(_read(folder / "memory.stat"))
                left = min(left, max(0, int(limit) - used) / _GIB)
    return left


def available_memory_gib(root: Path) -> float:
    """Returns MemAvailable of the machine in GiB, or infinity if it is not told."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / (1 << 20)
    return float("inf")


def choose_jobs(
    env: Mapping[str, str],
    gb_per_job: float = 0.0,
    root: Path = Path("/"),
    affinity: int | None = None,
) -> Jobs:
    """Chooses the number of compilers.

    Args:
        env: the environment; MAX_JOBS in it wins.
        gb_per_job: GiB to allow for one compiler; 0 means `DEFAULT_GB_PER_JOB`.
        root: where /proc and /sys are, for tests.
        affinity: processors this process may run on; None asks the system.
    """
    asked = env.get("MAX_JOBS", "").strip()
    if asked.isdigit() and int(asked) > 0:
        return Jobs(int(asked), f"MAX_JOBS={asked} is set")
    if affinity is None:
        affinity = len(os.sched_getaffinity(0))
    per_job = gb_per_job or DEFAULT_GB_PER_JOB
    cpus = min(float(affinity), cgroup_cpus(root))
    memory = min(available_memory_gib(root), cgroup_memory_gib(root))
    by_memory = float("inf") if memory == float("inf") else memory // per_job
    count = int(max(1, min(cpus, by_memory)))
    cpu_text = f"{cpus:g} processors"
    if cpus < affinity:
        cpu_text += f" (the cgroup's share of {affinity})"
    memory_text = "memory unknown" if memory == float("inf") else f"{memory:.1f} GiB free"
    bound = "memory" if by_memory < cpus else "processors"
    return Jobs(
        count,
        f"{cpu_text}, {memory_text} at {per_job:g} GiB a job: {bound} decide "
        "(MAX_JOBS=n overrides, FLASH_ATTN_EXT_GB_PER_JOB changes the allowance)",
    )
