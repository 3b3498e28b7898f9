"""A call of a public function as the problems that make_plan knows (csrc/plan/problem.h)."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from .attention import flash_attn_func, flash_attn_varlen_func
from .kvcache import flash_attn_with_kvcache

Problem = dict[str, Any]
"""Fields of the C++ struct of this name; missing ones keep their defaults."""

_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fixed": flash_attn_func,
    "varlen": flash_attn_varlen_func,
    "kvcache": flash_attn_with_kvcache,
}
_CACHE_OPTIONS = {
    "k_cache",
    "v_cache",
    "rotary_cos",
    "rotary_sin",
    "cache_seqlens",
    "cache_batch_idx",
    "cache_leftpad",
    "cu_seqlens_k_new",
    "rotary_seqlens",
}
_FLAGS = ("varlen", "softcap", "alibi", "dropout", "dmask", "deterministic")


def bind(
    form: str | None, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """Form, function and all arguments by name, defaults included.

    Raises:
        TypeError: an argument that the function does not have.
        ValueError: unknown form.
    """
    form = _form(args, options) if form is None else form
    if form not in _FUNCTIONS:
        raise ValueError(_checks.message("form", repr(form), f"one of {', '.join(_FUNCTIONS)}"))
    function = _FUNCTIONS[form]
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    return form, function, bound.arguments


def dtype_name(q: Any, default: torch.dtype) -> str:
    """Name of q's dtype in plans; of `default` if q is a shape.

    Raises:
        ValueError: a dtype that nothing computes.
    """
    dtype = q.dtype if isinstance(q, Tensor) else default
    if dtype not in _DTYPES:
        expected = ", ".join(str(known) for known in _DTYPES)
        raise ValueError(_checks.message("q", dtype, f"one of {expected}"))
    return _DTYPES[dtype]


def _shape(name: str, x: Any) -> tuple[int, ...]:
    if isinstance(x, Tensor):
        return tuple(x.shape)
    if isinstance(x, Sequence) and all(isinstance(size, int) for size in x):
        return tuple(x)
    raise TypeError(_checks.message(name, type(x).__name__, "a tensor or its shape"))


def _ranked_shape(name: str, x: Any, dimensions: str) -> tuple[int, ...]:
    shape = _shape(name, x)
    if len(shape) != dimensions.count(",") + 1:
        raise ValueError(_checks.message(name, list(shape), dimensions))
    return shape


def _alignment(tensors: Iterable[Any]) -> int:
    """Largest power of two up to 16 that divides the address of every row of every tensor."""
    alignment = 16
    for x in tensors:
        if not isinstance(x, Tensor):
            continue
        offsets = [int(stride) * x.element_size() for stride in x.stride()[:-1]]
        offsets.append(x.data_ptr() if x.is_cuda else int(x.storage_offset()) * x.element_size())
        while any(offset % alignment for offset in offsets):
            alignment //= 2
    return alignment


def _is_broadcast(tensors: Iterable[Any]) -> bool:
    """Whether entries of a dimension of a tensor are the same memory."""
    return any(
        size > 1 and stride == 0
        for x in tensors
        if isinstance(x, Tensor)
        for size, stride in zip(x.shape, x.stride(), strict=True)
    )


def _form(args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Which of the three functions takes these arguments."""
    if _CACHE_OPTIONS & options.keys():
        return "kvcache"
    fourth = args[3] if len(args) > 3 else None
    if "cu_seqlens_q" in options or isinstance(fourth, (Tensor, list, tuple)):
        return "varlen"
    return "fixed"


def _longest(cu_seqlens: Any, max_seqlen: Any, total: int) -> int:
    """The maximum length: as given, else from values that are on the host, else the total."""
    if max_seqlen is not None:
        return int(max_seqlen)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu":
        return total
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    return max((end - begin for begin, end in itertools.pairwise(values)), default=0)


def _query_sizes(q: Any, call: dict[str, Any]) -> dict[str, Any]:
    cu_seqlens = call.get("cu_seqlens_q")
    if cu_seqlens is None:
        batch_size, seqlen_q, num_heads_q, head_dim = _ranked_shape("q", q, _checks.Q_FIXED)
        total = 0
        varlen = call.get("seqused_k") is not None
    else:
        total, num_heads_q, head_dim = _ranked_shape("q", q, _checks.Q_VARLEN)
        batch_size = len(cu_seqlens) - 1
        seqlen_q = _longest(cu_seqlens, call.get("max_seqlen_q"), total)
        varlen = True
    return {
        "batch_size": batch_size,
        "seqlen_q": seqlen_q,
        "total_q": total,
        "num_heads_q": num_heads_q,
        "head_dim": head_dim,
        "varlen": varlen,
    }


