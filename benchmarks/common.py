"""What every benchmark shares: flash_attn_ext.bench.measure, and where the results are."""

from __future__ import annotations

from pathlib import Path

from flash_attn_ext.bench.measure import (
    MIN_REPETITIONS,
    Json,
    copy_of,
    device_slug,
    environment,
    median_ms,
    peak_bytes,
    sustained_ms,
    write_results,
)

RESULTS = Path(__file__).resolve().parent / "results"

__all__ = [
    "MIN_REPETITIONS",
    "RESULTS",
    "Json",
    "copy_of",
    "device_slug",
    "environment",
    "median_ms",
    "peak_bytes",
    "sustained_ms",
    "write_results",
]
