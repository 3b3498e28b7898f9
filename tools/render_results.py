"""Writes benchmark tables into Markdown, and pictures, from the result files of benchmarks/.

    python tools/render_results.py [--check]              # every document, and the pictures
    python tools/render_results.py README.md [--check]    # the tables of one document

No number is typed: each table is one benchmarks/results/<device>/<benchmark>.json, with the
conditions of the run in the line above it. Blocks: `benchmarks` (row kernels), `companions` (norms
and cross-entropy), `attention-summary` (one line for each head_dim), `attention-pictures` (for a
document in the root), `attention-results` and `decode-results` (every row).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import blocks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMPANIONS = ("norm_", "cross_entropy_")  # ops that begin so
EMPTY = (
    "No results are recorded yet; `python benchmarks/bench_small_kernels.py` on a GPU writes them."
)
EMPTY_ATTENTION = (
    "No results are recorded yet; `python benchmarks/bench_attention.py` on a GPU writes them."
)
EMPTY_DECODE = (
    "No results are recorded yet; `python benchmarks/bench_decode.py` on a GPU writes them."
)
PEER = "sdpa_flash"

Rows = list[dict[str, Any]]


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
    switches = [f"{name}={value}" for name, value in environment.get("switches", {}).items()]
    command = " ".join([*switches, environment["command"]])
    return f"{', '.join(parts)}, {environment['date'][:10]}. `{command}`"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]], words: int) -> str:
    """A table; the first `words` columns are text, the others numbers."""
    lines = [
        f"| {' | '.join(header)} |",
        "|" + "--|" * words + "--:|" * (len(header) - words),
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def load(results: Path, name: str) -> list[tuple[Path, dict[str, Any]]]:
    """Result files of one benchmark: those of every device, then those with forced kernels."""
    paths = sorted(results.glob(f"*/{name}.json")) + sorted(results.glob(f"*/{name}_*.json"))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def table(rows: Rows) -> str:
    """The rows of the row kernels; how much faster than torch where that was measured."""
    lines = []
    with_torch = any(row.get("speedup_over_torch") for row in rows)
    for row in rows:
        # Where a copy is no fair comparison, what torch reaches on the same bytes.
        same_access = row.get("fraction_of_same_access")
        part = f" ({same_access:.0%} of the same bytes negated)" if same_access else ""
        lines.append(
            [
                f"`{row['op']}`",
                row["case"] + part,
                f"{row['num_bytes'] / 1e6:.0f}",
                f"{row['gb_per_s']:.0f}",
                f"{row['copy_gb_per_s']:.0f}",
                f"{row['fraction_of_copy']:.0%}",
                *([times(row.get("speedup_over_torch"))] if with_torch else []),
            ]
        )
    header = ["op", "case", "MB", "GB/s", "copy GB/s", "of the copy"]
    return markdown([*header, *(["times torch's"] if with_torch else [])], lines, 2)


def generate(results: Path = RESULTS, *, of_companions: bool = False) -> str:
    """Row kernels, or norms and cross-entropy: a section for each device that has some."""
    sections = []
    for path, content in load(results, "small_kernels"):
        rows = [row for row in content["rows"] if row["op"].startswith(COMPANIONS) == of_companions]
        if path.stem == "small_kernels" and rows:
            sections.append(f"{conditions(content['environment'])}\n\n{table(rows)}")
    return "\n\n".join(sections) or EMPTY


def companions(results: Path = RESULTS) -> str:
    """Norms and cross-entropy."""
    return generate(results, of_companions=True)


# ---- attention --------------------------------------------------------------------------------


def ratio(row: dict[str, Any]) -> float | None:
    """How many times as fast as FlashAttention-2."""
    peer = row["ms"].get(PEER)
    return None if peer is None else peer / row["ms"]["ours"]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def summary(rows: Rows) -> str:
    """Dense attention: one line for each pass, head_dim and mask."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault((row["pass"], row["head_dim"], row["causal"]), []).append(row)
    lines = []
    for (which, head_dim, causal), group in groups.items():
        longest = max(group, key=lambda row: row["seqlen"])
        found = [r for r in map(ratio, group) if r is not None]
        speeds = [longest["tflops"].get(name) for name in ("ours", PEER, "sdpa_cudnn")]
        lines.append(
            [
                which,
                head_dim,
                "causal" if causal else "full",
                *("-" if speed is None else f"{speed:.0f}" for speed in speeds),
                times(geometric_mean(found) if found else None),
                times(min(found, default=None)),
            ]
        )
    longest_seqlen = max(row["seqlen"] for row in rows)
    speed_of = f"TFLOP/s at length {longest_seqlen}"
    header = ["pass", "head_dim", "mask", speed_of, "FlashAttention-2", "cuDNN"]
    return markdown([*header, "x FlashAttention-2, mean", "least"], lines, 3)


