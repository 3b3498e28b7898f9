"""Argument checks of the public functions.

Every message reads ``what: got ..., expected ...; what to do``. Wrong Python types raise TypeError,
inputs that contradict each other ValueError, and well-formed inputs that nothing here computes
UnsupportedError (a ValueError).

Checks of shapes, types and devices always run: they cost a few microseconds and are traced away by
``torch.compile``. Checks of values (ascending ``cu_seqlens``, page ids, cache overflow) stand in
_value_checks.py. They run where `values_readable`: on CPU tensors, and on CUDA only with
FLASH_ATTN_EXT_DEBUG=1, because there they wait for the device.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .errors import UnsupportedError

DEBUG = os.environ.get("FLASH_ATTN_EXT_DEBUG") == "1"
MAX_HEAD_DIM = 256
MAX_SPLITS = 256

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SINK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)

Q_FIXED = "[batch, seqlen_q, num_heads_q, head_dim]"
K_FIXED = "[batch, seqlen_k, num_heads_kv, head_dim]"
V_FIXED = "[batch, seqlen_k, num_heads_kv, head_dim_v]"
Q_VARLEN = "[total_q, num_heads_q, head_dim]"
K_VARLEN = "[total_k, num_heads_kv, head_dim]"
V_VARLEN = "[total_k, num_heads_kv, head_dim_v]"
K_PAGED = "[num_pages, page_size, num_heads_kv, head_dim]"
V_PAGED = "[num_pages, page_size, num_heads_kv, head_dim_v]"


def message(what: str, got: object, expected: str, hint: str = "") -> str:
    """The text of an error."""
    return f"{what}: got {got}, expected {expected}{'; ' + hint if hint else ''}"


def shape_of(x: Tensor) -> str:
    """The shape of ``x`` for a message."""
    return f"shape {list(x.shape)}"


# ---- any tensor -------------------------------------------------------------------------------


def layout(name: str, x: Tensor, rank: int, dimensions: str) -> None:
    """``x`` is a tensor of ``rank`` dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(message(name, type(x).__name__, f"a tensor {dimensions}"))
    if x.dim() != rank:
        raise ValueError(message(name, shape_of(x), dimensions))


def like(name: str, x: Tensor, q: Tensor, q_name: str = "q") -> None:
    """``x`` has the dtype and the device of ``q``."""
    if x.dtype != q.dtype:
        raise ValueError(
            message(name, x.dtype, f"{q.dtype} as {q_name}", "convert all inputs to one dtype")
        )
    same_device(name, x, q, q_name)


def same_device(name: str, x: Tensor, q: Tensor, q_name: str = "q") -> None:
    """``x`` is on the device of ``q``."""
    if x.device != q.device:
        raise ValueError(
            message(name, f"device {x.device}", f"{q.device} as {q_name}", "move it with .to(...)")
        )


def floating(name: str, x: Tensor) -> None:
    """``x`` has one of the element types that attention is computed for."""
    if x.dtype not in _FLOAT_DTYPES:
        raise UnsupportedError(message(name, x.dtype, "float16, bfloat16, float32 or float64"))


def last_dim_contiguous(x: Tensor) -> Tensor:
    """``x``, copied if the elements of a head are not adjacent in memory."""
    # is_contiguous() answers in a third of the time of stride().
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def last_dims_contiguous(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for all three."""
    if q.is_contiguous() and k.is_contiguous() and v.is_contiguous():
        return q, k, v
    return last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)


def written_in_place(name: str, x: Tensor) -> None:
    """``x`` is written, so that it cannot be replaced by a copy with contiguous heads."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(
            message(
                name,
                f"stride {x.stride(-1)} in the last dimension",
                "1",
                "it is written in place, so it cannot be copied; allocate it contiguous",
            )
        )


def number(name: str, value: Any) -> Any:
    """``value`` as a Python or symbolic number."""
    if isinstance(value, _NUMBERS):
        return value
    if isinstance(value, Tensor) or not hasattr(value, "__float__"):
        raise TypeError(message(name, type(value).__name__, "a number"))
    return float(value)


# ---- q, k, v ----------------------------------------------------------------------------------


