from __future__ import annotations

from pathlib import Path

from build_tools.jobs import cgroup_cpus, cgroup_memory_gib, choose_jobs

GIB = 1 << 30


def fake_root(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def meminfo(gib: float) -> str:
    return f"MemTotal: 999999999 kB\nMemAvailable: {int(gib * (1 << 20))} kB\n"


def test_max_jobs_wins(tmp_path: Path) -> None:
    jobs = choose_jobs({"MAX_JOBS": "7"}, root=tmp_path, affinity=2)
    assert (jobs.count, jobs.reason) == (7, "MAX_JOBS=7 is set")


def test_processors_decide(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {"proc/meminfo": meminfo(64)})
    jobs = choose_jobs({"MAX_JOBS": "many"}, root=root, affinity=8)
    assert jobs.count == 8
    assert jobs.reason.startswith(
        "8 processors, 64.0 GiB free at 1 GiB a job: processors decide (MAX_JOBS=n overrides"
    )


def test_memory_decides_and_one_job_is_the_least(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {"proc/meminfo": meminfo(9)})
    jobs = choose_jobs({}, gb_per_job=4, root=root, affinity=16)
    assert jobs.count == 2
    assert "memory decide" in jobs.reason
    root = fake_root(tmp_path, {"proc/meminfo": meminfo(0.5)})
    assert choose_jobs({}, root=root, affinity=16).count == 1


def test_cgroup_v2(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/job"
    root = fake_root(
        tmp_path,
        {
            "proc/meminfo": meminfo(500),
            "proc/self/cgroup": "0::/user.slice/job\n",
            f"{group}/cpu.max": "300000 100000\n",
            f"{group}/memory.max": f"{8 * GIB}\n",
            f"{group}/memory.current": f"{5 * GIB}\n",
            f"{group}/memory.stat": f"anon 1\ninactive_file {1 * GIB}\n",
        },
    )
    assert cgroup_cpus(root) == 3
    assert cgroup_memory_gib(root) == 4  # 8 allowed, 5 used, of which 1 is cache
    jobs = choose_jobs({}, gb_per_job=2, root=root, affinity=64)
    assert jobs.count == 2
    assert "3 processors (the cgroup's share of 64), 4.0 GiB free" in jobs.reason


def test_cgroup_v2_limit_of_a_parent(tmp_path: Path) -> None:
    root = fake_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
        },
    )
    assert cgroup_cpus(root) == 1.5
    assert cgroup_memory_gib(root) == float("inf")


def test_cgroup_v1(tmp_path: Path) -> None:
    root = fake_root(
        tmp_path,
        {
            "proc/meminfo": meminfo(500),
            "proc/self/cgroup": "4:memory:/docker/x\n1:cpu:/docker/x\n",
            # Inside a container the host's path does not exist; the mount is the group.
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{6 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {1 * GIB}\n",
        },
    )
    assert cgroup_cpus(root) == 2.5
    assert cgroup_memory_gib(root) == 5
    assert choose_jobs({}, root=root, affinity=8).count == 2


def test_cgroup_v1_without_limits(tmp_path: Path) -> None:
    root = fake_root(
        tmp_path,
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        },
    )
    assert cgroup_cpus(root) == float("inf")
    assert cgroup_memory_gib(root) == float("inf")
    jobs = choose_jobs({}, root=root, affinity=3)
    assert jobs.count == 3
    assert "memory unknown" in jobs.reason


def test_this_machine() -> None:
    assert choose_jobs({}).count >= 1