def attention_summary(results: Path = RESULTS) -> str:
    """The summary of every dense run."""
    sections = [
        f"{conditions(content['environment'])}\n\n{summary(content['rows'])}"
        for _, content in load(results, "attention_dense")
        if content["rows"]
    ]
    return "\n\n".join(sections) or EMPTY_ATTENTION


def _speeds(row: dict[str, Any], *words: object) -> list[object]:
    """A line of `speed_table`."""
    speeds = [row["tflops"].get(name) for name in ("ours", PEER, "sdpa_cudnn")]
    cells = ["-" if speed is None else f"{speed:.0f}" for speed in speeds]
    return [row["pass"], *words, f"{row['ms']['ours']:.3f}", *cells, times(ratio(row))]


def speed_table(rows: Rows, header: Sequence[str], words: Callable[..., Sequence[object]]) -> str:
    """Times and speeds beside the peers; `words` describes the problem of a row."""
    numbers = ["ms", "TFLOP/s", "FlashAttention-2", "cuDNN", "x FlashAttention-2"]
    lines = [_speeds(row, *words(row)) for row in rows]
    return markdown(["pass", *header, *numbers], lines, 1 + len(header))


def _mask(row: dict[str, Any]) -> str:
    return "causal" if row["causal"] else "full"


def dense_table(rows: Rows) -> str:
    header = ["head_dim", "mask", "length", "batch", "heads"]
    return speed_table(
        rows,
        header,
        lambda r: (r["head_dim"], _mask(r), r["seqlen"], r["batch_size"], r["num_heads"]),
    )


def gqa_table(rows: Rows) -> str:
    return speed_table(
        rows,
        ["heads of q / of k", "head_dim", "mask", "length"],
        lambda r: (
            f"{r['num_heads']} / {r['num_heads_kv']}",
            r["head_dim"],
            _mask(r),
            r["seqlen"],
        ),
    )


def varlen_table(rows: Rows) -> str:
    return speed_table(
        rows, ["sequences", "heads"], lambda r: (f"{r['case']}, causal", r["num_heads"])
    )


def shapes_table(rows: Rows) -> str:
    return speed_table(rows, ["case", "batch"], lambda r: (r["case"], r["batch_size"]))


def step_table(rows: Rows) -> str:
    header = ["provider", "batch", "length", "heads", "head_dim", "mask", "ms", "TFLOP/s", "peak"]
    lines = [
        [
            name,
            row["batch_size"],
            row["seqlen"],
            row["num_heads"],
            row["head_dim"],
            _mask(row),
            f"{ms:.3f}",
            f"{row['tflops'][name]:.0f}",
            f"{row['peak_bytes'][name] / 2**20:.0f} MiB",
        ]
        for row in rows
        for name, ms in row["ms"].items()
    ]
    return markdown(header, lines, 1)


def sustained_table(rows: Rows) -> str:
    names = [name for name in ("ours", PEER, "sdpa_cudnn") if name in rows[0]["tflops"]]
    lines = [
        [
            row["pass"],
            row["head_dim"],
            _mask(row),
            *(
                f"{row['tflops'][name]:.0f} / {row['sustained_tflops'][name]:.0f}"
                if name in row["tflops"]
                else "-"
                for name in names
            ),
        ]
        for row in rows
    ]
    return markdown(["pass", "head_dim", "mask", *names], lines, 3)


