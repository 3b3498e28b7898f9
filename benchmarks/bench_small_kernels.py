"""Bandwidth of the kernels that only move data, against a plain copy in the same run.

    python benchmarks/bench_small_kernels.py [--assert 0.85] [--megabytes 600] [--out FILE]

Measures combine, bwd_preprocess, rotary, append_kv, the norms and cross-entropy through torch.ops,
alternating with `Tensor.copy_` of as many bytes. Bytes are those that must move: every input read
once, every output written once. On CUDA the tiled backend is refused, so that a row is always a
kernel's. Results go to benchmarks/results/<device>/small_kernels.json; --assert exits with 1 if a
row is below that fraction of the copy. Rotary in place with rotary_dim < head_dim touches a part of
every row in memory, where no copy of whole rows gets: beside it runs an in-place negation of the
same bytes too, and that is what --assert compares it with. Beside norms and cross-entropy run
torch's own functions, where they compute the same.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from torch import Tensor

os.environ.setdefault("FLASH_ATTN_EXT_FALLBACK", "error")

import flash_attn_ext

NUM_HEADS, NUM_HEADS_KV = 16, 8
SEQLEN = 4096
MAX_POSITION = 2 * SEQLEN


@dataclass(frozen=True)
class Case:
    """One row: a call, and the bytes it has to move."""

    op: str
    case: str
    num_bytes: int
    run: Callable[[], object]
    same_access: Callable[[], object] | None = None  # if a copy does not touch memory like `run`
    by_torch: Callable[[], object] | None = None  # torch's own function of the same


@dataclass(frozen=True)
class Setup:
    """What all cases share."""

    device: torch.device
    input_bytes: int  # at least this much is read by every case

    def batch_size(self, bytes_per_sequence: int) -> int:
        """The smallest batch whose inputs have input_bytes."""
        return -(-self.input_bytes // bytes_per_sequence)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)

    def angles(self, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [MAX_POSITION, rotary_dim / 2] each."""
        angle = torch.rand(MAX_POSITION, rotary_dim // 2, device=self.device) * 6.28
        return angle.cos().to(dtype), angle.sin().to(dtype)


def size(*tensors: Tensor) -> int:
    """Bytes of the elements of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def combine_case(s: Setup, num_splits: int, head_dim: int, out_dtype: torch.dtype) -> Case:
    rows = NUM_HEADS * SEQLEN // num_splits
    batch_size = s.batch_size(num_splits * rows * head_dim * 4)
    shape = (num_splits, batch_size, SEQLEN // num_splits, NUM_HEADS)
    out_partial = s.randn(*shape, head_dim, dtype=torch.float32)
    lse_partial = s.randn(*shape, dtype=torch.float32)
    num_rows = lse_partial[0].numel()
    written = num_rows * (head_dim * out_dtype.itemsize + 4)
    op = torch.ops.flash_attn_ext.combine.default
    return Case(
        "combine",
        f"{num_splits} splits, head_dim {head_dim}, to {short(out_dtype)}",
        size(out_partial, lse_partial) + written,
        lambda: op(out_partial, lse_partial, out_dtype),
    )


def bwd_preprocess_case(s: Setup, head_dim: int, dtype: torch.dtype, with_dlse: bool) -> Case:
    batch_size = s.batch_size(2 * SEQLEN * NUM_HEADS * head_dim * dtype.itemsize)
    out, dout = (s.randn(batch_size, SEQLEN, NUM_HEADS, head_dim, dtype=dtype) for _ in range(2))
    delta = torch.empty(batch_size, NUM_HEADS, SEQLEN, dtype=torch.float32, device=s.device)
    dlse = torch.randn_like(delta) if with_dlse else None
    op = torch.ops.flash_attn_ext.bwd_preprocess.default
    return Case(
        "bwd_preprocess",
        f"head_dim {head_dim}, {short(dtype)}{', dlse' if with_dlse else ''}",
        size(out, dout, delta) + (size(delta) if with_dlse else 0),
        lambda: op(out, dout, dlse),
    )


def negate_part_of_rows(x: Tensor, columns: int) -> Callable[[], object]:
    """An in-place op that reads and writes the first ``columns`` of every row of ``x``.

    In elements of 16 bytes, as the kernels: of torch's in-place ops the fastest on such rows.
    """
    part = x.view(torch.complex128)[..., : columns * x.element_size() // 16]
    return part.neg_


def rotary_case(
    s: Setup, head_dim: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool, inplace: bool
) -> Case:
    touched = rotary_dim if inplace else head_dim
    batch_size = s.batch_size(SEQLEN * NUM_HEADS * touched * dtype.itemsize)
    x = s.randn(batch_size, SEQLEN, NUM_HEADS, head_dim, dtype=dtype)
    cos, sin = s.angles(rotary_dim, dtype)
    ops = torch.ops.flash_attn_ext
    op = ops.rotary_.default if inplace else ops.rotary.default
    return Case(
        "rotary_" if inplace else "rotary",
        f"head_dim {head_dim}, rotary_dim {rotary_dim}, {short(dtype)}"
        f"{', interleaved' if interleaved else ''}",
        2 * size(x) * touched // head_dim,
        lambda: op(x, cos, sin, None, None, SEQLEN, interleaved, False, False),
        same_access=negate_part_of_rows(x, touched) if touched < head_dim else None,
    )


def rotary_varlen_case(s: Setup, head_dim: int, dtype: torch.dtype) -> Case:
    """Sequences of random lengths up to SEQLEN, each at its own position."""
    batch_size = 2 * s.batch_size(SEQLEN * NUM_HEADS * head_dim * dtype.itemsize)
    lengths = torch.randint(1, SEQLEN + 1, (batch_size,), device=s.device)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    offsets = torch.randint(0, SEQLEN, (batch_size,), dtype=torch.int32, device=s.device)
    x = s.randn(int(lengths.sum()), NUM_HEADS, head_dim, dtype=dtype)
    cos, sin = s.angles(head_dim, dtype)
    op = torch.ops.flash_attn_ext.rotary.default
    return Case(
        "rotary",
        f"head_dim {head_dim}, rotary_dim {head_dim}, {short(dtype)}, varlen",
        2 * size(x),
        lambda: op(x, cos, sin, offsets, cu_seqlens, SEQLEN, False, False, False),
    )


def append_kv_case(
    s: Setup, num_heads_kv: int, head_dim: int, page_size: int, rotary_dim: int
) -> Case:
    """Appends SEQLEN tokens behind as many, bf16; page_size 0: contiguous."""
    seqlen_cache = 2 * SEQLEN
    batch_size = s.batch_size(2 * SEQLEN * num_heads_kv * head_dim * 2)
    k, v = (s.randn(batch_size, SEQLEN, num_heads_kv, head_dim) for _ in range(2))
    page_table = None
    cache_shape = (batch_size, seqlen_cache, num_heads_kv, head_dim)
    if page_size:
        pages = seqlen_cache // page_size
        ids = torch.randperm(batch_size * pages, device=s.device)
        page_table = ids.to(torch.int32).view(batch_size, pages)
        cache_shape = (batch_size * pages, page_size, num_heads_kv, head_dim)
    k_cache, v_cache = (s.randn(*cache_shape) for _ in range(2))
    cos, sin = s.angles(rotary_dim, k.dtype) if rotary_dim else (None, None)
    seqlens = torch.full((batch_size,), SEQLEN, dtype=torch.int32, device=s.device)
    op = torch.ops.flash_attn_ext.append_kv.default
    return Case(
        "append_kv",
        f"{num_heads_kv} heads, head_dim {head_dim}, bf16, "
        f"{f'pages of {page_size}' if page_size else 'contiguous'}"
        f"{f', rotary_dim {rotary_dim}' if rotary_dim else ''}",
        2 * size(k, v),
        lambda: op(k_cache, v_cache, k, v, seqlens, None, page_table, None, cos, sin, None, True),
    )


def norm_case(
    s: Setup,
    hidden_size: int,
    dtype: torch.dtype,
    sum_dtype: torch.dtype | None,
    is_rms: bool,
    backward: bool,
    dropout_p: float = 0.0,
) -> Case:
    """LayerNorm (with bias) or RMSNorm; with sum_dtype after adding a residual of that type.

    The sum is stored then, and the backward has its gradient.
    """
    rows = s.batch_size(hidden_size * dtype.itemsize)
    x = s.randn(rows, hidden_size, dtype=dtype)
    residual = None if sum_dtype is None else s.randn(rows, hidden_size, dtype=sum_dtype)
    weight, bias = (s.randn(hidden_size, dtype=dtype) for _ in range(2))
    used_bias = None if is_rms else bias
    ops = torch.ops.flash_attn_ext
    rng_state = torch.tensor([1, 2], device=s.device) if dropout_p else None
    tail = (1e-5, dropout_p, is_rms, 0.0, residual is not None, False)

    def forward() -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = ops.norm_fwd.default(
            x, residual, weight, used_bias, None, rng_state, *tail
        )
        return results

    _, total, mean, rstd = forward()
    size_of_x, size_of_sum = size(x), 0 if residual is None else size(residual)
    name = (
        f"{'RMSNorm' if is_rms else 'LayerNorm'} {hidden_size}, {short(dtype)}"
        f"{'' if sum_dtype is None else f', residual {short(sum_dtype)}'}"
        f"{', dropout' if dropout_p else ''}"
    )
    functional = torch.nn.functional
    if not backward:
        by_torch = None
        if residual is None and is_rms:
            by_torch = lambda: functional.rms_norm(x, (hidden_size,), weight, 1e-5)  # noqa: E731
        elif residual is None:
            by_torch = lambda: functional.layer_norm(x, (hidden_size,), weight, bias)  # noqa: E731
        return Case("norm_fwd", name, 2 * (size_of_x + size_of_sum), forward, by_torch=by_torch)
    dout, dsum = torch.randn_like(x), None if residual is None else torch.randn_like(residual)
    summed = x if residual is None else total
    separate = residual is not None and (sum_dtype != dtype or dropout_p > 0)
    by_torch = None
    if residual is None and not is_rms and s.device.type == "cuda":
        shape, statistics = [hidden_size], (mean[:, None], rstd[:, None])
        by_torch = lambda: torch.ops.aten.native_layer_norm_backward(  # noqa: E731
            dout, x, shape, *statistics, weight, bias, [True, True, True]
        )
    return Case(
        "norm_bwd",
        name,
        # dout and dx; what was normalised; its gradient; the residual's if it has another type.
        2 * size_of_x + size(summed) + size_of_sum * (1 + separate),
        lambda: ops.norm_bwd.default(
            dout,
            summed,
            dsum,
            weight,
            None,
            rng_state,
            mean,
            rstd,
            dropout_p,
            is_rms,
            0.0,
            not is_rms,
            separate,
        ),
        by_torch=by_torch,
    )


def cross_entropy_case(
    s: Setup, vocabulary: int, dtype: torch.dtype, smoothing: float, backward: bool
) -> Case:
    """With z-loss, and label smoothing unless 0; the gradient goes into a new tensor."""
    rows = s.batch_size(vocabulary * dtype.itemsize)
    logits = s.randn(rows, vocabulary, dtype=dtype)
    labels = torch.randint(0, vocabulary, (rows,), device=s.device)
    dloss = torch.rand(rows, device=s.device)
    tail = (smoothing, 1.0, 1e-4, -100)
    ops = torch.ops.flash_attn_ext
    lse = ops.cross_entropy_fwd.default(logits, labels, None, *tail)[2]
    name = f"vocabulary {vocabulary}, {short(dtype)}{', smoothing' if smoothing else ''}"
    if backward:
        return Case(
            "cross_entropy_bwd",
            name,
            2 * size(logits),
            lambda: ops.cross_entropy_bwd.default(dloss, logits, labels, lse, *tail),
        )
    return Case(
        "cross_entropy_fwd",
        name,
        size(logits),
        lambda: ops.cross_entropy_fwd.default(logits, labels, None, *tail),
        by_torch=lambda: torch.nn.functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=smoothing
        ),
    )


FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CASES: list[tuple[Callable[..., Case], tuple[object, ...]]] = [
    (combine_case, (2, 128, BF16)),
    (combine_case, (8, 64, BF16)),
    (combine_case, (8, 128, BF16)),
    (combine_case, (32, 128, FP16)),
    (combine_case, (8, 256, FP32)),
    *(
        (bwd_preprocess_case, (head_dim, BF16, False))
        for head_dim in (64, 80, 96, 128, 160, 192, 256)
    ),
    (bwd_preprocess_case, (96, FP16, True)),
    (bwd_preprocess_case, (128, BF16, True)),
    (bwd_preprocess_case, (128, FP16, False)),
    (bwd_preprocess_case, (128, FP32, False)),
    *(
        (rotary_case, (*shape, interleaved, inplace))
        for shape in (
            (64, 64, BF16),
            (96, 96, BF16),
            (128, 128, BF16),
            (128, 64, FP16),
            (128, 128, FP32),
        )
        for interleaved, inplace in itertools.product((False, True), repeat=2)
    ),
    (rotary_varlen_case, (128, BF16)),
    *(
        (append_kv_case, (NUM_HEADS_KV, head_dim, page_size, rotary_dim))
        for head_dim in (64, 128)
        for page_size, rotary_dim in itertools.product((0, 16, 256), (0, head_dim))
    ),
    *((append_kv_case, (num_heads_kv, 128, 16, 128)) for num_heads_kv in (1, 2)),
    *(
        (norm_case, (*shape, is_rms, backward))
        for shape in (
            (768, FP32, None),
            (1024, BF16, BF16),
            (4096, BF16, None),
            (4096, BF16, BF16),
            (4096, BF16, FP32),
            (4096, FP16, None),
            (5120, BF16, BF16),
            (8192, BF16, BF16),
            (16_384, BF16, BF16),
        )
        for is_rms, backward in itertools.product((True, False), (False, True))
    ),
    *((norm_case, (4096, BF16, BF16, is_rms, True, 0.1)) for is_rms in (True, False)),
    *((norm_case, (4096, BF16, BF16, is_rms, False, 0.1)) for is_rms in (True, False)),
    *(
        (cross_entropy_case, (*shape, backward))
        for shape in (
            (32_000, BF16, 0.0),
            (32_000, BF16, 0.1),
            (50_257, BF16, 0.0),
            (128_256, BF16, 0.0),
            (128_256, FP32, 0.0),
        )
        for backward in (False, True)
    ),
]
"""One row each: the function that builds it and its arguments."""


def measure(case: Case, device: torch.device, repetitions: int) -> common.Json:
    """One row of the result file."""
    functions = [case.run, common.copy_of(case.num_bytes, device)]
    functions += [f for f in (case.same_access, case.by_torch) if f is not None]
    ms, copy_ms, *others = common.median_ms(functions, device, repetitions=repetitions)
    same_ms = others[0] if case.same_access is not None else None
    torch_ms = others[-1] if case.by_torch is not None else None
    return {
        "op": case.op,
        "case": case.case,
        "num_bytes": case.num_bytes,
        "ms": round(ms, 5),
        "gb_per_s": round(case.num_bytes / ms / 1e6, 1),
        "copy_gb_per_s": round(case.num_bytes / copy_ms / 1e6, 1),
        "fraction_of_copy": round(copy_ms / ms, 4),
        "fraction_of_same_access": None if same_ms is None else round(same_ms / ms, 4),
        "speedup_over_torch": None if torch_ms is None else round(torch_ms / ms, 3),
        "repetitions": repetitions,
    }


def compared(row: common.Json) -> float:
    """The fraction that --assert looks at."""
    same_access = row["fraction_of_same_access"]
    fraction: float = row["fraction_of_copy"] if same_access is None else same_access
    return fraction


def main(argv: list[str]) -> int:
    """Measures every case, prints the rows, writes the file; 1 if --assert is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--assert", dest="least", type=float, default=0.0, metavar="FRACTION")
    parser.add_argument("--megabytes", type=int, default=600, help="least bytes read by a case")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument(
        "--device", type=torch.device, default=None, help="default: cuda if present"
    )
    parser.add_argument("--only", default="", help="measure only the ops whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="result file, or its folder")
    options = parser.parse_args(argv)

    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    setup = Setup(device, options.megabytes * 1_000_000)
    rows = []
    for build, arguments in CASES:
        if options.only not in build.__name__:
            continue
        row = measure(build(setup, *arguments), device, options.repetitions)
        rows.append(row)
        same_access, speedup = row["fraction_of_same_access"], row["speedup_over_torch"]
        print(
            f"{row['op']:<15} {row['case']:<52} {row['num_bytes'] / 1e6:>7.0f} MB "
            f"{row['gb_per_s']:>7.0f} GB/s  copy {row['copy_gb_per_s']:>7.0f} GB/s "
            f"{row['fraction_of_copy']:>7.1%}"
            f"{'' if same_access is None else f', {same_access:.1%} of the same bytes negated'}"
            f"{'' if speedup is None else f', {speedup:.2f} x torch'}",
            flush=True,
        )

    env = common.environment(device)
    env["flash_attn_ext"] = flash_attn_ext.__version__
    path = options.out or common.RESULTS / common.device_slug(env["device"])
    if path.suffix != ".json":
        path /= "small_kernels.json"
    common.write_results(path, env, rows)
    short_rows = [row for row in rows if compared(row) < options.least]
    for row in short_rows:
        print(f"below {options.least:.0%}: {row['op']}, {row['case']}")
    print(f"{len(rows)} rows, {len(short_rows)} too slow, written to {path}")
    return int(bool(short_rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
