"""Attention forward and backward beside PyTorch's FlashAttention-2 and cuDNN in the same run.

    python benchmarks/bench_attention.py [--sections dense,gqa,...] [--head-dims 64,128] [--out DIR]

Sections, each with a result file benchmarks/results/<device>/attention_<section>.json:

    dense    16,384 tokens, heads * head_dim = 2048, lengths 512 to 16384, causal or not
    gqa      grouped query heads
    varlen   packed sequences
    shapes   few heads, head_dim 192 with head_dim_v 128, 262,144 tokens in one sequence
    step     forward and backward together, as in a layer of a model of 1.3 billion parameters
    sustained  length 8192 for 0.15 seconds back to back, when the power limit sets the clock
    window   windows of 128 and 1024 keys at length 16384, beside the same call without
    extras   softcap, ALiBi and dropout beside the plain call, head_dim 128, length 8192
    host     microseconds of the host for one call
    memory   peak of forward and backward up to 64k tokens, beside plain PyTorch

What is compared runs alternately; times are medians. FLOPs are 4 * batch * heads * seqlen^2 *
head_dim, half of that if causal, 2.5 times for the backward. On CUDA the tiled backend is refused,
so that a row is always a kernel's. With FLASH_ATTN_EXT_ARCH or FLASH_ATTN_EXT_SMEM_KB in the
environment the files get their values as a suffix. --assert-mean and --assert-row exit with 1 if
the geometric mean over the dense rows, or one of them, is below that multiple of FlashAttention-2.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from attention_calls import (
    BWD_FLOPS,
    PACKED_PROVIDERS,
    PROVIDERS,
    Call,
    PackedProblem,
    Problem,
    backward,
    ours,
    plain,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

os.environ.setdefault("FLASH_ATTN_EXT_FALLBACK", "error")

import flash_attn_ext

Json = common.Json
Calls = dict[str, Callable[[], object]]
PASSES = ("fwd", "bwd")
HIDDEN, TOKENS = 2048, 16384
PEER = "sdpa_flash"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all sections share."""

    device: torch.device
    dtype: torch.dtype
    head_dims: Sequence[int]
    seqlens: Sequence[int]
    passes: Sequence[str]
    repetitions: int


def build_calls(
    problem: Any, tensors: list[Tensor], providers: dict[str, Callable[..., Call]], which: str
) -> Calls:
    """Calls of one pass by provider, each run once. Who refuses is left out."""
    calls: Calls = {}
    for name, build in providers.items():
        try:
            call: Callable[[], object] = build(problem, tensors)
            if which == "bwd":
                call = backward(call, tensors)
            elif which == "fwd+bwd":
                call = forward_and_backward(call, tensors)
            call()
        except (ImportError, RuntimeError, TypeError) as error:
            if name == "ours":
                raise
            print(f"  {which} without {name}: {str(error).splitlines()[0][:80]}")
            continue
        calls[name] = call
    return calls


def forward_and_backward(call: Call, tensors: Sequence[Tensor]) -> Callable[[], object]:
    dout = torch.randn_like(call())
    return lambda: torch.autograd.grad(call(), list(tensors), dout)


def speeds(problem: Any, which: str, ms: dict[str, float]) -> dict[str, float]:
    """TFLOP/s by provider."""
    flops = problem.flops() * {"fwd": 1, "bwd": BWD_FLOPS, "fwd+bwd": 1 + BWD_FLOPS}[which]
    return {name: round(flops / t / 1e9, 2) for name, t in ms.items()}


def timed(
    setup: Setup,
    problem: Any,
    providers: dict[str, Callable[..., Call]],
    passes: Sequence[str] | None = None,
    more: Callable[[str, Calls], Json] = lambda which, calls: {},
) -> Iterator[Json]:
    """One row for each pass: milliseconds and TFLOP/s by provider, and what `more` measures."""
    tensors = problem.tensors(setup.device, setup.dtype)
    for which in setup.passes if passes is None else passes:
        with torch.set_grad_enabled(which != "fwd"):
            calls = build_calls(problem, tensors, providers, which)
            times = common.median_ms(
                list(calls.values()), setup.device, repetitions=setup.repetitions
            )
            ms = dict(zip(calls, times, strict=True))
            yield {
                "pass": which,
                **dataclasses.asdict(problem),
                "ms": {name: round(t, 5) for name, t in ms.items()},
                "tflops": speeds(problem, which, ms),
                **more(which, calls),
            }


