"""Draws the results of bench_attention.py and bench_training.py beside their files.

    python benchmarks/plot_attention.py [benchmarks/results/<device> ...]

attention_dense*.json gives one picture of TFLOP/s over length, attention_memory*.json one of peak
memory over length, attention_training*.json one of the loss. Needs matplotlib
(`pip install '.[demo]'`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

NAMES = {
    "ours": "flash_attn_ext",
    "ours_deterministic": "flash_attn_ext, deterministic",
    "sdpa_flash": "PyTorch, FlashAttention-2",
    "sdpa_cudnn": "PyTorch, cuDNN",
    "plain": "plain PyTorch",
}
COLORS = dict(zip(NAMES, ("C0", "C9", "C1", "C2", "C3"), strict=True))
TRAINING = {"ours": "C0", "sdpa": "C1"}

Rows = Sequence[dict[str, Any]]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _lengths(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.grid(alpha=0.3)


def dense(content: dict[str, Any]) -> Any:
    """A row of pictures for each pass and mask, a column for each head_dim."""
    rows: Rows = content["rows"]
    head_dims = sorted({row["head_dim"] for row in rows})
    kinds = list(dict.fromkeys((row["pass"], row["causal"]) for row in rows))
    figure = _figure(3.2 * len(head_dims), 2.6 * len(kinds))
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
            _lengths(axes, sorted({row["seqlen"] for row in chosen}))
            axes.set_ylim(bottom=0)
            axes.set_title(f"{which}, head_dim {head_dim}{', causal' if causal else ''}", size=9)
        axes_of_kind[0].set_ylabel("TFLOP/s")
    used = [name for name in NAMES if any(name in row["tflops"] for row in rows)]
    _legend(figure, grid[0][0], used)
    return figure


def memory(content: dict[str, Any]) -> Any:
    """Peak memory of forward and backward, both axes logarithmic."""
    rows: Rows = content["rows"]
    figure = _figure(6.5, 4)
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
    _lengths(axes, [row["seqlen"] for row in rows])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("MiB beside the inputs")
    _legend(figure, axes, used)
    return figure


def training(content: dict[str, Any]) -> Any:
    """The loss of every run, one axes for each dtype."""
    rows: Rows = content["rows"]
    figure = _figure(5 * len(rows), 3.6)
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
    handles = [
        axes.plot([], [], "o-", color=COLORS[name], ms=3, label=NAMES[name])[0] for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 3), fontsize=8)


DRAWINGS = {
    "attention_dense": dense,
    "attention_memory": memory,
    "attention_training": training,
}


def draw(folder: Path) -> list[Path]:
    """Writes a .png beside each result file of a folder that has rows; returns their paths."""
    pictures = []
    for prefix, drawing in DRAWINGS.items():
        for path in sorted(folder.glob(f"{prefix}*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if not content["rows"]:
                continue
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
            figure.savefig(pictures[-1], dpi=110, metadata={"Software": None})
    return pictures


def main(argv: list[str]) -> int:
    """Draws; 1 if there is nothing to draw or nothing to draw with."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="default: all of the results")
    folders = parser.parse_args(argv).folders or sorted(common.RESULTS.iterdir())
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
