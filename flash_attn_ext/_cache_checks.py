"""Argument checks of the functions in kvcache.py; the rules are those of _checks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    K_PAGED,
    MAX_SPLITS,
    Q_FIXED,
    Q_VARLEN,
    V_PAGED,
    cumulative,
    floating,
    heads_agree,
    is_sound,
    layout,
    like,
    message,
    no_gradient,
    pages,
    per_sequence,
    same_device,
    shape_of,
    values_readable,
    written_in_place,
)
from ._value_checks import Ascending, Bounded, Check, LengthTerms, PageIds, check
from .errors import UnsupportedError

K_CACHE = "[batch_cache, seqlen_cache, num_heads_kv, head_dim]"
V_CACHE = "[batch_cache, seqlen_cache, num_heads_kv, head_dim_v]"


def cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
) -> int:
    """Shapes of the query and the cache; returns the batch size."""
    is_plain = cu_seqlens_q is cache_batch_idx is cache_leftpad is None
    if (
        is_plain
        and is_sound(q, k_cache, v_cache, 4, 4, page_table is None)
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
    ):
        batch_size = q.shape[0]
        if page_table is not None:
            pages(page_table, batch_size, q)
        return batch_size
    if cu_seqlens_q is None:
        layout("q", q, 4, Q_FIXED)
        batch_size = q.shape[0]
    else:
        layout("q", q, 3, f"{Q_VARLEN} with cu_seqlens_q")
        cumulative("cu_seqlens_q", cu_seqlens_q, q)
        batch_size = cu_seqlens_q.shape[0] - 1
    k_layout, v_layout = (K_CACHE, V_CACHE) if page_table is None else (K_PAGED, V_PAGED)
    layout("k_cache", k_cache, 4, k_layout)
    layout("v_cache", v_cache, 4, v_layout)
    floating("q", q)
    like("k_cache", k_cache, q)
    like("v_cache", v_cache, q)
    heads_agree(q, k_cache, v_cache, "k_cache", "v_cache")
    written_in_place("k_cache", k_cache)
    written_in_place("v_cache", v_cache)
    if cache_batch_idx is not None:
        per_sequence("cache_batch_idx", cache_batch_idx, batch_size, q)
    if cache_leftpad is not None:
        per_sequence("cache_leftpad", cache_leftpad, batch_size, q)
    if page_table is not None:
        table_rows = page_table.shape[0] if cache_batch_idx is not None else batch_size
        pages(page_table, table_rows, q)
    elif cache_batch_idx is None and k_cache.shape[0] < batch_size:
        raise ValueError(
            message(
                "k_cache: batch",
                k_cache.shape[0],
                f"at least {batch_size} as q",
                "or cache_batch_idx, the row of every sequence",
            )
        )
    return batch_size


def new_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: object,
    cu_seqlens_k_new: Tensor | None,
    batch_size: int,
) -> Tensor:
    """The keys and values to append; returns v."""
    if (
        cache_seqlens is not None
        and cu_seqlens_k_new is None
        and _is_sound_beside(q, k, v, k_cache, v_cache, batch_size)
    ):
        return v  # type: ignore[return-value]  # a tensor, as was seen
    if v is None:
        raise ValueError(message("v", None, "a tensor", "k and v are appended together"))
    if cache_seqlens is None:
        raise ValueError(
            message("cache_seqlens", None, "the lengths before the append", "k is to be appended")
        )
    if cu_seqlens_k_new is None:
        layout("k", k, 4, "[batch, seqlen_new, num_heads_kv, head_dim]")
        layout("v", v, 4, "[batch, seqlen_new, num_heads_kv, head_dim_v]")
        if k.shape[0] != batch_size:
            raise ValueError(message("k: batch", k.shape[0], f"{batch_size} as q"))
    else:
        layout("k", k, 3, "[total_new, num_heads_kv, head_dim] with cu_seqlens_k_new")
        layout("v", v, 3, "[total_new, num_heads_kv, head_dim_v] with cu_seqlens_k_new")
        cumulative("cu_seqlens_k_new", cu_seqlens_k_new, q, batch_size)
    like("k", k, q)
    like("v", v, q)
    if k.shape[:-2] != v.shape[:-2]:
        raise ValueError(message("v", shape_of(v), f"k's {list(k.shape)} up to the heads"))
    for name, x, x_cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.shape[-2:] != x_cache.shape[-2:]:
            raise ValueError(
                message(
                    f"{name}: heads and head_dim",
                    list(x.shape[-2:]),
                    f"{list(x_cache.shape[-2:])} as {name}_cache",
                )
            )
    return v


def _is_sound_beside(
    q: Tensor, k: Any, v: Any, k_cache: Tensor, v_cache: Tensor, batch_size: int
) -> bool:
    """True only if k, v [batch, seqlen_new, ...] pass all checks of `new_keys`; see `is_sound`."""
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    k_shape, v_shape, dtype, device = k.shape, v.shape, q.dtype, q.device
    return (
        len(k_shape) == 4
        and k_shape[0] == batch_size
        and (k_shape == v_shape or k_shape[:3] == v_shape[:3])
        and k_shape[2:] == k_cache.shape[2:]
        and v_shape[2:] == v_cache.shape[2:]
        and dtype == k.dtype
        and dtype == v.dtype
        and device == k.device
        and device == v.device
    )


def rotary_tables(
    x: Tensor, cos: Tensor, sin: Tensor | None, x_name: str = "q", prefix: str = "rotary_"
) -> Tensor:
    """The tables of angles, [seqlen_ro, rotary_dim / 2] each; returns sin."""
    if (
        isinstance(cos, Tensor)
        and isinstance(sin, Tensor)
        and len(cos.shape) == 2
        and cos.shape == sin.shape
        and cos.dtype == sin.dtype == x.dtype
        and cos.device == sin.device == x.device
        and 2 * cos.shape[1] <= x.shape[-1]
    ):
        return sin
    layout(f"{prefix}cos", cos, 2, "[seqlen_ro, rotary_dim / 2]")
    if sin is None:
        raise ValueError(message(f"{prefix}sin", None, f"a tensor as {prefix}cos"))
    layout(f"{prefix}sin", sin, 2, "[seqlen_ro, rotary_dim / 2]")
    if cos.shape != sin.shape:
        raise ValueError(
            message(f"{prefix}sin", shape_of(sin), f"{list(cos.shape)} as {prefix}cos")
        )
    like(f"{prefix}cos", cos, x, x_name)
    like(f"{prefix}sin", sin, x, x_name)
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            message("rotary_dim", 2 * cos.shape[1], f"at most head_dim = {x.shape[-1]}")
        )
    return sin


def nothing_to_append(
    v: Tensor | None, rotary_cos: Tensor | None, cu_seqlens_k_new: Tensor | None
) -> None:
    """Without k there is nothing that these arguments could mean."""
    for name, x in (("v", v), ("rotary_cos", rotary_cos), ("cu_seqlens_k_new", cu_seqlens_k_new)):
        if x is not None:
            raise ValueError(message("k", None, f"a tensor with {name}", "give k or neither"))


def cache_rotary(
    q: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    batch_size: int,
    k_cache: Tensor,
    page_table: Tensor | None,
) -> Tensor:
    """The rotary arguments of the cache; returns sin."""
    sin = rotary_tables(q, cos, sin)
    if rotary_seqlens is not None:
        per_sequence("rotary_seqlens", rotary_seqlens, batch_size, q)
    elif cos.shape[0] < (keys := _capacity(k_cache, page_table)):
        raise ValueError(
            message(
                "rotary_cos: rows", cos.shape[0], f"at least the {keys} keys that fit the cache"
            )
        )
    return sin


def _capacity(k_cache: Tensor, page_table: Tensor | None) -> int:
    """Keys that fit the cache of one sequence."""
    return k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])


def seqlens_tensor(cache_seqlens: int | Tensor | None, batch_size: int, q: Tensor) -> Tensor | None:
    """cache_seqlens as int32 [batch]."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, Tensor):
        per_sequence("cache_seqlens", cache_seqlens, batch_size, q)
        return cache_seqlens
    if not isinstance(cache_seqlens, (int, torch.SymInt)):
        raise TypeError(
            message("cache_seqlens", type(cache_seqlens).__name__, "an int or an int32 tensor")
        )
    return torch.full((batch_size,), cache_seqlens, dtype=torch.int32, device=q.device)


