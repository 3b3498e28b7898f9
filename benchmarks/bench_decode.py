"""Attention against a KV cache: decode, a few queries, chunked prefill; beside PyTorch.

    python benchmarks/bench_decode.py [--sections decode,pages,...] [--out DIR]

Sections, each with a result file benchmarks/results/<device>/decode_<section>.json:

    decode   one query, contiguous caches and pages of 64 and 256, batch 1 to 128
    dims     the same of other head_dims than 128
    lengths  one query, caches of 1 to n keys; PyTorch's calls read all n of each
    pages    pages of 1, 16, 64 and 256, shuffled, beside one piece
    append   a decoding step: append and rotary in the call, beside calls of their own
    few      2 to 16 queries (speculative decoding), causal
    prefill  256 to 1024 queries against 32,768 keys, causal
    host     microseconds of the host for one call
    generate tokens per second of a GPT of 0.8 billion parameters, greedily, with CUDA graphs and
             without; beside the same model with PyTorch's attention over the same caches

Speed is the bytes of K and V over the time; of prefill, the multiplications. The L2 cache is
flushed before each call by reading 256 MB. What is compared runs alternately; times are medians.
cuDNN has one piece, full, and no mask, whatever ours has; so has PyTorch's FlashAttention-2, which
is beside one query only. With FLASH_ATTN_EXT_ARCH in the environment the files get its value as a
suffix.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from bench_attention import host_us, suffix, switches
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

os.environ.setdefault("FLASH_ATTN_EXT_FALLBACK", "error")

import flash_attn_ext
from flash_attn_ext.examples import gpt
from flash_attn_ext.layers.rotary import apply_rotary_emb

Json = common.Json
Call = Callable[[], object]
HEAD_DIM = 128


@dataclasses.dataclass(frozen=True)
class Problem:
    """Queries at the end of caches that are full, or of lengths drawn from 1 to seqlen_k."""

    batch_size: int
    num_heads: int
    num_heads_kv: int
    seqlen_k: int
    seqlen_q: int = 1
    page_size: int | None = None
    head_dim: int = HEAD_DIM
    drawn_lengths: bool = False

    def lengths(self) -> list[int]:
        if not self.drawn_lengths:
            return [self.seqlen_k] * self.batch_size
        generator = torch.Generator().manual_seed(self.batch_size)
        drawn: list[int] = torch.randint(
            1, self.seqlen_k + 1, (self.batch_size,), generator=generator
        ).tolist()
        return drawn

    def kv_bytes(self) -> int:
        return 2 * sum(self.lengths()) * self.num_heads_kv * self.head_dim * 2

    def flops(self) -> float:
        """Half of the keys that only some of the queries see."""
        pairs = self.seqlen_q * (self.seqlen_k - self.seqlen_q / 2)
        return 4 * self.batch_size * self.num_heads * self.head_dim * pairs

    def __str__(self) -> str:
        queries = f", {self.seqlen_q} queries" if self.seqlen_q > 1 else ""
        pages = f", pages of {self.page_size}" if self.page_size else ""
        size = f", head_dim {self.head_dim}" if self.head_dim != HEAD_DIM else ""
        keys = f"1 to {self.seqlen_k}" if self.drawn_lengths else self.seqlen_k
        return (
            f"{keys} x {self.batch_size}, {self.num_heads}/{self.num_heads_kv} heads"
            f"{size}{queries}{pages}"
        )


@dataclasses.dataclass(frozen=True)
class Tensors:
    """q and the caches of a problem, in one piece and, if it has pages, shuffled."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor | None
    cache_seqlens: Tensor

    @staticmethod
    def of(problem: Problem, dtype: torch.dtype) -> Tensors:
        def random(seqlen: int, heads: int) -> Tensor:
            shape = (problem.batch_size, seqlen, heads, problem.head_dim)
            return torch.empty(shape, device="cuda", dtype=dtype).normal_()

        q = random(problem.seqlen_q, problem.num_heads)
        k, v = (random(problem.seqlen_k, problem.num_heads_kv) for _ in range(2))
        k_pages, v_pages, table = k, v, None
        if problem.page_size is not None:
            k_pages, v_pages = (
                x.view(-1, problem.page_size, problem.num_heads_kv, problem.head_dim)
                for x in (k, v)
            )
            pages = torch.randperm(k_pages.shape[0], device="cuda", dtype=torch.int32)
            table = pages.view(problem.batch_size, -1)
        lengths = torch.tensor(problem.lengths(), device="cuda", dtype=torch.int32)
        return Tensors(q, k, v, k_pages, v_pages, table, lengths)


