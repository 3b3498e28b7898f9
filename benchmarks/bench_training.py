"""Trains the demo's GPT with our attention and with PyTorch's, and compares the loss curves.

    python benchmarks/bench_training.py [--steps 300] [--device cpu] [--out DIR]

Same weights, same batches, same order; only the attention function differs. Each is trained
--repeats times, as its backward adds up in any order: the largest distance of two runs of the same
function is the noise that the mean distance between ours and PyTorch's is measured against. The
distance of two runs is the mean over the last half of the steps. Writes
benchmarks/results/<device>/attention_training.json, with the switches of the environment as a
suffix as in bench_attention.py, and exits with 1 beyond --tolerance times the noise.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from bench_attention import suffix
from torch import Tensor

os.environ.setdefault("FLASH_ATTN_EXT_FALLBACK", "error")

import flash_attn_ext
from flash_attn_ext.cli.demo import PRESETS
from flash_attn_ext.examples import gpt
from flash_attn_ext.examples.train_gpt import read_python_library

Json = common.Json
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """PyTorch's attention with the signature that the model uses."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


ATTENTION: dict[str, Callable[..., Tensor]] = {"ours": gpt.flash_attn_func, "sdpa": sdpa}


def losses(
    whose: str, dtype: str, device: torch.device, steps: int, quick: bool
) -> Iterator[float]:
    """The loss of every step, nats per byte."""
    preset = PRESETS["quick" if quick else device.type]
    config = preset.train
    gpt.flash_attn_func = ATTENTION[whose]
    text = read_python_library(preset.corpus_bytes).train
    torch.manual_seed(0)
    model = gpt.GPT(preset.gpt).to(device)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    span = torch.arange(config.seqlen + 1)
    warmup = max(1, steps // 5)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate / 2 * min(1.0, (step + 1) / warmup)
        starts = torch.randint(
            text.numel() - span.numel(), (config.batch_size,), generator=generator
        )
        tokens = text[starts[:, None] + span].to(device, torch.int64)
        with torch.autocast(device.type, AUTOCAST[dtype]):
            loss = model.loss(tokens)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        yield loss.item()


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean absolute difference over the last half of the steps."""
    half = len(a) // 2
    return statistics.fmean(abs(x - y) for x, y in zip(a[half:], b[half:], strict=True))


def compare(dtype: str, device: torch.device, options: argparse.Namespace) -> Json:
    """Trains the runs of one type; a row of the result file."""
    curves: dict[str, list[list[float]]] = {name: [] for name in ATTENTION}
    for name in [*ATTENTION] * options.repeats:
        begin = time.perf_counter()
        run = [round(x, 5) for x in losses(name, dtype, device, options.steps, options.quick)]
        seconds = time.perf_counter() - begin
        print(f"{dtype} {name:<5} last loss {run[-1]:.4f}  {seconds:.1f} s", flush=True)
        curves[name].append(run)
    pairs = itertools.product(curves["ours"], curves["sdpa"])
    same = [pair for runs in curves.values() for pair in itertools.combinations(runs, 2)]
    row = {
        "dtype": dtype,
        "steps": options.steps,
        "losses": curves,
        "distance": statistics.fmean(distance(a, b) for a, b in pairs),
        "noise": max(distance(a, b) for a, b in same),
    }
    print(f"{dtype} distance to PyTorch's {row['distance']:.5f}, noise {row['noise']:.5f}")
    return row


def environment(device: torch.device) -> Json:
    return {
        **common.environment(device),
        "flash_attn_ext": flash_attn_ext.__version__,
        "switches": {n: v for n, v in os.environ.items() if n.startswith("FLASH_ATTN_EXT_")},
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dtypes", default=",".join(AUTOCAST))
    parser.add_argument("--quick", action="store_true", help="the demo's tiny sizes")
    parser.add_argument("--device", type=torch.device, default=None, help="default: cuda if there")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; at least 2")
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="RATIO")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Trains; 1 if a curve of ours is too far from PyTorch's."""
    options = parse(argv)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = [
        compare(dtype, device, options) for dtype in options.dtypes.split(",")
    ]
    env = environment(device)
    folder = options.out or common.RESULTS / common.device_slug(env["device"])
    path = folder / f"attention_training{suffix()}.json"
    common.write_results(path, env, rows)
    print(f"{len(rows)} rows, written to {path}")
    return int(any(row["distance"] > options.tolerance * row["noise"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