def heads_agree(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    """Head counts, head dimensions and key lengths agree; layouts are checked already."""
    num_heads_q, head_dim = q.shape[-2:]
    k_shape, v_shape = k.shape, v.shape
    num_heads_kv, head_dim_v = k_shape[-2], v_shape[-1]
    if k_shape != v_shape and k_shape[:-1] != v_shape[:-1]:
        raise ValueError(
            message(v_name, shape_of(v), f"{k_name}'s {list(k_shape)} up to the last dimension")
        )
    if k_shape[-1] != head_dim:
        raise ValueError(
            message(f"{k_name}: head_dim", k_shape[-1], f"{head_dim} as q", "only v may differ")
        )
    if num_heads_kv == 0 or num_heads_q % num_heads_kv != 0:
        raise ValueError(
            message(
                f"{k_name}: num_heads_kv",
                num_heads_kv,
                f"a divisor of num_heads_q = {num_heads_q}",
                "every key/value head serves the same number of query heads",
            )
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM or not 1 <= head_dim_v <= MAX_HEAD_DIM:
        is_v = 1 <= head_dim <= MAX_HEAD_DIM
        raise UnsupportedError(
            message(
                "head_dim of v" if is_v else "head_dim",
                head_dim_v if is_v else head_dim,
                f"1 to {MAX_HEAD_DIM}",
                "use torch.nn.functional.scaled_dot_product_attention",
            )
        )


def is_sound(q: Any, k: Any, v: Any, rank_q: int, rank_k: int, same_batch: bool) -> bool:
    """True only if q, k, v pass all checks of `fixed`, `varlen` or the cache that concern them.

    Flat, because it runs at every call; False leaves it to those checks to say what is wrong.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    q_shape, k_shape, v_shape, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    if (
        len(q_shape) != rank_q
        or len(k_shape) != rank_k
        or dtype not in _FLOAT_DTYPES
        or dtype != k.dtype
        or dtype != v.dtype
        or device != k.device
        or device != v.device
    ):
        return False
    head_dim, num_heads_kv = q_shape[-1], k_shape[-2]
    return (
        (k_shape == v_shape or (k_shape[:-1] == v_shape[:-1] and 1 <= v_shape[-1] <= MAX_HEAD_DIM))
        and k_shape[-1] == head_dim
        and 1 <= head_dim <= MAX_HEAD_DIM
        and num_heads_kv != 0
        and q_shape[-2] % num_heads_kv == 0
        and (not same_batch or q_shape[0] == k_shape[0])
    )


def fixed(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k, v of the fixed-length functions."""
    if is_sound(q, k, v, 4, 4, True):
        return
    layout("q", q, 4, Q_FIXED)
    layout("k", k, 4, K_FIXED)
    layout("v", v, 4, V_FIXED)
    floating("q", q)
    like("k", k, q)
    like("v", v, q)
    heads_agree(q, k, v, "k", "v")
    if k.shape[0] != q.shape[0]:
        raise ValueError(message("k: batch", k.shape[0], f"{q.shape[0]} as q"))


def packed(name: str, x: Tensor, num_heads_q: int | None, varlen: bool) -> None:
    """``qkv`` in one tensor: [..., 3, heads, dim] or, with ``num_heads_q``, [..., heads, dim]."""
    tokens = "total" if varlen else "batch, seqlen"
    rank = 3 if varlen else 4
    if num_heads_q is None:
        dimensions = f"[{tokens}, 3, num_heads, head_dim]"
        layout(name, x, rank + 1, dimensions)
        if x.shape[-3] != 3:
            raise ValueError(message(name, shape_of(x), dimensions))
        return
    layout(name, x, rank, f"[{tokens}, num_heads_q + 2 * num_heads_kv, head_dim]")
    num_heads_kv = (x.shape[-2] - num_heads_q) // 2
    if num_heads_kv < 1 or num_heads_q < 1 or num_heads_q + 2 * num_heads_kv != x.shape[-2]:
        raise ValueError(
            message(
                f"{name}: heads",
                x.shape[-2],
                f"num_heads_q + 2 * num_heads_kv with num_heads_q = {num_heads_q}",
            )
        )


def kv_packed(name: str, x: Tensor, varlen: bool) -> None:
    """``kv`` in one tensor: [..., 2, heads, dim]."""
    dimensions = f"[{'total_k' if varlen else 'batch, seqlen_k'}, 2, num_heads_kv, head_dim]"
    layout(name, x, 4 if varlen else 5, dimensions)
    if x.shape[-3] != 2:
        raise ValueError(message(name, shape_of(x), dimensions))


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
) -> None:
    """q, k, v and the lengths of the varlen functions."""
    is_plain = page_table is None and cu_seqlens_k is not None
    if not is_plain or not is_sound(q, k, v, 3, 3, False):
        _varlen_rows(q, k, v, page_table, cu_seqlens_k, seqused_k)
    cumulative("cu_seqlens_q", cu_seqlens_q, q)
    batch_size = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k is not None and cu_seqlens_k is not cu_seqlens_q:
        cumulative("cu_seqlens_k", cu_seqlens_k, q, batch_size)
    if seqused_q is not None:
        per_sequence("seqused_q", seqused_q, batch_size, q)
    if seqused_k is not None:
        per_sequence("seqused_k", seqused_k, batch_size, q)
    if page_table is not None:
        pages(page_table, batch_size, q)


def _varlen_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
) -> None:
    """q, k, v of the varlen functions, and whether there are lengths of the keys."""
    layout("q", q, 3, Q_VARLEN)
    if page_table is None:
        layout("k", k, 3, K_VARLEN)
        layout("v", v, 3, V_VARLEN)
        if cu_seqlens_k is None:
            raise ValueError(
                message(
                    "cu_seqlens_k", None, "a tensor", "None is for page_table with seqused_k only"
                )
            )
    else:
        layout("k", k, 4, K_PAGED)
        layout("v", v, 4, V_PAGED)
        if cu_seqlens_k is None and seqused_k is None:
            raise ValueError(
                message(
                    "seqused_k",
                    None,
                    "the length of every sequence in the pages",
                    "page_table needs seqused_k or cu_seqlens_k",
                )
            )
    floating("q", q)
    like("k", k, q)
    like("v", v, q)
    heads_agree(q, k, v, "k", "v")


