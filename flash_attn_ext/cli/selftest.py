"""Compare every backend that is present with attention in fp64.

Forward, backward, packed sequences, KV cache (append, pages, rotary), merge of partial results and
rotary embedding. An error may be at most twice the error of plain PyTorch operations in the same
type, plus 1e-5. Exit code 1 if one is larger.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_attn_ext import _load, reference
from flash_attn_ext.cli import _output
from flash_attn_ext.errors import FallbackWarning

SLACK = 1e-5  # for results where the plain computation happens to be exact
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: for people.
        device: where the tensors are.
        overload: of every op, see `_schema`.
    """

    name: str
    device: str
    overload: str

    def op(self, name: str) -> Callable[..., Any]:
        """The op of this name in this backend."""
        function: Callable[..., Any] = getattr(
            getattr(torch.ops.flash_attn_ext, name), self.overload
        )
        return function


def present_backends() -> list[Backend]:
    """What can run on this machine."""
    backends = [Backend("tiled on cpu", "cpu", "tiled")]
    if torch.cuda.is_available():
        backends.append(Backend("tiled on cuda", "cuda", "tiled"))
        if _load.status().binder_loaded:
            backends.append(Backend("kernels on cuda", "cuda", "default"))
    return backends


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: for people.
        inputs: draws the inputs in fp64 on the CPU, given a generator and a length.
        compute: runs the ops of a backend; returns the results by name.
        meaning: the same by reference.py; True: in fp64, False: every step in the inputs' type.
    """

    name: str
    inputs: Callable[[torch.Generator, int], Tensors]
    compute: Callable[[Backend, Tensors], Tensors]
    meaning: Callable[[Tensors, bool], Tensors]


@dataclass(frozen=True)
class Result:
    """Largest absolute errors of one tensor of one case, against fp64.

    Attributes:
        backend: name of the backend.
        case: name of the case.
        dtype: of the inputs.
        tensor: which result.
        error: of the backend; infinite if there is a NaN or a wrong infinity.
        plain_error: of plain PyTorch in the same type.
        passed: whether error <= 2 * plain_error + `SLACK`.
    """

    backend: str
    case: str
    dtype: str
    tensor: str
    error: float
    plain_error: float
    passed: bool


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _int32(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


# Attention of sequences of one length: causal, more keys than queries, grouped heads.

_HEAD_DIM = 64
_SCALE = _HEAD_DIM**-0.5
_CAUSAL = (-1, 0)  # window_left, window_right
_NO_SCORE_CHANGE = (None, None, _SCALE, *_CAUSAL, 0.0, 0.0)  # alibi_slopes ... dropout_p


def _attention_inputs(generator: torch.Generator, seqlen: int) -> Tensors:
    return {
        "q": _randn(generator, 2, seqlen, 4, _HEAD_DIM),
        "k": _randn(generator, 2, seqlen + 17, 2, _HEAD_DIM),
        "v": _randn(generator, 2, seqlen + 17, 2, _HEAD_DIM),
        "dout": _randn(generator, 2, seqlen, 4, _HEAD_DIM),
    }


def _compute_attention(backend: Backend, x: Tensors) -> Tensors:
    q, k, v = x["q"], x["k"], x["v"]
    out, lse, _ = backend.op("fwd")(q, k, v, *_NO_SCORE_CHANGE, False, 0, 0)
    dq, dk, dv = backend.op("bwd")(x["dout"], q, k, v, out, lse, None, *_NO_SCORE_CHANGE, False, 0)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _mean_attention(x: Tensors, upcast: bool) -> Tensors:
    leaves = [x[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out, lse, _ = reference.attention_reference(*leaves, causal=True, upcast=upcast)
    gradients = torch.autograd.grad(out, leaves, x["dout"].to(out.dtype))
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


# Packed sequences, one of them empty.


def _offsets(seqlen: int) -> tuple[list[int], list[int]]:
    """cu_seqlens of q and of k."""
    return [0, 5, 5, 5 + seqlen], [0, 9, 9, 9 + seqlen]


def _packed_inputs(generator: torch.Generator, seqlen: int) -> Tensors:
    cu_seqlens_q, cu_seqlens_k = _offsets(seqlen)
    return {
        "q": _randn(generator, cu_seqlens_q[-1], 4, _HEAD_DIM),
        "k": _randn(generator, cu_seqlens_k[-1], 2, _HEAD_DIM),
        "v": _randn(generator, cu_seqlens_k[-1], 2, _HEAD_DIM),
        "dout": _randn(generator, cu_seqlens_q[-1], 4, _HEAD_DIM),
    }


def _compute_packed(backend: Backend, x: Tensors) -> Tensors:
    q, k, v = x["q"], x["k"], x["v"]
    seqlen = len(q) - 5
    cu_seqlens = [_int32(offsets, q) for offsets in _offsets(seqlen)]
    lengths = (max(seqlen, 5), max(seqlen, 9))
    out, lse, _ = backend.op("varlen_fwd")(
        q, k, v, *cu_seqlens, None, None, None, *lengths, *_NO_SCORE_CHANGE, False, 0, 0
    )
    dq, dk, dv = backend.op("varlen_bwd")(
        *(x["dout"], q, k, v, out, lse, None, *cu_seqlens, None, None),
        *(*lengths, *_NO_SCORE_CHANGE, False, 0),
    )
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _mean_packed(x: Tensors, upcast: bool) -> Tensors:
    leaves = [x[name].detach().requires_grad_() for name in ("q", "k", "v")]
    q, k, v = leaves
    cu_seqlens_q, cu_seqlens_k = _offsets(len(q) - 5)
    out, lse = reference.varlen_attention_reference(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True, upcast=upcast
    )
    gradients = torch.autograd.grad(out, leaves, x["dout"].to(out.dtype))
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


# Cache: append two keys, rotate, attend.

_PAGE_SIZE = 16
_NUM_NEW = 2


def _lengths_before(seqlen: int) -> list[int]:
    return [3, seqlen - _NUM_NEW - 1]


def _cache_inputs(generator: torch.Generator, seqlen: int) -> Tensors:
    angle = torch.outer(torch.arange(seqlen, dtype=torch.float64), 2.0 ** -torch.arange(16))
    new = (2, _NUM_NEW, 2, _HEAD_DIM)
    return {
        "q": _randn(generator, 2, _NUM_NEW, 4, _HEAD_DIM),
        "k": _randn(generator, *new),
        "v": _randn(generator, *new),
        "k_cache": _randn(generator, 2, seqlen, 2, _HEAD_DIM),
        "v_cache": _randn(generator, 2, seqlen, 2, _HEAD_DIM),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }


def _compute_cache(backend: Backend, x: Tensors, page_table: Tensor | None = None) -> Tensors:
    k_cache, v_cache = x["k_cache"].clone(), x["v_cache"].clone()
    seqlen = len(x["cos"])
    out, lse = backend.op("kvcache_append_fwd")(
        *(x["q"], k_cache, v_cache, x["k"], x["v"], _int32(_lengths_before(seqlen), k_cache)),
        *(x["cos"], x["sin"], False, page_table, _SCALE, *_CAUSAL),
    )
    return {"out": out, "lse": lse, "k_cache": k_cache, "v_cache": v_cache}


def _mean_cache(x: Tensors, upcast: bool, page_table: Tensor | None = None) -> Tensors:
    found = reference.kvcache_attention_reference(
        *(x[name] for name in ("q", "k_cache", "v_cache", "k", "v")),
        cache_seqlens=_lengths_before(len(x["cos"])),
        page_table=page_table,
        rotary_cos=x["cos"],
        rotary_sin=x["sin"],
        rotary_interleaved=False,
        causal=True,
        upcast=upcast,
    )
    return found._asdict()


def _paged_inputs(generator: torch.Generator, seqlen: int) -> Tensors:
    """The cache of `_cache_inputs` in pages, in no order."""
    x = _cache_inputs(generator, seqlen // _PAGE_SIZE * _PAGE_SIZE)
    for name in ("k_cache", "v_cache"):
        x[name] = x[name].reshape(-1, _PAGE_SIZE, *x[name].shape[2:])
    return x


def _page_table(x: Tensors) -> Tensor:
    num_pages = len(x["k_cache"])
    pages = [(7 * page + 3) % num_pages for page in range(num_pages)]
    return _int32(pages, x["k_cache"]).reshape(2, -1)


# Rotary embedding, interleaved, of a part of each head.


def _rotary_inputs(generator: torch.Generator, seqlen: int) -> Tensors:
    x = _cache_inputs(generator, seqlen)
    return {"x": _randn(generator, 2, seqlen, 4, _HEAD_DIM), "cos": x["cos"], "sin": x["sin"]}


def _compute_rotary(backend: Backend, x: Tensors) -> Tensors:
    return {
        "x": backend.op("rotary")(
            x["x"], x["cos"], x["sin"], None, None, x["x"].size(1), True, False, False
        )
    }


def _mean_rotary(x: Tensors, upcast: bool) -> Tensors:
    if upcast:
        positions = torch.arange(x["x"].size(1), device=x["x"].device).expand(2, -1)
        return {
            "x": reference.rotary_reference(x["x"], x["cos"], x["sin"], positions, interleaved=True)
        }
    cos, sin = x["cos"][:, None], x["sin"][:, None]
    rotary_dim = 2 * cos.size(-1)
    a, b = x["x"][..., 0:rotary_dim:2], x["x"][..., 1:rotary_dim:2]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return {"x": torch.cat([turned, x["x"][..., rotary_dim:]], dim=-1)}


# Merge of three partial results, one of which saw no key in its first rows. Always in fp32.


def _combine_inputs(generator: torch.Generator, seqlen: int) -> Tensors:
    lse_partial = _randn(generator, 3, 2, seqlen, 4)
    lse_partial[1, :, :5] = -math.inf
    return {
        "out_partial": _randn(generator, 3, 2, seqlen, 4, _HEAD_DIM),
        "lse_partial": lse_partial,
    }


def _compute_combine(backend: Backend, x: Tensors) -> Tensors:
    dtype = x["out_partial"].dtype
    out, lse = backend.op("combine")(x["out_partial"].float(), x["lse_partial"].float(), dtype)
    return {"out": out, "lse": lse}


def _mean_combine(x: Tensors, upcast: bool) -> Tensors:
    out_partial, lse_partial = x["out_partial"], x["lse_partial"]
    if upcast:
        out, lse = reference.combine_reference(out_partial, lse_partial)
    else:
        lse = lse_partial.logsumexp(0)
        out = ((lse_partial - lse).exp()[..., None] * out_partial).sum(0)
    return {"out": out, "lse": lse}


CASES = (
    Case("attention", _attention_inputs, _compute_attention, _mean_attention),
    Case("packed sequences", _packed_inputs, _compute_packed, _mean_packed),
    Case("KV cache", _cache_inputs, _compute_cache, _mean_cache),
    Case(
        "KV cache in pages",
        _paged_inputs,
        lambda backend, x: _compute_cache(backend, x, _page_table(x)),
        lambda x, upcast: _mean_cache(x, upcast, _page_table(x)),
    ),
    Case("rotary", _rotary_inputs, _compute_rotary, _mean_rotary),
    Case("combine", _combine_inputs, _compute_combine, _mean_combine),
)


def _max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; equal infinities differ by 0, NaN by infinity."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return difference.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def run_case(backend: Backend, case: Case, dtype: torch.dtype, seqlen: int) -> list[Result]:
    """Compares every result of one case."""
    generator = torch.Generator().manual_seed(seqlen)
    x = {
        name: value.to(device=backend.device, dtype=dtype)
        for name, value in case.inputs(generator, seqlen).items()
    }
    actual = case.compute(backend, x)
    expected = case.meaning({name: value.double() for name, value in x.items()}, True)
    plain = case.meaning(x, False)
    results = []
    for name in actual:
        error = _max_error(actual[name], expected[name])
        plain_error = _max_error(plain[name], expected[name])
        results.append(
            Result(
                backend=backend.name,
                case=case.name,
                dtype=str(dtype).removeprefix("torch."),
                tensor=name,
                error=error,
                plain_error=plain_error,
                passed=error <= 2 * plain_error + SLACK,
            )
        )
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--quick", action="store_true", help="one short length")
    _output.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the errors; 1 if one is too large."""
    begin = time.perf_counter()
    seqlens = (33,) if args.quick else (33, 300)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    with warnings.catch_warnings():
        # That an op has no kernel yet is no failure here; `explain` tells where kernels are.
        warnings.simplefilter("ignore", FallbackWarning)
        results = [
            result
            for backend in present_backends()
            for case in CASES
            for dtype in dtypes
            for seqlen in seqlens
            for result in run_case(backend, case, dtype, seqlen)
        ]
    failed = [result for result in results if not result.passed]
    if args.json:
        _output.print_json({"passed": not failed, "results": results})
        return int(bool(failed))
    rows = [
        [
            result.backend,
            result.case,
            result.dtype,
            result.tensor,
            f"{result.error:.1e}",
            f"{result.plain_error:.1e}",
            _output.mark("ok" if result.passed else "error"),
        ]
        for result in _worst(results)
    ]
    header = ["backend", "case", "dtype", "result", "max error", "plain PyTorch", ""]
    print(_output.table(header, rows))
    print(
        f"\n{len(results)} comparisons with fp64 in {time.perf_counter() - begin:.1f} s, "
        f"{len(failed)} failed (allowed: twice the error of plain PyTorch + {SLACK:.0e})"
    )
    return int(bool(failed))


def _worst(results: Sequence[Result]) -> list[Result]:
    """For every backend, case and dtype: a failure if there is one, else the largest error."""
    worst: dict[tuple[str, str, str], Result] = {}
    for result in results:
        key = (result.backend, result.case, result.dtype)
        known = worst.setdefault(key, result)
        if (not result.passed, result.error) > (not known.passed, known.error):
            worst[key] = result
    return list(worst.values())
