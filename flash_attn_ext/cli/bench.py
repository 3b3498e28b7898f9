"""Measure attention beside its peers: speed, or memory.

  python -m flash_attn_ext bench fwd
  python -m flash_attn_ext bench bwd --vs sdpa_cudnn,flash_attn --head-dims 128 --out results
  python -m flash_attn_ext bench decode --batch 16 --heads 32 --heads-kv 8

kinds:
  fwd, bwd  self-attention, full and causal     varlen  packed sequences, forward and backward
  decode    one query against a full KV cache   memory  peak of forward and backward

Everything is run alternately in one process, and medians count. Every result is checked against
fp64 first: a peer that is wrong is marked so, and its time is not compared. Peers that are not
installed, or do not take a problem, are listed with the reason. FlexAttention is compiled for each
problem, which takes seconds; --vs without it saves them. On a GPU flash_attn_ext has to run
a kernel; on the CPU it is its tiled PyTorch operations. --out writes bench_<kind>.json, .png (with
matplotlib) and .html, one file with everything in it. Exit code 1 if flash_attn_ext is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from flash_attn_ext.bench import measure, pictures, report, runs
from flash_attn_ext.bench.measure import Json
from flash_attn_ext.cli import _output
from flash_attn_ext.errors import UnsupportedError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _numbers(text: str) -> list[int]:
    return [_positive(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    _output.add_json_argument(parser)
    parser.add_argument("kind", choices=runs.KINDS)
    parser.add_argument("--vs", type=_words, metavar="NAMES", help="peers, default: all there are")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="default: bf16, on the CPU fp32")
    parser.add_argument("--seqlens", type=_numbers, metavar="N,...", help="decode: of the cache")
    parser.add_argument("--head-dims", type=_numbers, metavar="N,...")
    parser.add_argument("--heads", type=_positive, metavar="N", help="query heads")
    parser.add_argument("--heads-kv", type=_positive, metavar="N", help="key/value heads")
    parser.add_argument("--batch", type=_positive, metavar="N")
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument("--causal", action="store_const", const=True, default=None)
    mask.add_argument("--full", dest="causal", action="store_const", const=False)
    parser.add_argument("--repetitions", type=_positive, default=measure.MIN_REPETITIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for JSON, picture and HTML")


@contextlib.contextmanager
def _fallback(device: str) -> Iterator[None]:
    """On a GPU nothing but a kernel is measured; the user's own word wins."""
    name = "FLASH_ATTN_EXT_FALLBACK"
    if device == "cpu" or name in os.environ:
        yield
        return
    os.environ[name] = "error"
    try:
        yield
    finally:
        del os.environ[name]


def run(args: argparse.Namespace) -> int:
    """Measures and shows; 1 if our own result is wrong, 2 if the question makes no sense."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "--device cuda: torch sees no GPU. `python -m flash_attn_ext doctor` says why",
            file=sys.stderr,
        )
        return 2
    sizes = runs.Sizes(
        args.seqlens, args.head_dims, args.heads, args.heads_kv, args.batch, args.causal
    )
    dtype = _DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    setup = runs.Setup(device, dtype, args.repetitions)
    torch.manual_seed(args.seed)
    try:
        names = runs.choose(args.kind, args.vs, device)
        asked = runs.problems(args.kind, sizes, device)
        with _fallback(device.type):
            environment = runs.environment(args.kind, setup)
            rows = list(runs.run(args.kind, setup, asked, names))
    except (UnsupportedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    document = {"environment": environment, "rows": rows}
    if args.json:
        _output.print_json(document)
    else:
        print(report.text(document))
    if args.out is not None:
        _write(args.out / f"bench_{args.kind}.json", document)
    return int(any("ours" in row["wrong"] for row in rows))


def _write(path: Path, document: Json) -> None:
    """The JSON, and beside it the picture and the page; says on stderr what was written."""
    measure.write_results(path, document["environment"], document["rows"])
    picture = None
    try:
        picture = pictures.png(document)
        path.with_suffix(".png").write_bytes(picture)
    except ImportError:
        print(
            "No picture: matplotlib is not installed. Fix: pip install matplotlib", file=sys.stderr
        )
    path.with_suffix(".html").write_text(report.page(document, picture), encoding="utf-8")
    print(f"written: {path.with_suffix('')}.*", file=sys.stderr)
