"""Pictures of the rows of `runs`, and what other pictures of attention share. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch

from . import providers, runs
from .measure import Json

COLORS = {
    name: f"C{number}"
    for name, number in {
        "ours": 0,
        "sdpa_flash": 1,
        "sdpa_cudnn": 2,
        "plain": 3,
        "flash_attn": 4,
        "flash_attn_3": 5,
        "flash_attn_4": 6,
        "sdpa_efficient": 7,
        "xformers": 8,
        "ours_deterministic": 9,
    }.items()
} | {
    "sdpa_math": "silver",
    "torch_varlen": "C1",
    "sdpa_loop": "C3",
    "flex_attention": "gold",
    "flashinfer": "navy",
}
"""Name of a provider -> its colour in every picture."""


def new_figure(width: float, height: float) -> Any:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def length_axis(axes: Any, lengths: Sequence[int]) -> None:
    """A logarithmic axis of lengths."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [in_k(n) for n in lengths])
    axes.grid(alpha=0.3)


def in_k(length: int) -> str:
    """4096 -> "4k"."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def legend(figure: Any, axes: Any, labels: dict[str, str]) -> None:
    """Below the picture; name of a provider -> its label."""
    handles = [
        axes.plot([], [], "o-", color=COLORS[name], ms=3, label=text)[0]
        for name, text in labels.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)


def _names(rows: Sequence[Json]) -> list[str]:
    """Providers that have numbers, in the order of `providers.NAMES`."""
    measured = {name for row in rows for name in (row.get("ms") or row.get("peak_bytes") or {})}
    return [name for name in providers.NAMES if name in measured]


def _length(row: Json) -> int:
    return int(row.get("seqlen") or row.get("seqlen_k") or max(row["seqlens"]))


def _groups(rows: Sequence[Json]) -> dict[str, list[Json]]:
    """Rows that share a picture: the same pass, head dimension and mask."""
    groups: dict[str, list[Json]] = {}
    for row in rows:
        mask = {True: ", causal", False: ", full", None: ""}[row.get("causal")]
        groups.setdefault(f"{row['pass']}, head_dim {row['head_dim']}{mask}", []).append(row)
    return groups


def _ticks(kind: str, rows: Sequence[Json]) -> list[str]:
    if kind == "varlen":
        return [_packed(row["seqlens"]) for row in rows]
    return [in_k(_length(row)) for row in rows]


def _packed(seqlens: Sequence[int]) -> str:
    shortest, longest = min(seqlens), max(seqlens)
    return f"{len(seqlens)} x {longest if shortest == longest else f'{shortest}..{longest}'}"


def _bars(axes: Any, rows: Sequence[Json], names: Sequence[str], metric: str) -> None:
    """One group of bars for each row."""
    width = 0.84 / max(len(names), 1)
    for number, name in enumerate(names):
        values = [row[metric].get(name, 0.0) for row in rows]
        places = [x - 0.42 + (number + 0.5) * width for x in range(len(rows))]
        axes.bar(places, values, width, color=COLORS[name])
        for row, place in zip(rows, places, strict=True):
            if name in row["wrong"]:
                axes.text(place, 0, "wrong", rotation=90, size=6, color="red", ha="center")
    axes.grid(axis="y", alpha=0.3)


def _speed_ups(axes: Any, rows: Sequence[Json], names: Sequence[str]) -> None:
    """How many times as fast ours is, over the rows."""
    for name in names:
        if name != "ours":
            points = [(i, r) for i, row in enumerate(rows) if (r := runs.ratio(row, name))]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=COLORS[name], ms=3)
    axes.axhline(1.0, color="C0", lw=1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def speeds(document: Json) -> Any:
    """For each group: bars of TFLOP/s (decode: GB/s) under the machine's ceiling, and speed-ups."""
    environment, rows = document["environment"], document["rows"]
    kind = environment["kind"]
    metric = runs.METRIC.get(kind, "tflops")
    ceiling, what = environment.get("matmul_tflops"), "matrix product"
    if kind == "decode":
        ceiling, what = environment.get("copy_gb_per_s"), "copy"
    groups, names = _groups(rows), _names(rows)
    figure = new_figure(11, 2.8 * len(groups) + 0.6)
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for (title, of_group), (left, right) in zip(groups.items(), grid, strict=True):
        _bars(left, of_group, names, metric)
        if ceiling is not None:
            left.axhline(ceiling, color="black", lw=1, ls="--")
            left.annotate(
                f"this machine's {what}: {ceiling:.4g}",
                (0.01, ceiling),
                xycoords=("axes fraction", "data"),
                va="bottom",
                size=7,
            )
            left.set_ylim(top=1.15 * ceiling)
        _speed_ups(right, of_group, names)
        left.set_title(title, size=9)
        left.set_ylabel("GB/s of the cache" if kind == "decode" else "TFLOP/s")
        right.set_title("speed-up of flash_attn_ext over each peer", size=9)
        for axes in (left, right):
            ticks = _ticks(kind, of_group)
            axes.set_xticks(range(len(ticks)), ticks, size=8)
    _finish(figure, grid[0][0], document, names)
    return figure


def memory(document: Json) -> Any:
    """Peak memory over length, both axes logarithmic."""
    rows = document["rows"]
    names = _names(rows)
    figure = new_figure(6.5, 4.4)
    axes = figure.subplots()
    for name in names:
        points = [
            (_length(r), r["peak_bytes"][name] / 2**20) for r in rows if name in r["peak_bytes"]
        ]
        axes.plot(*zip(*points, strict=True), "o-", color=COLORS[name], ms=3)
    estimated = [(_length(r), r["estimated_bytes"] / 2**20) for r in rows if "estimated_bytes" in r]
    if estimated:
        axes.plot(*zip(*estimated, strict=True), "k:", label="estimate_memory")
        axes.legend(fontsize=8)
    length_axis(axes, [_length(row) for row in rows])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("MiB of forward and backward beside q, k, v, dout")
    _finish(figure, axes, document, names)
    return figure


def _finish(figure: Any, axes: Any, document: Json, names: Sequence[str]) -> None:
    environment = document["environment"]
    device = torch.device("cuda" if "cuda" in environment else "cpu")
    legend(figure, axes, {name: providers.label(name, device) for name in names})
    figure.suptitle(
        f"{environment['device']}, {environment['dtype']}, torch {environment['torch']}, "
        f"{environment['date'][:10]}",
        size=9,
    )


def png(document: Json) -> bytes:
    """The picture of a run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = (memory if document["environment"]["kind"] == "memory" else speeds)(document)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