# ---- lengths and pages ------------------------------------------------------------------------


def _int32(name: str, x: Tensor, rank: int, dimensions: str, q: Tensor) -> None:
    if (
        isinstance(x, Tensor)
        and x.dtype is torch.int32
        and x.dim() == rank
        and x.is_contiguous()
        and x.device == q.device
    ):
        return
    layout(name, x, rank, dimensions)
    if x.dtype != torch.int32:
        raise ValueError(message(name, x.dtype, "torch.int32", f"pass {name}.to(torch.int32)"))
    same_device(name, x, q)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            message(name, f"stride {x.stride(-1)}", "a contiguous tensor", "call .contiguous()")
        )


def cumulative(name: str, x: Tensor, q: Tensor, batch_size: int | None = None) -> None:
    """``cu_seqlens``: int32, one entry more than there are sequences."""
    _int32(name, x, 1, "[batch + 1]", q)
    length = x.shape[0]
    if length < 1 or (batch_size is not None and length != batch_size + 1):
        expected = "at least 1" if batch_size is None else f"batch + 1 = {batch_size + 1}"
        raise ValueError(message(f"{name}: length", length, expected))


def per_sequence(name: str, x: Tensor, batch_size: int, q: Tensor) -> None:
    """One int32 for each sequence."""
    _int32(name, x, 1, "[batch]", q)
    if x.shape[0] != batch_size:
        raise ValueError(message(f"{name}: length", x.shape[0], f"batch = {batch_size}"))


def pages(page_table: Tensor, batch_size: int, q: Tensor) -> None:
    """One row of page numbers for each sequence."""
    _int32("page_table", page_table, 2, "[batch, max_pages]", q)
    if page_table.shape[0] != batch_size:
        raise ValueError(message("page_table: rows", page_table.shape[0], f"batch = {batch_size}"))


def values_readable(x: Tensor) -> bool:
    """Whether checking the values of ``x`` is possible (no tracing) and free or asked for."""
    if not (DEBUG or x.is_cpu):
        return False
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, Parameter)  # FakeTensor and other stand-ins have no values
        and (x.device.type == "cpu" or (DEBUG and x.device.type == "cuda"))
    )


def max_seqlen(name: str, value: Any) -> int:
    """``max_seqlen`` as an int; a 0-dim tensor is read (on a GPU this waits for it)."""
    if type(value) is int:
        return value
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype.is_floating_point:
            raise TypeError(
                message(
                    name,
                    f"a {value.dtype} tensor of {shape_of(value)}",
                    "an int or 0-dim int tensor",
                )
            )
        value = value.item()
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(message(name, type(value).__name__, "an int or 0-dim int tensor"))
    return value  # type: ignore[return-value]  # a SymInt stands for an int


# ---- options ----------------------------------------------------------------------------------


def window(causal: bool, window_size: Any) -> tuple[int, int]:
    """(window_left, window_right), -1 = unbounded, from what users pass for them."""
    if window_size is None or (type(window_size) is tuple and window_size == (-1, -1)):
        return -1, 0 if causal else -1
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(
            message(
                "window_size", repr(window_size), "a pair (left, right)", "-1 or None = unbounded"
            )
        )
    left, right = window_size
    return _window_side("left", left), 0 if causal else _window_side("right", right)


def _window_side(name: str, size: Any) -> int:
    if size is None:
        return -1
    if type(size) is not int and not isinstance(size, (int, torch.SymInt)):
        raise TypeError(
            message(f"window_size: {name}", repr(size), "an int", "-1 or None = unbounded")
        )
    return -1 if size < 0 else size  # type: ignore[return-value]  # a SymInt stands for an int