def cache_values(
    q: Tensor,
    max_seqlen_q: int,
    k_cache: Tensor,
    k: Tensor | None,
    batch_size: int,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_seqlens: Tensor | None,
) -> None:
    """The values of the index tensors, where they can be read."""
    given = (
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        page_table,
        cu_seqlens_q,
        cu_seqlens_k_new,
        rotary_seqlens,
    )
    tensors = [x for x in given if x is not None]
    if not tensors or not all(values_readable(x) for x in tensors):
        return
    capacity = _capacity(k_cache, page_table)
    checks: list[Check] = []
    if cu_seqlens_q is not None:
        total_q = q.shape[0]
        checks.append(
            Ascending("cu_seqlens_q", cu_seqlens_q, total_q, "max_seqlen_q", max_seqlen_q)
        )
    new = LengthTerms(0 if k is None else k.shape[1])
    if cu_seqlens_k_new is not None and k is not None:
        checks.append(Ascending("cu_seqlens_k_new", cu_seqlens_k_new, k.shape[0]))
        new = LengthTerms(cu_seqlens=cu_seqlens_k_new)
    lengths = LengthTerms(capacity)
    if cache_seqlens is not None:
        limit = LengthTerms(capacity - new.constant, cu_seqlens=new.cu_seqlens, sign=-1)
        checks.append(Bounded("cache_seqlens", cache_seqlens, limit, "what fits the cache"))
        lengths = new._replace(values=cache_seqlens)
    if cache_leftpad is not None:
        text = "the length of the sequence"
        checks.append(Bounded("cache_leftpad", cache_leftpad, lengths, text))
    if cache_batch_idx is not None:
        last = LengthTerms((k_cache if page_table is None else page_table).shape[0] - 1)
        checks.append(Bounded("cache_batch_idx", cache_batch_idx, last, "a cache row"))
    if page_table is not None:
        num_pages, page_size = k_cache.shape[:2]
        checks.append(PageIds(page_table, cache_batch_idx, lengths, page_size, num_pages))
    if rotary_cos is not None and rotary_seqlens is not None:
        last = LengthTerms(rotary_cos.shape[0] - 1)
        checks.append(Bounded("rotary_seqlens", rotary_seqlens, last, "a row of rotary_cos"))
    check(checks, batch_size, q.device)