def window_table(rows: Rows) -> str:
    header = ["pass", "head_dim", "mask", "window", "ms", "ms of full", "times as fast"]
    lines = [
        [
            row["pass"],
            row["head_dim"],
            _mask(row),
            ", ".join(map(str, row["window"])),
            f"{row['ms']['ours']:.3f}",
            f"{row['ms']['ours_full']:.3f}",
            f"{row['full_over_window']:.1f}",
        ]
        for row in rows
    ]
    return markdown(header, lines, 4)


def extras_table(rows: Rows) -> str:
    names = [name for name in rows[0]["relative"] if name != "ours"]
    lines = [
        [
            row["pass"],
            row["head_dim"],
            _mask(row),
            row["seqlen"],
            f"{row['ms']['ours']:.3f}",
            *(f"{row['relative'][name] - 1:+.0%}" for name in names),
        ]
        for row in rows
    ]
    return markdown(["pass", "head_dim", "mask", "length", "ms of plain", *names], lines, 4)


def host_table(rows: Rows) -> str:
    lines = [[row["call"], f"{row['us']:.1f}"] for row in rows]
    return markdown(["call", "us of the host"], lines, 1)


def memory_table(rows: Rows) -> str:
    names = list(rows[0]["peak_bytes"])
    lines = [
        [
            row["seqlen"],
            *(
                "-" if (peak := row["peak_bytes"][name]) is None else f"{peak / 2**20:.0f}"
                for name in names
            ),
        ]
        for row in rows
    ]
    return markdown(["tokens", *(f"{name}, MiB" for name in names)], lines, 1)


def training_table(rows: Rows) -> str:
    lines = []
    for row in rows:
        last = {name: statistics.fmean(x[-1] for x in runs) for name, runs in row["losses"].items()}
        lines.append(
            [
                row["dtype"],
                row["steps"],
                *(f"{last[name]:.4f}" for name in ("ours", "sdpa")),
                f"{row['distance']:.4f}",
                f"{row['noise']:.4f}",
            ]
        )
    header = ["dtype", "steps", "last loss, ours", "PyTorch's", "distance of the curves", "noise"]
    return markdown(header, lines, 1)


ATTENTION: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "dense": ("16,384 tokens, heads * head_dim = 2048", dense_table),
    "gqa": ("Grouped query heads, batch 2", gqa_table),
    "varlen": ("Packed sequences", varlen_table),
    "shapes": ("Few heads, uneven head dimensions, a long sequence", shapes_table),
    "step": ("Forward and backward of one layer", step_table),
    "sustained": ("TFLOP/s at length 8192, in turns / back to back for 0.15 s", sustained_table),
    "window": ("Windows at length 16384", window_table),
    "extras": ("Options beside the plain call, batch 2, 16 heads", extras_table),
    "host": ("Host time of one call", host_table),
    "memory": ("Peak memory of forward and backward beside the inputs", memory_table),
    "training": ("The demo's GPT, trained with either attention", training_table),
}
"""Section of bench_attention.py, or bench_training.py -> heading and table."""


def decode_table(rows: Rows) -> str:
    """Microseconds and GB/s or TFLOP/s by provider."""
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    unit, label = ("tflops", "TFLOP/s") if "tflops" in rows[0] else ("gbps", "GB/s")
    sizes = len({row.get("head_dim") for row in rows}) > 1
    lines = [
        [
            *([row["head_dim"]] if sizes else []),
            f"{row['num_heads']} / {row['num_heads_kv']}",
            f"1 to {row['seqlen_k']}" if row.get("drawn_lengths") else row["seqlen_k"],
            row["batch_size"],
            row["seqlen_q"],
            row["page_size"] or "-",
            *(
                f"{us:.1f} us, {row[unit][name]:.0f}"
                if (us := row["us"].get(name)) is not None
                else "-"
                for name in names
            ),
        ]
        for row in rows
    ]
    header = ["heads of q / of k", "keys", "batch", "queries", "page"]
    header = ["head_dim", *header] if sizes else header
    return markdown([*header, *(f"{name}, {label}" for name in names)], lines, 1)