def ours(t: Tensors, **options: Any) -> Call:
    return lambda: flash_attn_ext.flash_attn_with_kvcache(
        t.q,
        t.k_pages,
        t.v_pages,
        cache_seqlens=t.cache_seqlens,
        page_table=t.page_table,
        causal=True,
        **options,
    )


def sdpa(t: Tensors, backend: SDPBackend) -> Call:
    q, k, v = (x.transpose(1, 2) for x in (t.q, t.k, t.v))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    return call


def separately(
    t: Tensors, new: dict[str, Tensor], before: Tensor, table: tuple[Tensor, Tensor]
) -> Call:
    """Append, rotary of q and attention in calls of their own."""
    ops = torch.ops.flash_attn_ext

    def call() -> object:
        ops.append_kv.default(
            t.k, t.v, new["k"], new["v"], before, None, None, None, *table, None, True
        )
        q = ops.rotary.default(t.q, *table, before, None, 1, True, False, False)
        return ours(dataclasses.replace(t, q=q))()

    return call


class Timer:
    """Median microseconds of calls that run alternately behind a flush of the L2 cache."""

    def __init__(self, repetitions: int):
        self.repetitions = repetitions
        self.flushed = torch.ones(64 << 20, device="cuda")

    def __call__(self, calls: dict[str, Call]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
            call()
        for _ in range(0, self.repetitions, 5):
            events = []
            torch.cuda._sleep(3_000_000)  # the host runs ahead
            for _, (name, call) in itertools.product(range(5), calls.items()):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flushed.sum()
                begin.record()
                call()
                end.record()
                events.append((name, begin, end))
            torch.cuda.synchronize()
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) * 1e3)
        return {name: statistics.median(of_call) for name, of_call in times.items()}


def compared(problem: Problem, timer: Timer, calls: dict[str, Call], by_flops: bool) -> Json:
    """One row: microseconds and GB/s, or TFLOP/s, by provider."""
    times = timer(calls)
    work, unit = (
        (problem.flops() / 1e6, "tflops") if by_flops else (problem.kv_bytes() / 1e3, "gbps")
    )
    speeds = {name: work / us for name, us in times.items()}
    print(
        f"{problem!s:<52}" + "  ".join(f"{n} {x:7.0f}" for n, x in speeds.items()), unit, flush=True
    )
    return {
        **dataclasses.asdict(problem),
        "us": {name: round(us, 3) for name, us in times.items()},
        unit: {name: round(x, 1) for name, x in speeds.items()},
    }