def scores(softmax_scale: Any, softcap: Any, dropout_p: Any) -> tuple[float | None, float, float]:
    """(softmax_scale, softcap, dropout_p) as numbers."""
    if softmax_scale is not None:
        softmax_scale = number("softmax_scale", softmax_scale)
    if type(softcap) is not float:
        softcap = number("softcap", softcap)
    if not softcap >= 0.0:
        raise ValueError(message("softcap", softcap, "a number >= 0", "0.0 turns it off"))
    if type(dropout_p) is not float:
        dropout_p = number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(message("dropout_p", dropout_p, "0 <= dropout_p < 1"))
    return softmax_scale, softcap, dropout_p


def splits(num_splits: Any, sm_margin: Any) -> None:
    """num_splits and sm_margin."""
    if not isinstance(num_splits, int) or not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(
            message("num_splits", num_splits, f"0 to {MAX_SPLITS}", "0 lets the plan choose")
        )
    if not isinstance(sm_margin, int) or sm_margin < 0:
        raise ValueError(message("sm_margin", sm_margin, "a number of multiprocessors >= 0"))


def alibi(alibi_slopes: Tensor, q: Tensor, batch_size: int) -> Tensor:
    """Slopes fp32 [num_heads_q] or [batch, num_heads_q], contiguous."""
    num_heads_q = q.shape[-2]
    dimensions = f"[num_heads_q = {num_heads_q}] or [batch = {batch_size}, num_heads_q]"
    if not isinstance(alibi_slopes, Tensor):
        raise TypeError(
            message("alibi_slopes", type(alibi_slopes).__name__, f"a tensor {dimensions}")
        )
    if alibi_slopes.dtype != torch.float32:
        raise ValueError(message("alibi_slopes", alibi_slopes.dtype, "torch.float32"))
    same_device("alibi_slopes", alibi_slopes, q)
    if alibi_slopes.shape != (num_heads_q,) and alibi_slopes.shape != (batch_size, num_heads_q):
        raise ValueError(message("alibi_slopes", shape_of(alibi_slopes), dimensions))
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "alibi_slopes: got a tensor that requires grad, expected constants; "
            "slopes have no gradient, pass alibi_slopes.detach()"
        )
    return alibi_slopes.contiguous()


def sink(s_aux: Tensor, q: Tensor) -> None:
    """Attention sinks: one logit for each query head."""
    num_heads_q = q.shape[-2]
    layout("s_aux", s_aux, 1, "[num_heads_q]")
    same_device("s_aux", s_aux, q)
    if s_aux.dtype not in _SINK_DTYPES:
        raise ValueError(message("s_aux", s_aux.dtype, "float16, bfloat16 or float32"))
    if s_aux.shape[0] != num_heads_q:
        raise ValueError(message("s_aux", shape_of(s_aux), f"[num_heads_q = {num_heads_q}]"))


def one_of(name: str, value: Tensor | None, other_name: str, other: Tensor | None) -> Tensor | None:
    """An argument that has two names."""
    if value is not None and other is not None:
        raise TypeError(
            message(
                f"{name} and {other_name}",
                "both",
                "one of them",
                "both mean the same",
            )
        )
    return other if value is None else value


def no_gradient(name: str, *tensors: Tensor | None) -> None:
    """A result that is written into the caller's buffer ``name`` has no gradient."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise UnsupportedError(
            message(
                name,
                "an input that requires grad",
                "none",
                f"what is written into a given buffer has no gradient, leave {name}=None or use "
                "torch.no_grad()",
            )
        )


def output(out: Tensor, q: Tensor, head_dim_v: int, *inputs: Tensor | None) -> None:
    """The caller's buffer for the result."""
    shape = [*q.shape[:-1], head_dim_v]
    layout("out", out, len(shape), str(shape))
    like("out", out, q)
    if list(out.shape) != shape:
        raise ValueError(message("out", shape_of(out), str(shape)))
    written_in_place("out", out)
    no_gradient("out", out, q, *inputs)


def unsupported(
    attention_chunk: Any,
    qv: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
) -> None:
    """Arguments of flash-attn 3 that are understood but have no implementation."""
    if not attention_chunk and qv is q_descale is k_descale is v_descale is None:
        return
    if attention_chunk:
        raise UnsupportedError(
            message("attention_chunk", attention_chunk, "0", "chunked attention is not implemented")
        )
    if qv is not None:
        raise UnsupportedError(
            message("qv", "a tensor", "None", "the second query operand is not implemented")
        )
    for name, scale in (("q", q_descale), ("k", k_descale), ("v", v_descale)):
        if scale is not None:
            raise UnsupportedError(
                message(
                    f"{name}_descale",
                    "a tensor",
                    "None",
                    f"it scales fp8 inputs, which are not implemented; multiply {name} by it",
                )
            )
