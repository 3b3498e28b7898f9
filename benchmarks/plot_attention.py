"""Draws the results of bench_attention.py, bench_training.py and bench_decode.py.

    python benchmarks/plot_attention.py [benchmarks/results/<device> ...]

A picture lies beside its file: of attention_dense*.json TFLOP/s over length, of
attention_memory*.json peak memory over length, of attention_step*.json a training step, of
attention_training*.json the loss, of decode_decode*.json GB/s over length (dotted and dashed:
pages). Needs matplotlib (`pip install '.[demo]'`). A picture carries the hash of its file: --check,
which needs no matplotlib, fails where one is missing or was drawn from other contents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common

from flash_attn_ext.bench import providers
from flash_attn_ext.bench.pictures import COLORS, legend, length_axis, new_figure

NAMES = providers.LABELS
TRAINING = {"ours": "C0", "sdpa": "C1"}

HASH_KEY = "Source"
"""Name of the text in a picture that holds the hash of its result file."""

Rows = Sequence[dict[str, Any]]


def dense(content: dict[str, Any]) -> Any:
    """A row of pictures for each pass and mask, a column for each head_dim."""
    rows: Rows = content["rows"]
    head_dims = sorted({row["head_dim"] for row in rows})
    kinds = list(dict.fromkeys((row["pass"], row["causal"]) for row in rows))
    figure = new_figure(3.2 * len(head_dims), 2.6 * len(kinds))
    grid = figure.subplots(len(kinds), len(head_dims), squeeze=False, sharex=True)
    for axes_of_kind, (which, causal) in zip(grid, kinds, strict=True):
        for axes, head_dim in zip(axes_of_kind, head_dims, strict=True):
            chosen = [
                row
                for row in rows
                if (row["pass"], row["causal"], row["head_dim"]) == (which, causal, head_dim)
            ]
            for name in NAMES:
                points = [(r["seqlen"], r["tflops"][name]) for r in chosen if name in r["tflops"]]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", color=COLORS[name], ms=3)
            length_axis(axes, sorted({row["seqlen"] for row in chosen}))
            axes.set_ylim(bottom=0)
            axes.set_title(f"{which}, head_dim {head_dim}{', causal' if causal else ''}", size=9)
        axes_of_kind[0].set_ylabel("TFLOP/s")
    used = [name for name in NAMES if any(name in row["tflops"] for row in rows)]
    _legend(figure, grid[0][0], used)
    return figure


def memory(content: dict[str, Any]) -> Any:
    """Peak memory of forward and backward, both axes logarithmic."""
    rows: Rows = content["rows"]
    figure = new_figure(6.5, 4)
    axes = figure.subplots()
    used = list(rows[0]["peak_bytes"])
    for name in used:
        points = [
            (row["seqlen"], row["peak_bytes"][name] / 2**20)
            for row in rows
            if row["peak_bytes"][name] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLORS[name], ms=3)
    length_axis(axes, [row["seqlen"] for row in rows])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("MiB beside the inputs")
    _legend(figure, axes, used)
    return figure


def step(content: dict[str, Any]) -> Any:
    """Time and peak memory of a training step, a bar for each provider."""
    (row,) = content["rows"]
    names = list(row["ms"])
    figure = new_figure(6.5, 3)
    measures = {
        "ms, forward and backward": row["ms"],
        "MiB beside the inputs": {name: x / 2**20 for name, x in row["peak_bytes"].items()},
    }
    for axes, (label, values) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        bars = axes.bar(
            names, [values[name] for name in names], color=[COLORS[name] for name in names]
        )
        axes.bar_label(bars, fmt="%.3g", size=8)
        axes.set_xticks([])
        axes.set_ylabel(label)
    _legend(figure, axes, names)
    return figure


def decode(content: dict[str, Any]) -> Any:
    """GB/s of K and V over the length, one axes for each batch size and number of heads."""
    rows: Rows = content["rows"]
    kinds = sorted({(row["num_heads"], row["batch_size"]) for row in rows})
    pages = sorted({row["page_size"] for row in rows if row["page_size"]})
    num_heads = len({heads for heads, _ in kinds})
    figure = new_figure(3.2 * len(kinds) / num_heads, 2.6 * num_heads)
    grid = figure.subplots(num_heads, len(kinds) // num_heads, squeeze=False, sharex=True)
    for axes, (heads, batch_size) in zip(grid.flat, kinds, strict=True):
        chosen = [
            row for row in rows if (row["num_heads"], row["batch_size"]) == (heads, batch_size)
        ]
        for page, style in zip((None, *pages), ("o-", "o:", "o--", "o-."), strict=False):
            of_page = [row for row in chosen if row["page_size"] == page]
            for name in NAMES if page is None else ("ours",):
                points = [(r["seqlen_k"], r["gbps"][name]) for r in of_page if name in r["gbps"]]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=COLORS[name], ms=3)
        length_axis(axes, sorted({row["seqlen_k"] for row in chosen}))
        axes.set_ylim(bottom=0)
        axes.set_title(f"batch {batch_size}, {heads} heads", size=9)
    for axes_of_heads in grid:
        axes_of_heads[0].set_ylabel("GB/s of K and V")
    _legend(figure, grid[0][0], [n for n in NAMES if any(n in row["gbps"] for row in rows)])
    return figure


def training(content: dict[str, Any]) -> Any:
    """The loss of every run, one axes for each dtype."""
    rows: Rows = content["rows"]
    figure = new_figure(5 * len(rows), 3.6)
    all_axes = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for axes, row in zip(all_axes, rows, strict=True):
        for name, runs in row["losses"].items():
            for run in runs:
                axes.plot(range(1, len(run) + 1), run, color=TRAINING[name], lw=0.8)
        axes.set_title(
            f"{row['dtype']}: distance {row['distance']:.4f}, noise {row['noise']:.4f}", size=9
        )
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("loss, nats per byte")
    handles = [
        all_axes[0].plot([], [], color=color, label=NAMES[name.replace("sdpa", "sdpa_flash")])[0]
        for name, color in TRAINING.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _legend(figure: Any, axes: Any, names: Sequence[str]) -> None:
    legend(figure, axes, {name: NAMES[name] for name in names})


DRAWINGS = {
    "attention_dense": dense,
    "attention_memory": memory,
    "attention_step": step,
    "attention_training": training,
    "decode_decode": decode,
}


def drawn(folder: Path) -> Iterator[tuple[Path, Callable[[dict[str, Any]], Any], dict[str, Any]]]:
    """The result files of a folder that have a picture: path, drawing, contents."""
    for prefix, drawing in DRAWINGS.items():
        for path in sorted(folder.glob(f"{prefix}*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["rows"]:
                yield path, drawing, content


def draw(folder: Path) -> list[Path]:
    """Writes a .png beside each result file of a folder that has rows; returns their paths."""
    pictures = []
    for path, drawing, content in drawn(folder):
        figure = drawing(content)
        environment = content["environment"]
        figure.suptitle(
            ", ".join(
                environment[key][:limit]
                for key, limit in (("device", None), ("dtype", None), ("date", 10))
                if key in environment
            ),
            size=9,
        )
        pictures.append(path.with_suffix(".png"))
        metadata = {"Software": None, HASH_KEY: source_hash(path)}
        figure.savefig(pictures[-1], dpi=110, metadata=metadata)
    return pictures


def source_hash(path: Path) -> str:
    """SHA-256 of a result file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def png_texts(data: bytes) -> dict[str, str]:
    """The tEXt chunks of a PNG file: length, type, contents and checksum each."""
    texts, at = {}, len(b"\x89PNG\r\n\x1a\n")
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"tEXt":
            key, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
            texts[key.decode("latin-1")] = text.decode("latin-1")
        at += length + 12
    return texts


def stale(folder: Path) -> Iterator[str]:
    """What is wrong with the pictures of a folder."""
    for path, _, _ in drawn(folder):
        picture = path.with_suffix(".png")
        if not picture.exists():
            yield f"{picture}: missing"
        elif png_texts(picture.read_bytes()).get(HASH_KEY) != source_hash(path):
            yield f"{picture}: stale, drawn from other contents of {path.name}"


def main(argv: list[str]) -> int:
    """Draws, or checks; 1 if a picture is stale or there is nothing to draw (with)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="default: all of the results")
    parser.add_argument("--check", action="store_true", help="fail if a picture is stale")
    options = parser.parse_args(argv)
    folders = options.folders or sorted(common.RESULTS.iterdir())
    if options.check:
        problems = [problem for folder in folders for problem in stale(folder)]
        for problem in problems:
            print(f"{problem}; run: python benchmarks/plot_attention.py")
        print(f"pictures: {'stale' if problems else 'up to date'}")
        return int(bool(problems))
    try:
        pictures = [picture for folder in folders for picture in draw(folder)]
    except ImportError:
        print("matplotlib is not installed. Fix: pip install matplotlib", file=sys.stderr)
        return 1
    for picture in pictures:
        print(picture)
    return int(not pictures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