def beside_cudnn(problems: Iterator[Problem], timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    """cuDNN, if it takes the call, and for one query FlashAttention-2, over all of the caches."""
    for problem in problems:
        tensors = Tensors.of(problem, dtype)
        calls = {"ours": ours(tensors), "sdpa_cudnn": sdpa(tensors, SDPBackend.CUDNN_ATTENTION)}
        try:
            calls["sdpa_cudnn"]()
        except RuntimeError:  # torch says so of head_dims that its cuDNN does not have
            del calls["sdpa_cudnn"]
        if problem.seqlen_q == 1:  # more would need a mask, which its causal one is not
            calls["sdpa_flash"] = sdpa(tensors, SDPBackend.FLASH_ATTENTION)
        yield compared(problem, timer, calls, by_flops=problem.seqlen_q > 16)


def decode(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    yield from beside_cudnn(
        (
            Problem(batch, heads, 8, length, page_size=page)
            for heads in (32, 64)
            for length in (1024, 8192, 65536)
            for batch in (1, 16, 128)
            for page in (None, 64, 256)
        ),
        timer,
        dtype,
    )


SHAPES = ((1024, 1), (8192, 1), (1024, 16), (8192, 16), (1024, 128), (8192, 64))
"""Length, batch."""


def dims(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    yield from beside_cudnn(
        (
            Problem(batch, 64, 8, length, head_dim=head_dim)
            for head_dim in (64, 96, 192, 256)
            for length, batch in SHAPES
        ),
        timer,
        dtype,
    )


def lengths(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    yield from beside_cudnn(
        (
            Problem(batch, 64, 8, length, page_size=64, head_dim=head_dim, drawn_lengths=True)
            for head_dim in (64, 128)
            for length, batch in SHAPES
            if batch > 1
        ),
        timer,
        dtype,
    )


def pages(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    for length, batch in SHAPES:
        for page_size in (1, 16, 64, 256):
            problem = Problem(batch, 32, 8, length, page_size=page_size)
            paged = Tensors.of(problem, dtype)
            one_piece = dataclasses.replace(
                paged, k_pages=paged.k, v_pages=paged.v, page_table=None
            )
            calls = {"paged": ours(paged), "one_piece": ours(one_piece)}
            yield compared(problem, timer, calls, by_flops=False)


def append(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    """The last key of every cache is new; rotary of all of head_dim."""
    for length, batch in ((1024, 1), (8192, 1), (1024, 16), (8192, 16), (1024, 128)):
        problem = Problem(batch, 32, 8, length)
        t = Tensors.of(problem, dtype)
        new = {n: torch.randn(batch, 1, 8, HEAD_DIM, device="cuda", dtype=dtype) for n in "kv"}
        angles = torch.rand(length, HEAD_DIM // 2, device="cuda") * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        before = t.cache_seqlens - 1
        short = dataclasses.replace(t, cache_seqlens=before)
        rotated = {"rotary_cos": cos, "rotary_sin": sin}
        calls = {
            "no_append": ours(t),
            "append": ours(short, **new),
            "append_rotary": ours(short, **new, **rotated),
            "separate": separately(t, new, before, (cos, sin)),
        }
        yield compared(problem, timer, calls, by_flops=False)


def few(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    yield from beside_cudnn(
        (
            Problem(batch, 64, 8, length, queries)
            for batch in (1, 16, 64)
            for length in (8192, 32768)
            for queries in (1, 2, 4, 8, 16)
        ),
        timer,
        dtype,
    )


def prefill(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    yield from beside_cudnn(
        (
            Problem(1, heads, heads_kv, 32768, queries, page)
            for heads, heads_kv in ((8, 1), (16, 2), (64, 8))
            for queries in (256, 512, 1024)
            for page in (None, 256)
        ),
        timer,
        dtype,
    )


def host(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    """Calls of one short sequence, so that the device is always done first."""
    t = Tensors.of(Problem(1, 8, 8, 64), dtype)
    paged = Tensors.of(Problem(1, 8, 8, 64, page_size=16), dtype)
    new = {n: torch.randn(1, 1, 8, HEAD_DIM, device="cuda", dtype=dtype) for n in "kv"}
    angles = torch.rand(64, HEAD_DIM // 2, device="cuda")
    rotated = {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    short = dataclasses.replace(t, cache_seqlens=t.cache_seqlens - 1)
    op = torch.ops.flash_attn_ext.kvcache_fwd.default
    q, k, v = (x.transpose(1, 2) for x in (t.q, t.k, t.v))
    calls = {
        "op kvcache_fwd": lambda: op(t.q, t.k, t.v, t.cache_seqlens),
        "flash_attn_with_kvcache": ours(t),
        "flash_attn_with_kvcache, pages": ours(paged),
        "flash_attn_with_kvcache, append and rotary": ours(short, **new, **rotated),
        "scaled_dot_product_attention, cuDNN": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    for name, call in calls.items():
        # The choice of the backend stands outside of what is measured: it takes 40 us itself.
        with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            us = host_us(call, torch.device("cuda"))
        print(f"{name:<50} {us:6.2f} us", flush=True)
        yield {"call": name, "us": round(us, 3)}


def sdpa_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    cache_seqlens: Tensor,
    causal: bool,
    rotary_interleaved: bool,
) -> Tensor:
    """`flash_attn_with_kvcache` as a static cache has it in PyTorch: a mask over all of it."""
    assert causal
    assert not rotary_interleaved
    q, k = (
        apply_rotary_emb(x, rotary_cos, rotary_sin, seqlen_offsets=cache_seqlens) for x in (q, k)
    )
    positions = cache_seqlens[:, None] + torch.arange(q.shape[1], device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    k_cache[rows, positions] = k
    v_cache[rows, positions] = v
    visible = torch.arange(k_cache.shape[1], device=q.device) <= positions[:, None, :, None]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k_cache, v_cache)), visible, enable_gqa=True
    )
    return out.transpose(1, 2)


def generate(timer: Timer, dtype: torch.dtype) -> Iterator[Json]:
    """The prompt is not in the time. Both attentions must write the same text, or nearly."""
    config = gpt.GPTConfig(
        num_layers=16, num_heads_q=16, num_heads_kv=4, head_dim=HEAD_DIM, max_seqlen=8192
    )
    torch.manual_seed(0)
    model = gpt.GPT(config).cuda().to(dtype)
    for block in model.blocks:  # zero at first, which no attention would matter to
        torch.nn.init.normal_(block.attention.proj.weight, std=0.02)
    attention = {"ours": gpt.flash_attn_with_kvcache, "sdpa": sdpa_with_kvcache}
    new_tokens = 64
    for batch_size, graph in itertools.product((1, 16), (True, False)):
        prompt = torch.randint(gpt.VOCAB_SIZE, (batch_size, 8000), device="cuda")
        rates, texts = {}, {}
        for name, function in attention.items():
            gpt.flash_attn_with_kvcache = function
            steps = model.generate(prompt, new_tokens + 2, temperature=0, cuda_graph=graph)
            text = [next(steps), next(steps)]  # the prompt; the capture
            torch.cuda.synchronize()
            begin = time.perf_counter()
            text += steps
            torch.cuda.synchronize()
            rates[name] = round(batch_size * new_tokens / (time.perf_counter() - begin), 1)
            texts[name] = torch.cat(text, 1)
        gpt.flash_attn_with_kvcache = attention["ours"]
        same = (texts["ours"] == texts["sdpa"]).float().mean().item()
        row = {
            "batch_size": batch_size,
            "prompt": prompt.shape[1],
            "new_tokens": new_tokens,
            "cuda_graph": graph,
            "tokens_per_second": rates,
            "same_tokens": round(same, 4),
        }
        speeds = "  ".join(f"{name} {rate:8.0f}" for name, rate in rates.items())
        with_graph = "with graph" if graph else "without"
        print(f"batch {batch_size:>3}, {with_graph:<12} {speeds} tokens/s, {same:.0%} the same")
        yield row


SECTIONS: dict[str, Callable[[Timer, torch.dtype], Iterator[Json]]] = {
    section.__name__: section
    for section in (
        decode,
        dims,
        lengths,
        pages,
        append,
        few,
        prefill,
        host,
        generate,
    )
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=common.MIN_REPETITIONS)
    parser.add_argument("--out", type=Path, help="folder of the result files")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_decode: no CUDA device, nothing to measure")
        return 0
    device = torch.device("cuda")
    timer = Timer(options.repetitions)
    for section in options.sections.split(","):
        print(f"\n== {section}")
        rows = list(SECTIONS[section](timer, getattr(torch, options.dtype)))
        env = {
            **common.environment(device),
            "flash_attn_ext": flash_attn_ext.__version__,
            "switches": switches(),
            "dtype": options.dtype,
        }
        folder = options.out or common.RESULTS / common.device_slug(env["device"])
        path = folder / f"decode_{section}{suffix()}.json"
        common.write_results(path, env, rows)
        print(f"{len(rows)} rows, written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
