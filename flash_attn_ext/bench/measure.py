"""How everything is measured: interleaved timing, the environment of a run, result files.

Conventions: functions that are compared run alternately in one process on random data, each at
least 20 times, and the median counts. A ratio within one run can be trusted; an absolute number
moves with the board, its heat and its power limit, so the clocks are written beside it.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

MIN_REPETITIONS = 20
SHORT_MS = 1.0
"""Below it a call may take the host longer than the GPU."""

Json = dict[str, Any]


def median_ms(
    functions: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    repetitions: int = MIN_REPETITIONS,
    warmup: int = 3,
) -> list[float]:
    """Median milliseconds of each function, called in turn.

    On CUDA the time is that between two events on the current stream. Nothing is synchronised
    between the calls, so the queue stays ahead of the GPU and no launch overhead is measured. If
    one of the calls takes less than `SHORT_MS`, which the host may need to enqueue it, all are
    measured again, each behind a fill of memory that the GPU is busy with meanwhile, and which
    leaves nothing of their inputs in the L2 cache.

    Args:
        functions: enqueue work on ``device``; their results are dropped.
        device: where they work.
        repetitions: timed calls of each.
        warmup: untimed calls of each before.
    """
    for _ in range(warmup):
        for function in functions:
            function()
    if device.type == "cuda":
        times = _cuda_times(functions, repetitions)
    else:
        times = _host_times(functions, repetitions)
    return [statistics.median(of_function) for of_function in times]


def sustained_ms(
    function: Callable[[], object], device: torch.device, *, seconds: float = 0.15
) -> float:
    """Milliseconds of one of as many calls back to back as take about ``seconds``.

    A GPU that is held by its power limit is slower then than in the turns of `median_ms`.
    """
    (ms,) = median_ms([function], device)
    calls = max(1, round(seconds * 1e3 / ms))

    def back_to_back() -> None:
        for _ in range(calls):
            function()

    if device.type == "cuda":
        (times,) = _between_events([back_to_back], 1, lambda: None)
    else:
        (times,) = _host_times([back_to_back], 1)
    return times[0] / calls


def _new_event() -> torch.cuda.Event:
    event: Any = torch.cuda.Event  # not annotated in torch
    return cast(torch.cuda.Event, event(enable_timing=True))


def _cuda_times(functions: Sequence[Callable[[], object]], repetitions: int) -> list[list[float]]:
    times = _between_events(functions, repetitions, lambda: None)
    if min(map(statistics.median, times), default=SHORT_MS) >= SHORT_MS:
        return times
    # 2 GB take a GPU that copies 3 TB/s in a second 0.7 ms; a slower one needs less memory.
    memory = torch.empty(
        min(2**31, torch.cuda.mem_get_info()[0] // 4), dtype=torch.uint8, device="cuda"
    )
    return _between_events(functions, repetitions, memory.zero_)


def _between_events(
    functions: Sequence[Callable[[], object]], repetitions: int, ahead: Callable[[], object]
) -> list[list[float]]:
    """Milliseconds of each call; `ahead` is enqueued before it and does not count."""
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
    torch.cuda.synchronize()
    for _ in range(repetitions):
        for function, of_function in zip(functions, events, strict=True):
            ahead()
            begin, end = (_new_event() for _ in range(2))
            begin.record()
            function()
            end.record()
            of_function.append((begin, end))
    torch.cuda.synchronize()
    return [[begin.elapsed_time(end) for begin, end in of_function] for of_function in events]


def _host_times(functions: Sequence[Callable[[], object]], repetitions: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repetitions):
        for function, of_function in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            of_function.append((time.perf_counter() - begin) * 1e3)
    return times


def copy_of(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """A ``Tensor.copy_`` that moves ``num_bytes``, half of them read and half written."""
    source = torch.randint(-(2**31), 2**31 - 1, (num_bytes // 8,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def environment(device: torch.device) -> Json:
    """What a reader needs to judge or repeat a run."""
    facts: Json = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join(["python", *map(_relative, sys.argv)]),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, **_nvidia_smi(device)}
    return facts


def device_slug(name: str) -> str:
    """Folder name of a device: ``NVIDIA H200`` -> ``h200``."""
    words = re.sub(r"\b(nvidia|geforce|tesla|\(r\)|\(tm\)|cpu)\b", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown"


def write_results(path: Path, env: Json, rows: Sequence[Json]) -> None:
    """Writes one result file: ``{"environment": {...}, "rows": [{...}, ...]}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": env, "rows": list(rows)}, indent=1) + "\n")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    """The commit that the measured build was made from; unknown to it, that of the working tree."""
    from flash_attn_ext import _load

    built_from = (_load.status().build_info or {}).get("git_sha")
    if built_from:
        return str(built_from)[:12]
    root = Path(__file__).resolve().parents[2]
    if not (root / "csrc").is_dir():  # installed: a repository around it would be another one
        return "unknown"
    return (_output("git", "-C", str(root), "rev-parse", "HEAD") or "unknown")[:12]


def _relative(argument: str) -> str:
    path = Path(argument)
    return path.name if path.is_absolute() else argument


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"model name\s*:\s*(.+)", text)
    return f"CPU {match[1] if match else platform.machine()}"


def _nvidia_smi(device: torch.device) -> Json:
    """Driver, power limit, and clocks and power under a copy, as nvidia-smi names them."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit"]
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    copy = copy_of(2**31, device)
    for _ in range(800):  # about half a second at 4 TB/s: longer than nvidia-smi takes
        copy()
    row = _output("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv")
    torch.cuda.synchronize(device)
    if row is None:
        return dict.fromkeys(fields)
    values = [value.strip() for value in row.splitlines()[-1].split(",")]
    return dict(zip(fields, values, strict=True))


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What this machine's own matrix product reaches: the ceiling of attention."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (ms,) = median_ms([lambda: a @ b], device)
    return 2 * size**3 / ms / 1e9


def copy_gb_per_s(device: torch.device) -> float:
    """What this machine's own copy reaches, read and written bytes: the ceiling of decoding."""
    num_bytes = 2**31 if device.type == "cuda" else 2**28
    (ms,) = median_ms([copy_of(num_bytes, device)], device)
    return num_bytes / ms / 1e6


def peak_bytes(function: Callable[[], object], device: torch.device) -> tuple[int, object]:
    """Most bytes that torch allocates on the device during a call, beside what there was before.

    Returns:
        The bytes, and what the function returned.

    Raises:
        torch.OutOfMemoryError: there is not enough.
    """
    if device.type != "cuda":
        return _host_peak_bytes(function)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    return torch.cuda.max_memory_allocated(device) - before, result


def _host_peak_bytes(function: Callable[[], object]) -> tuple[int, object]:
    """From the profiler, which torch's CPU allocator tells of every tensor."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    recorded: Any = profile.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak, result
