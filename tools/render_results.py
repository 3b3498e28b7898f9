"""Writes the README's benchmark table from the result files of benchmarks/.

    python tools/render_results.py [README.md] [--check]

No number is typed: each table is one benchmarks/results/<device>/small_kernels.json, with the
conditions of the run in the line above it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import blocks

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
EMPTY = (
    "No results are recorded yet; `python benchmarks/bench_small_kernels.py` on a GPU writes them."
)


def conditions(environment: dict[str, Any]) -> str:
    """One sentence about the run."""
    parts = [
        f"**{environment['device']}**",
        f"flash_attn_ext {environment['flash_attn_ext']} at {environment['commit']}",
        f"torch {environment['torch']}",
    ]
    if driver := environment.get("driver_version"):
        parts.append(f"driver {driver}")
    if clock := environment.get("clocks.sm"):
        parts.append(f"SM clock {clock} at {environment['power.draw']} during a copy")
    return f"{', '.join(parts)}, {environment['date'][:10]}. `{environment['command']}`"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one result file."""
    lines = ["| op | case | MB | GB/s | copy GB/s | of the copy |", "|--|--|--:|--:|--:|--:|"]
    for row in rows:
        # Where a copy is no fair comparison, what torch reaches on the same bytes.
        same_access = row.get("fraction_of_same_access")
        part = f" ({same_access:.0%} of the same bytes negated)" if same_access else ""
        lines.append(
            f"| `{row['op']}` | {row['case']}{part} | {row['num_bytes'] / 1e6:.0f} "
            f"| {row['gb_per_s']:.0f} | {row['copy_gb_per_s']:.0f} "
            f"| {row['fraction_of_copy']:.0%} |"
        )
    return "\n".join(lines)


def generate(results: Path = RESULTS) -> str:
    """One section for each device that has results."""
    sections = []
    for path in sorted(results.glob("*/small_kernels.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        sections.append(f"{conditions(content['environment'])}\n\n{table(content['rows'])}")
    return "\n\n".join(sections) or EMPTY


if __name__ == "__main__":
    sys.exit(
        blocks.update_main(sys.argv[1:], description=__doc__, name="benchmarks", generate=generate)
    )