def _key_sizes(form: str, k: Any, v: Any, call: dict[str, Any]) -> dict[str, Any]:
    page_table = call.get("page_table")
    page_table = call.get("block_table") if page_table is None else page_table
    page_size = total = 0
    if page_table is not None:
        _, page_size, num_heads_kv, _ = _ranked_shape("k", k, _checks.K_PAGED)
        seqlen_k = call.get("max_seqlen_k") or page_size * _shape("page_table", page_table)[-1]
    elif form == "varlen":
        total, num_heads_kv, _ = _ranked_shape("k", k, _checks.K_VARLEN)
        cu_seqlens_k = call["cu_seqlens_k"]
        cu_seqlens = call["cu_seqlens_q"] if cu_seqlens_k is None else cu_seqlens_k
        seqlen_k = _longest(cu_seqlens, call.get("max_seqlen_k"), total)
    else:
        _, seqlen_k, num_heads_kv, _ = _ranked_shape("k", k, _checks.K_FIXED)
    return {
        "seqlen_k": int(seqlen_k),
        "total_k": total,
        "num_heads_kv": num_heads_kv,
        "head_dim_v": _shape("v", v)[-1],
        "page_size": page_size,
    }


def _attention_problem(form: str, call: dict[str, Any], dtype: str) -> Problem:
    q = call["q"]
    k, v = (call["k_cache"], call["v_cache"]) if form == "kvcache" else (call["k"], call["v"])
    window_left, window_right = _checks.window(call["causal"], call["window_size"])
    dropout = call.get("dropout_p", 0.0) > 0
    keys = _key_sizes(form, k, v, call)
    decode = form == "kvcache" or keys["page_size"] > 0
    return {
        "family": "decode" if decode else "fwd",
        "dtype": dtype,
        **_query_sizes(q, call),
        **keys,
        "leftpad": call.get("cache_leftpad") is not None,
        "appends": form == "kvcache" and call["k"] is not None,
        "broadcast": decode and _is_broadcast((k, v)),
        "window_left": window_left,
        "window_right": window_right,
        "softcap": call["softcap"] != 0,
        "alibi": call["alibi_slopes"] is not None,
        "dropout": dropout,
        "dmask": dropout and call.get("return_attn_probs", False),
        "positive_scale": call["softmax_scale"] is None or call["softmax_scale"] > 0,
        "deterministic": call.get("deterministic", False),
        "num_splits": call.get("num_splits", 0),
        # q is copied if it has to be, a cache never is.
        "alignment_bytes": _alignment((k, v) if decode else (q, k, v)),
    }


def _append_problem(call: dict[str, Any], attention: Problem) -> Problem:
    shape = _shape("k", call["k"])
    cos = call["rotary_cos"]
    return {
        "family": "append_kv",
        "dtype": attention["dtype"],
        "batch_size": attention["batch_size"],
        "seqlen_k": shape[-3],
        "varlen": call["cu_seqlens_k_new"] is not None,
        "num_heads_q": attention["num_heads_kv"],
        "num_heads_kv": attention["num_heads_kv"],
        "head_dim": attention["head_dim"],
        "head_dim_v": attention["head_dim_v"],
        "page_size": attention["page_size"],
        "rotary_dim": 0 if cos is None else 2 * _shape("rotary_cos", cos)[-1],
        "rotary_interleaved": bool(call["rotary_interleaved"]),
        "alignment_bytes": _alignment((call["k"], call["v"], call["k_cache"], call["v_cache"])),
    }


def _rotary_problem(call: dict[str, Any], append: Problem) -> Problem:
    shape = _shape("q", call["q"])
    return {
        **append,
        "family": "rotary",
        "seqlen_q": shape[-3],
        "varlen": call["cu_seqlens_q"] is not None,
        "num_heads_q": shape[-2],
        "num_heads_kv": shape[-2],
        "page_size": 0,
        "alignment_bytes": _alignment((call["q"],)),
    }


def _preprocess_problem(call: dict[str, Any], attention: Problem) -> Problem:
    varlen = attention["varlen"]
    return {
        **attention,
        "family": "bwd_preprocess",
        "batch_size": 1 if varlen else attention["batch_size"],
        "seqlen_q": _shape("q", call["q"])[-3],
    }


def ops(form: str, call: dict[str, Any], dtype: str, backward: bool) -> list[list[Problem]]:
    """The problems of each op of a call, in the order in which they run; attention is last."""
    attention = _attention_problem(form, call, dtype)
    if form == "kvcache":
        if call["k"] is None:
            return [[attention]]
        append = _append_problem(call, attention)
        rotary = [_rotary_problem(call, append)] if append["rotary_dim"] else []
        return [[append, *rotary, attention]]
    if not backward:
        return [[attention]]
    bwd = {**attention, "family": "bwd"}
    return [[attention], [_preprocess_problem(call, attention), bwd]]


def in_words(form: str, call: dict[str, Any], problem: Problem) -> str:
    """Shapes, dtype and options of a call."""
    names = ("q", "k_cache", "v_cache", "k", "v") if form == "kvcache" else ("q", "k", "v")
    words = [f"{n} {list(_shape(n, call[n]))}" for n in names if call[n] is not None]
    words.append(problem["dtype"])
    left, right = problem["window_left"], problem["window_right"]
    if right == 0:
        words.append("causal" if left < 0 else f"causal, window {left}")
    elif max(left, right) >= 0:
        words.append(f"window ({left}, {right})")
    if problem["page_size"]:
        words.append(f"pages of {problem['page_size']}")
    words += [flag for flag in _FLAGS if problem[flag]]
    return ", ".join(words)
