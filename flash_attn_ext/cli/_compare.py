"""Time and peak memory of one way to compute attention, measured in a process of its own.

A process of its own makes the peak honest, and a provider that runs out of memory takes only its
own process down. The child runs `main`: it prints one JSON line for each length, shortest first,
and stops when a length takes too long.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_ext import flash_attn_func
from flash_attn_ext.examples.gpt import plain_attention

MAX_SECONDS_PER_CALL = 10.0  # longer lengths are left out after a call that took longer
TIMED_SECONDS = 0.4  # calls are repeated for this long
MAX_CALLS = 10
WARM_UP_SEQLEN = 16  # loads libraries and starts threads before anything is measured


@dataclass(frozen=True)
class Measurement:
    """Forward and backward of causal attention at one length; see `PEAK_MEANING`.

    Attributes:
        provider: see `PROVIDERS`.
        seqlen: queries and keys.
        milliseconds: median of the calls; None if it did not run.
        peak_mb: 10^6 bytes; None if it did not run.
        error: why it did not run.
    """

    provider: str
    seqlen: int
    milliseconds: float | None
    peak_mb: float | None
    error: str | None = None


@dataclass(frozen=True)
class Shape:
    """Sizes of the compared attention; batch size 1."""

    num_heads: int
    head_dim: int
    dtype: torch.dtype


SHAPES = {
    "cpu": Shape(num_heads=2, head_dim=64, dtype=torch.float32),
    "cuda": Shape(num_heads=16, head_dim=128, dtype=torch.bfloat16),
}

PEAK_MEANING = {
    "cpu": "highest resident memory of a process that runs only this, minus what it had before the "
    "first tensor",
    "cuda": "highest memory that torch allocated on the GPU, inputs included",
}
"""Device -> what `Measurement.peak_mb` is."""


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = flash_attn_func(q, k, v, causal=True)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


PROVIDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash_attn_ext": _flash,
    "plain PyTorch": plain_attention,
    "PyTorch SDPA": _sdpa,
}
"""Name -> causal attention on [batch, seqlen, heads, head_dim]."""


def _process_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest so far) of this process."""
    status = Path("/proc/self/status")
    match = re.search(rf"^{field}:\s+(\d+) kB", status.read_text() if status.exists() else "", re.M)
    if match:
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _call(attention: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: list[Tensor]) -> float:
    """Runs forward and backward once; returns seconds."""
    begin = time.perf_counter()
    out = attention(*qkv)
    torch.autograd.grad(out, qkv, grad_outputs=torch.ones_like(out))
    if out.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _measure_length(provider: str, device: str, seqlen: int, base_bytes: int) -> Measurement:
    shape = SHAPES[device]
    attention = PROVIDERS[provider]
    size = (1, seqlen, shape.num_heads, shape.head_dim)
    qkv = [
        torch.randn(size, device=device, dtype=shape.dtype, requires_grad=True) for _ in range(3)
    ]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = _call(attention, qkv)  # loads kernels: its time counts only if it is all that we have
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _process_bytes("VmHWM") - base_bytes
    times = [first] if first > MAX_SECONDS_PER_CALL else []
    while not times or (sum(times) < TIMED_SECONDS and len(times) < MAX_CALLS):
        times.append(_call(attention, qkv))
    return Measurement(provider, seqlen, 1e3 * statistics.median(times), peak / 1e6)


def measure(provider: str, device: str, seqlens: Sequence[int]) -> Iterator[Measurement]:
    """Measures in this process, shortest length first.

    Args:
        provider: a key of `PROVIDERS`.
        device: "cpu" or "cuda".
        seqlens: lengths.

    Yields:
        One measurement each; the last may be an out-of-memory error.
    """
    _measure_length(provider, device, WARM_UP_SEQLEN, 0)
    base_bytes = _process_bytes("VmRSS")
    for seqlen in sorted(seqlens):
        try:
            measurement = _measure_length(provider, device, seqlen, base_bytes)
        except torch.OutOfMemoryError:
            yield Measurement(provider, seqlen, None, None, "out of memory")
            return
        yield measurement
        if (measurement.milliseconds or 0.0) > 1e3 * MAX_SECONDS_PER_CALL:
            return


_CHILD = "import sys; from flash_attn_ext.cli._compare import main; sys.exit(main())"


def measure_in_child(provider: str, device: str, seqlens: Sequence[int]) -> Iterator[Measurement]:
    """Like `measure`, in a new process; if that dies, the length it died at says so."""
    words = [provider, device, *map(str, sorted(seqlens))]
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={
            "FLASH_ATTN_EXT_FALLBACK": "allow",  # the parent has warned; the user's own word wins
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        },
    )
    assert child.stdout is not None
    remaining = sorted(seqlens)
    with child:
        for line in child.stdout:
            measurement = Measurement(**json.loads(line))
            remaining.remove(measurement.seqlen)
            yield measurement
    if child.returncode != 0 and remaining:
        error = f"the process ended with code {child.returncode}"
        yield Measurement(provider, remaining[0], None, None, error)


def main(argv: Sequence[str] | None = None) -> int:
    """The child's side."""
    parser = argparse.ArgumentParser(prog="flash_attn_ext.cli._compare")
    parser.add_argument("provider", choices=tuple(PROVIDERS))
    parser.add_argument("device", choices=tuple(SHAPES))
    parser.add_argument("seqlens", nargs="+", type=int)
    args = parser.parse_args(argv)
    # Harmless: the thread of the backward has no CUDA context before its first cuBLAS call.
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")
    for measurement in measure(args.provider, args.device, args.seqlens):
        print(json.dumps(asdict(measurement)), flush=True)
    return 0
