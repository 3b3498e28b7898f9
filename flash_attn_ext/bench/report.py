"""The rows of `runs` as a text table and as one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Sequence

import torch

from ..cli import _output
from . import providers, runs
from .measure import Json

UNIT = {"tflops": "TFLOP/s", "gb_per_s": "GB/s", "peak_bytes": "MiB"}

_STYLE = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: .2em .6em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.wrong { background: #fdd; color: #900; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .6em; overflow: auto; }"""


def device_of(document: Json) -> torch.device:
    """Kind of device of a run."""
    return torch.device("cuda" if "cuda" in document["environment"] else "cpu")


def metric_of(document: Json) -> str:
    """The key of the numbers that are shown."""
    return runs.METRIC.get(document["environment"]["kind"], "tflops")


def names_of(rows: Sequence[Json]) -> list[str]:
    """Providers that have a number or a verdict."""
    seen = {name for row in rows for name in row["errors"]}
    return [name for name in providers.NAMES if name in seen]


def _number(row: Json, name: str, metric: str) -> float | None:
    value: float | None = row[metric].get(name)
    return value / 2**20 if value is not None and metric == "peak_bytes" else value


def cell(row: Json, name: str, metric: str) -> str:
    """A number, "wrong", or "-"."""
    if name in row["wrong"]:
        return "WRONG"
    value = _number(row, name, metric)
    if value is None:
        return "-"
    return f"{value:.1f}" if metric == "peak_bytes" else f"{value:.4g}"


def _ratios(row: Json, names: Sequence[str]) -> list[str]:
    found = ((name, runs.ratio(row, name)) for name in names if name != "ours")
    return ["-" if r is None else f"{r:.2f}" for _, r in found]


def header(document: Json) -> tuple[list[str], list[str]]:
    """Names of the columns, and of the providers."""
    metric, names = metric_of(document), names_of(document["rows"])
    columns = [f"{name} {UNIT[metric]}" for name in names]
    if any("estimated_bytes" in row for row in document["rows"]):
        columns.append("estimate_memory MiB")
    peers = [f"x {name}" for name in names if name != "ours"]
    return ["pass", "problem", *columns, *peers], names


def cells(document: Json) -> list[list[str]]:
    """The rows of the table."""
    head, names = header(document)
    metric = metric_of(document)
    lines = []
    for row in document["rows"]:
        line = [row["pass"], row["problem"], *(cell(row, name, metric) for name in names)]
        if "estimate_memory MiB" in head:
            estimate = row.get("estimated_bytes")
            line.append("-" if estimate is None else f"{estimate / 2**20:.1f}")
        lines.append([*line, *_ratios(row, names)])
    return lines


def remarks(document: Json) -> list[str]:
    """Sentences below the table: wrong peers, those left out, the mean of each."""
    rows, device = document["rows"], device_of(document)
    what = "the memory" if metric_of(document) == "peak_bytes" else "the time"
    lines = [f"x: {what} of a peer over that of flash_attn_ext"]
    for name in names_of(rows):
        mean = runs.mean_ratio(rows, name)
        if name != "ours" and mean is not None:
            lines.append(f"x {name}: {mean:.2f} on average ({providers.label(name, device)})")
    for row in rows:
        for name, sentence in row["wrong"].items():
            lines.append(
                f"WRONG, not compared: {providers.label(name, device)} in {row['pass']} "
                f"{row['problem']}: {sentence}"
            )
    return [*lines, *_left_out(rows)]


def _left_out(rows: Sequence[Json]) -> Iterator[str]:
    """Why, and who: providers with the same reason in as many rows share a line."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, sentence in row["missing"].items():
            counts[name, sentence] = counts.get((name, sentence), 0) + 1
    names: dict[tuple[str, int], list[str]] = {}
    for (name, sentence), count in counts.items():
        names.setdefault((sentence, count), []).append(name)
    for (sentence, count), of_reason in names.items():
        some = "" if count == len(rows) else f" in {count} of {len(rows)} rows"
        yield f"left out{some}: {', '.join(of_reason)}: {sentence}"


def conditions(document: Json) -> str:
    """One sentence about the run and its ceiling."""
    environment = document["environment"]
    parts = [
        environment["device"],
        f"flash_attn_ext {environment['flash_attn_ext']}: "
        f"{providers.label('ours', device_of(document))}",
        f"torch {environment['torch']}",
        environment["dtype"],
    ]
    if "threads" in environment:
        parts.append(f"CPU threads: {environment['threads']}")
    if "matmul_tflops" in environment:
        parts.append(f"matrix product {environment['matmul_tflops']:.4g} TFLOP/s")
    if "copy_gb_per_s" in environment:
        parts.append(f"copy {environment['copy_gb_per_s']:.4g} GB/s")
    return ", ".join(parts)


def text(document: Json) -> str:
    """What the command prints."""
    table = _output.table(header(document)[0], cells(document))
    return "\n".join([conditions(document), "", table, "", *remarks(document)])


def page(document: Json, picture: bytes | None) -> str:
    """One HTML file; without a picture it says what is missing."""
    environment = document["environment"]
    title = f"flash_attn_ext bench {environment['kind']}"
    head, _ = header(document)
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    for line in cells(document):
        lines.append(
            "".join(
                f"<td{' class=wrong' if value == 'WRONG' else ''}>{html.escape(value)}</td>"
                for value in line
            )
        )
    table = "\n".join(f"<tr>{line}</tr>" for line in lines)
    if picture is None:
        shown = "<p>No picture: matplotlib was not installed (pip install matplotlib).</p>"
    else:
        data = base64.b64encode(picture).decode()
        shown = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
    notes = "\n".join(f"<li>{html.escape(line)}</li>" for line in remarks(document))
    raw = html.escape(json.dumps(environment, indent=1))
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<p>{html.escape(conditions(document))}. Everything was run alternately in one process; times are
medians; every result was checked against fp64.</p>
{shown}
<table>
{table}
</table>
<ul>
{notes}
</ul>
<h2>Environment</h2>
<pre>{raw}</pre>
</html>
"""