def generation_table(rows: Rows) -> str:
    names = list(rows[0]["tokens_per_second"])
    lines = [
        [
            "replayed" if row["cuda_graph"] else "-",
            row["batch_size"],
            row["prompt"],
            *(f"{row['tokens_per_second'][name]:.0f}" for name in names),
            f"{row['same_tokens']:.0%}",
        ]
        for row in rows
    ]
    header = ["CUDA graph", "batch", "prompt", *(f"{name}, tokens/s" for name in names)]
    return markdown([*header, "same tokens"], lines, 1)


DECODE: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "decode": ("One query", decode_table),
    "dims": ("One query, other head_dims", decode_table),
    "lengths": (
        "One query, caches of different lengths; PyTorch's calls read all keys",
        decode_table,
    ),
    "pages": ("Sizes of pages", decode_table),
    "append": ("A decoding step: append and rotary", decode_table),
    "few": ("A few queries, causal", decode_table),
    "prefill": ("Chunked prefill, causal", decode_table),
    "generate": ("Generation, a GPT of 0.8 billion parameters", generation_table),
    "host": ("Host time of one call", host_table),
}
"""Section of bench_decode.py -> heading and table."""


def every_row(
    results: Path, benchmark: str, parts: dict[str, tuple[str, Callable[[Rows], str]]]
) -> str:
    """Every row of every run, by section; empty without any."""
    sections = []
    for section, (heading, render) in parts.items():
        runs = [
            f"{conditions(content['environment'])}\n\n{render(content['rows'])}"
            for _, content in load(results, f"{benchmark}_{section}")
            if content["rows"]
        ]
        if runs:
            sections.append("\n\n".join([f"## {heading}", *runs]))
    return "\n\n".join(sections)


def attention_results(results: Path = RESULTS) -> str:
    """Every row of every section of every run."""
    return every_row(results, "attention", ATTENTION) or EMPTY_ATTENTION


def decode_results(results: Path = RESULTS) -> str:
    """The same of bench_decode.py."""
    return every_row(results, "decode", DECODE) or EMPTY_DECODE


PICTURES = {
    "attention_dense": "TFLOP/s of attention over the length",
    "attention_memory": "Peak memory of attention over the length",
    "attention_step": "Time and peak memory of forward and backward of one layer",
    "decode_decode": "GB/s of decoding over the length of the cache",
}
"""Result file -> what its picture (benchmarks/plot_attention.py) shows."""


def attention_pictures(results: Path = RESULTS) -> str:
    """The pictures of every run, as seen from the repository's root."""
    lines = []
    for name, what in PICTURES.items():
        for path, content in load(results, name):
            if content["rows"]:
                picture = path.with_suffix(".png").relative_to(results.parents[1])
                kernels = content["environment"].get("switches", {}).get("FLASH_ATTN_EXT_ARCH")
                of_kernels = f", kernels of {kernels}" if kernels else ""
                device = content["environment"]["device"]
                lines.append(f"![{what}, {device}{of_kernels}]({picture.as_posix()})")
    return "\n\n".join(lines) or EMPTY_ATTENTION


GENERATORS = {
    "benchmarks": generate,
    "companions": companions,
    "attention-summary": attention_summary,
    "attention-pictures": attention_pictures,
    "attention-results": attention_results,
    "decode-results": decode_results,
}


def documents() -> list[Path]:
    """Every Markdown file that has one of the blocks."""
    found = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    markers = [f"<!-- begin: {name} -->" for name in GENERATORS]
    return [
        path
        for path in found
        if any(marker in path.read_text(encoding="utf-8") for marker in markers)
    ]


def main(argv: list[str]) -> int:
    """Without a document: all of them and the pictures; 1 if something is stale."""
    if any(not word.startswith("-") for word in argv) or "-h" in argv or "--help" in argv:
        return blocks.update_main(argv, description=__doc__, generators=GENERATORS)
    statuses = [
        blocks.update_main(
            [os.path.relpath(path), *argv], description=__doc__, generators=GENERATORS
        )
        for path in documents()
    ]
    plot = [sys.executable, str(ROOT / "benchmarks" / "plot_attention.py"), *argv]
    statuses.append(subprocess.run(plot, check=False).returncode)
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