def show(row: Json, what: str) -> Json:
    """Prints a row of `timed`; returns it."""
    speeds = "  ".join(f"{name} {tflops:7.1f}" for name, tflops in row["tflops"].items())
    peer = row["ms"].get(PEER)
    ratio = f"  {peer / row['ms']['ours']:.2f}x FlashAttention-2" if peer else ""
    print(f"{row['pass']} {what:<46} {speeds} TFLOP/s{ratio}", flush=True)
    return row


def dense(setup: Setup) -> Iterator[Json]:
    for head_dim in setup.head_dims:
        for causal in (False, True):
            for seqlen in setup.seqlens:
                num_heads = max(1, HIDDEN // head_dim)
                batch_size = max(1, TOKENS // seqlen)
                problem = Problem(batch_size, seqlen, num_heads, num_heads, head_dim, causal)
                for row in timed(setup, problem, PROVIDERS):
                    yield show(row, f"d {head_dim}{', causal' if causal else ''}, length {seqlen}")


def gqa(setup: Setup) -> Iterator[Json]:
    for num_heads, num_heads_kv, head_dim, seqlen in (
        (32, 8, 128, 8192),
        (32, 8, 128, 2048),
        (64, 8, 64, 4096),
        (16, 1, 128, 4096),
    ):
        problem = Problem(2, seqlen, num_heads, num_heads_kv, head_dim, causal=True)
        for row in timed(setup, problem, PROVIDERS):
            yield show(row, f"{num_heads}/{num_heads_kv} heads, d {head_dim}, length {seqlen}")


def packed_problems() -> dict[str, PackedProblem]:
    """Mixed, equal and skewed lengths; the same in every run."""
    rng = random.Random(0)
    mixed = tuple(rng.randint(256, 4096) for _ in range(32))
    return {
        "32 sequences of 256 to 4096, d 128": PackedProblem(mixed, 16, 128),
        "32 sequences of 256 to 4096, d 64": PackedProblem(mixed, 32, 64),
        "128 sequences of 128, d 128": PackedProblem((128,) * 128, 16, 128),
        "one of 8192, 64 of 128, d 128": PackedProblem((8192, *(128,) * 64), 16, 128),
    }


def varlen(setup: Setup) -> Iterator[Json]:
    for what, problem in packed_problems().items():
        for row in timed(setup, problem, PACKED_PROVIDERS):
            yield {**show(row, what), "case": what}


def shapes(setup: Setup) -> Iterator[Json]:
    problems = {
        **{
            f"{heads} heads, d 128, length 8192{', causal' if causal else ''}": Problem(
                1, 8192, heads, heads, 128, causal
            )
            for heads in (2, 4, 8)
            for causal in (False, True)
        },
        **{
            f"d 192, of v 128, length {seqlen}{', causal' if causal else ''}": Problem(
                TOKENS // seqlen, seqlen, 16, 16, 192, causal, head_dim_v=128
            )
            for seqlen in (512, 2048, 8192)
            for causal in (False, True)
        },
        "2 / 1 heads, d 128, length 262144, causal": Problem(1, 2**18, 2, 1, 128, causal=True),
    }
    for what, problem in problems.items():
        for row in timed(setup, problem, PROVIDERS):
            yield {**show(row, what), "case": what}


def step(setup: Setup) -> Iterator[Json]:
    """A training step of one layer, and its peak of memory beside the inputs."""
    problem = Problem(4, 4096, 16, 16, 128, causal=True)

    def peaks(which: str, calls: Calls) -> Json:
        measured = {n: common.peak_bytes(call, setup.device)[0] for n, call in calls.items()}
        return {"peak_bytes": measured}

    for row in timed(setup, problem, PROVIDERS, ["fwd+bwd"], peaks):
        yield show(row, "batch 4, length 4096, 16 heads, d 128, causal")


def sustained(setup: Setup) -> Iterator[Json]:
    """`sustained_tflops` is the speed back to back, `tflops` that of calls in turn."""
    for head_dim, causal in itertools.product(setup.head_dims, (False, True)):
        heads = max(1, HIDDEN // head_dim)
        problem = Problem(2, 8192, heads, heads, head_dim, causal)

        def back_to_back(which: str, calls: Calls, problem: Problem = problem) -> Json:
            ms = {name: common.sustained_ms(call, setup.device) for name, call in calls.items()}
            return {"sustained_tflops": speeds(problem, which, ms)}

        for row in timed(setup, problem, PROVIDERS, more=back_to_back):
            what = f"d {head_dim}{', causal' if causal else ''}, length 8192"
            show(row, what)
            shown = "  ".join(f"{name} {x:7.1f}" for name, x in row["sustained_tflops"].items())
            print(f"{'    back to back':<{len(what) + 4}} {shown} TFLOP/s", flush=True)
            yield row


def window(setup: Setup) -> Iterator[Json]:
    """Windowed and full calls alternate; full_over_window is how much faster the window is."""
    for head_dim, causal, keys in itertools.product((64, 128), (False, True), (128, 1024)):
        heads = HIDDEN // head_dim
        full = Problem(1, 16384, heads, heads, head_dim, causal)
        left, right = (keys, 0) if causal else (keys // 2, keys // 2)
        windowed = dataclasses.replace(full, window=(left, right))
        builders = {
            "ours": ours,
            "ours_full": lambda problem, tensors, full=full: ours(full, tensors),
        }
        for row in timed(setup, windowed, builders):
            row["tflops"].pop("ours_full")
            row["full_over_window"] = round(row["ms"]["ours_full"] / row["ms"]["ours"], 3)
            show(row, f"d {head_dim}{', causal' if causal else ''}, window {left}, {right}")
            print(f"    {row['full_over_window']:.2f}x faster than full attention")
            yield row


def extras(setup: Setup) -> Iterator[Json]:
    """Options beside the plain call; `relative` is time over that of the plain call."""
    slopes = torch.rand(16, device=setup.device)
    options: dict[str, Json] = {
        "ours": {},
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": slopes},
        "dropout": {"dropout_p": 0.1},
        "deterministic": {"deterministic": True},
    }
    for causal in (False, True):
        problem = Problem(2, 8192, 16, 16, 128, causal)
        builders = {
            name: lambda problem, tensors, o=o: ours(problem, tensors, **o)
            for name, o in options.items()
        }
        for row in timed(setup, problem, builders):
            plain_ms = row["ms"]["ours"]
            row["relative"] = {n: round(t / plain_ms, 4) for n, t in row["ms"].items()}
            show(row, f"d 128{', causal' if causal else ''}, length 8192")
            print("    " + "  ".join(f"{n} {r:.3f}" for n, r in row["relative"].items()))
            yield row


def host_us(function: Callable[[], object], device: torch.device) -> float:
    """Microseconds of the host for one call: the device is never waited for, nor behind by much."""
    samples = []
    for _ in range(30):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(100):
            function()
        samples.append((time.perf_counter() - begin) * 1e4)
    return statistics.median(samples)


def host(setup: Setup) -> Iterator[Json]:
    """Calls of one query and key, so that the device is always done first."""
    problem = Problem(1, 1, 1, 1, 64)
    tensors = problem.tensors(setup.device, setup.dtype)
    q, k, v = (x.detach() for x in tensors)
    ops = torch.ops.flash_attn_ext
    scores = (None, None, 0.125, -1, -1, 0.0, 0.0)
    out, lse, _ = ops.fwd.default(q, k, v, *scores, False, 0, 0)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=setup.device)
    transposed = [x.transpose(1, 2) for x in (q, k, v)]
    transposed_leaves = [x.detach().requires_grad_() for x in transposed]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    calls: dict[str, Callable[[], object]] = {
        "op fwd": lambda: ops.fwd.default(q, k, v, *scores, False, 0, 0),
        "op varlen_fwd": lambda: ops.varlen_fwd.default(
            q[0], k[0], v[0], ends, ends, None, None, None, 1, 1, *scores, False, 0, 0
        ),
        "op bwd": lambda: ops.bwd.default(out, q, k, v, out, lse, None, *scores, False, 0),
        "flash_attn_func": ours(problem, [q, k, v]),
        "flash_attn_func, with its backward": forward_and_backward(ours(problem, tensors), tensors),
        "scaled_dot_product_attention": lambda: sdpa(*transposed),
        "scaled_dot_product_attention, with its backward": forward_and_backward(
            lambda: sdpa(*transposed_leaves), transposed_leaves
        ),
    }
    for name, call in calls.items():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            us = host_us(call, setup.device)
        print(f"{name:<50} {us:6.2f} us", flush=True)
        yield {"call": name, "us": round(us, 3)}


def peak_bytes(call: Call, tensors: Sequence[Tensor], device: torch.device) -> int | None:
    """Most memory of forward and backward beside the inputs; None: there is not enough."""

    def step() -> None:
        out = call()
        torch.autograd.grad(out, list(tensors), torch.ones_like(out))

    try:
        return common.peak_bytes(step, device)[0]
    except torch.cuda.OutOfMemoryError:
        return None


def memory(setup: Setup) -> Iterator[Json]:
    if setup.device.type != "cuda":
        print("memory: PyTorch counts that of CUDA only")
        return
    builders: dict[str, Callable[..., Call]] = {
        "ours": ours,
        "ours_deterministic": lambda problem, tensors: ours(problem, tensors, deterministic=True),
        PEER: PROVIDERS[PEER],
        "plain": plain,
    }
    for seqlen in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        problem = Problem(1, seqlen, 16, 16, 128, causal=True)
        found = {}
        for name, build in builders.items():
            tensors = problem.tensors(setup.device, setup.dtype)
            found[name] = peak_bytes(build(problem, tensors), tensors, setup.device)
        print(
            f"{seqlen:>6} tokens  "
            + "  ".join(
                f"{name} {'-' if peak is None else f'{peak / 2**20:.0f} MiB'}"
                for name, peak in found.items()
            ),
            flush=True,
        )
        yield {**dataclasses.asdict(problem), "peak_bytes": found}


SECTIONS: dict[str, Callable[[Setup], Iterator[Json]]] = {
    section.__name__: section
    for section in (dense, gqa, varlen, shapes, step, sustained, window, extras, host, memory)
}


def suffix() -> str:
    """Part of the file names that tells which kernels were forced."""
    arch = os.environ.get("FLASH_ATTN_EXT_ARCH", "")
    smem = os.environ.get("FLASH_ATTN_EXT_SMEM_KB", "")
    return (f"_{arch}" if arch else "") + (f"_{smem}kb" if smem else "")


def switches() -> dict[str, str]:
    """The package's variables in the environment."""
    return {n: v for n, v in os.environ.items() if n.startswith("FLASH_ATTN_EXT_")}


def environment(setup: Setup) -> Json:
    """The environment of a run, with the version, the switches and the kernel of a typical call."""
    env = common.environment(setup.device)
    q = torch.empty(1, 1024, 16, 128, device=setup.device, dtype=setup.dtype)
    return {
        **env,
        "flash_attn_ext": flash_attn_ext.__version__,
        "switches": switches(),
        "kernel": flash_attn_ext.explain(q, q, q).kernel,
        "dtype": str(setup.dtype).removeprefix("torch."),
    }


def ratios(rows: Sequence[Json]) -> dict[str, list[float]]:
    """Time of FlashAttention-2 over ours, by pass."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if PEER in row.get("ms", {}):
            found.setdefault(row["pass"], []).append(row["ms"][PEER] / row["ms"]["ours"])
    return found


def summary(rows: Sequence[Json], least_mean: float, least_row: float) -> bool:
    """Prints mean and least ratio of each pass; True if one is too small."""
    short = False
    for which, of_pass in ratios(rows).items():
        mean, least = math.exp(statistics.fmean(map(math.log, of_pass))), min(of_pass)
        print(f"{which}: {mean:.3f}x FlashAttention-2 on average, {least:.3f}x at least")
        short = short or mean < least_mean or least < least_row
    return short


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--head-dims", type=numbers, default=[64, 96, 128, 192, 256])
    parser.add_argument("--seqlens", type=numbers, default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=common.MIN_REPETITIONS)
    parser.add_argument(
        "--device", type=torch.device, default=None, help="default: cuda if present"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")
    parser.add_argument("--assert-mean", type=float, default=0.0, metavar="RATIO")
    parser.add_argument("--assert-row", type=float, default=0.0, metavar="RATIO")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs the sections and writes their files; 1 if an assertion is missed."""
    options = parse(argv)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    setup = Setup(
        device,
        getattr(torch, options.dtype),
        options.head_dims,
        options.seqlens,
        options.passes.split(","),
        options.repetitions,
    )
    short = False
    for section in options.sections.split(","):
        print(f"\n== {section}")
        rows = list(SECTIONS[section](setup))
        env = environment(setup)
        folder = options.out or common.RESULTS / common.device_slug(env["device"])
        path = folder / f"attention_{section}{suffix()}.json"
        common.write_results(path, env, rows)
        print(f"{len(rows)} rows, written to {path}")
        asserted = section == "dense"
        short |= summary(rows, options.assert_mean * asserted, options.assert_row * asserted)
    return int(short)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