def partial_results(out_partial: Tensor, lse_partial: Tensor) -> None:
    """The inputs of flash_attn_combine."""
    if not isinstance(out_partial, Tensor) or out_partial.dim() != 4:
        layout("out_partial", out_partial, 5, "[num_splits, batch, seqlen, num_heads, head_dim]")
    if out_partial.dtype != torch.float32:
        raise ValueError(
            message("out_partial", out_partial.dtype, "torch.float32", "pass out_partial.float()")
        )
    like("lse_partial", lse_partial, out_partial, "out_partial")
    if lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            message(
                "lse_partial",
                shape_of(lse_partial),
                f"{list(out_partial.shape[:-1])} as out_partial",
                "heads come last",
            )
        )
    if not 1 <= out_partial.shape[0] <= MAX_SPLITS:
        raise UnsupportedError(
            message("out_partial: num_splits", out_partial.shape[0], f"1 to {MAX_SPLITS}")
        )


def combined(out: Tensor, out_partial: Tensor, out_dtype: torch.dtype | None) -> None:
    """The caller's buffer for the result of flash_attn_combine."""
    shape = list(out_partial.shape[1:])
    layout("out", out, len(shape), str(shape))
    floating("out", out)
    same_device("out", out, out_partial, "out_partial")
    if list(out.shape) != shape:
        raise ValueError(message("out", shape_of(out), str(shape)))
    if out_dtype is not None and out_dtype != out.dtype:
        raise ValueError(message("out_dtype", out_dtype, f"{out.dtype} as out", "leave one out"))
    written_in_place("out", out)
    no_gradient("out", out, out_partial)
