# ruff: noqa: E501 -- a table of cases, one per line
"""Every message that bad input produces: what, got, expected, what to do."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import NEEDS_CUDA, cu_seqlens, int32, require

import flash_attn_ext
from flash_attn_ext import UnsupportedError, _cache_checks, _checks
from flash_attn_ext.bert_padding import unpad_input, unpad_input_for_concatenated_sequences
from flash_attn_ext.layers.rotary import apply_rotary_emb

Case = tuple[str, type[Exception], str, Callable[[], Any]]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def fixed(**changes: Any) -> Any:
    """flash_attn_func with one sound call's arguments, some of them changed."""
    arguments = {"q": zeros(2, 3, 4, 8), "k": zeros(2, 5, 2, 8), "v": zeros(2, 5, 2, 8)}
    return flash_attn_ext.flash_attn_func(**{**arguments, **changes})


def varlen(**changes: Any) -> Any:
    arguments = {
        "q": zeros(6, 4, 8),
        "k": zeros(7, 2, 8),
        "v": zeros(7, 2, 8),
        "cu_seqlens_q": cu_seqlens([4, 2]),
        "cu_seqlens_k": cu_seqlens([3, 4]),
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    }
    return flash_attn_ext.flash_attn_varlen_func(**{**arguments, **changes})


def paged(**changes: Any) -> Any:
    arguments = {
        "k": zeros(5, 3, 2, 8),
        "v": zeros(5, 3, 2, 8),
        "cu_seqlens_k": None,
        "seqused_k": int32([4, 2]),
        "page_table": int32([[0, 1], [2, 99]]).reshape(2, 2),
    }
    return varlen(**{**arguments, **changes})


def cached(**changes: Any) -> Any:
    arguments = {"q": zeros(2, 1, 4, 8), "k_cache": zeros(2, 6, 2, 8), "v_cache": zeros(2, 6, 2, 8)}
    return flash_attn_ext.flash_attn_with_kvcache(**{**arguments, **changes})


def appended(**changes: Any) -> Any:
    arguments = {"k": zeros(2, 1, 2, 8), "v": zeros(2, 1, 2, 8), "cache_seqlens": 3}
    return cached(**{**arguments, **changes})


def combined(**changes: Any) -> Any:
    arguments = {"out_partial": zeros(3, 2, 5, 4, 8), "lse_partial": zeros(3, 2, 5, 4)}
    return flash_attn_ext.flash_attn_combine(**{**arguments, **changes})


def rotated(**changes: Any) -> Any:
    arguments = {"x": zeros(2, 5, 4, 8), "cos": zeros(9, 4), "sin": zeros(9, 4)}
    return apply_rotary_emb(**{**arguments, **changes})


def needs_grad(*shape: int) -> torch.Tensor:
    return zeros(*shape).requires_grad_()


def strided(*shape: int) -> torch.Tensor:
    """A tensor whose last dimension is not contiguous."""
    return zeros(*shape[:-1], 2 * shape[-1])[..., ::2]


CASES: list[Case] = [
    # q, k, v
    ("not a tensor", TypeError, "q: got list, expected a tensor [batch, seqlen_q,", lambda: fixed(q=[1])),
    ("rank of q", ValueError, "q: got shape [3, 4, 8], expected [batch, seqlen_q, num_heads_q, head_dim]", lambda: fixed(q=zeros(3, 4, 8))),
    ("rank of k", ValueError, "k: got shape [5, 2, 8], expected [batch, seqlen_k, num_heads_kv, head_dim]", lambda: fixed(k=zeros(5, 2, 8))),
    ("rank of v", ValueError, "v: got shape [5, 2, 8], expected [batch, seqlen_k, num_heads_kv, head_dim_v]", lambda: fixed(v=zeros(5, 2, 8))),
    ("dtype", UnsupportedError, "q: got torch.int32, expected float16, bfloat16, float32 or float64", lambda: fixed(q=zeros(2, 3, 4, 8, dtype=torch.int32))),
    ("dtype mix", ValueError, "k: got torch.float16, expected torch.float32 as q; convert all inputs to one dtype", lambda: fixed(k=zeros(2, 5, 2, 8, dtype=torch.float16))),
    ("device mix", ValueError, "v: got device meta, expected cpu as q; move it with .to(...)", lambda: fixed(v=zeros(2, 5, 2, 8).to("meta"))),
    ("heads", ValueError, "k: num_heads_kv: got 3, expected a divisor of num_heads_q = 4", lambda: fixed(k=zeros(2, 5, 3, 8), v=zeros(2, 5, 3, 8))),
    ("no heads", ValueError, "k: num_heads_kv: got 0, expected a divisor", lambda: fixed(k=zeros(2, 5, 0, 8), v=zeros(2, 5, 0, 8))),
    ("k and v", ValueError, "v: got shape [2, 4, 2, 8], expected k's [2, 5, 2, 8] up to the last dimension", lambda: fixed(v=zeros(2, 4, 2, 8))),
    ("head_dim of k", ValueError, "k: head_dim: got 16, expected 8 as q; only v may differ", lambda: fixed(k=zeros(2, 5, 2, 16))),
    ("head_dim", UnsupportedError, "head_dim: got 264, expected 1 to 256", lambda: fixed(q=zeros(2, 3, 4, 264), k=zeros(2, 5, 2, 264))),
    ("head_dim 0", UnsupportedError, "head_dim: got 0, expected 1 to 256", lambda: fixed(q=zeros(2, 3, 4, 0), k=zeros(2, 5, 2, 0))),
    ("head_dim_v", UnsupportedError, "head_dim of v: got 512, expected 1 to 256", lambda: fixed(v=zeros(2, 5, 2, 512))),
    ("batch", ValueError, "k: batch: got 3, expected 2 as q", lambda: fixed(k=zeros(3, 5, 2, 8), v=zeros(3, 5, 2, 8))),
    # packed
    ("kv", ValueError, "kv: got shape [2, 5, 3, 2, 8], expected [batch, seqlen_k, 2,", lambda: flash_attn_ext.flash_attn_kvpacked_func(zeros(2, 3, 4, 8), zeros(2, 5, 3, 2, 8))),
    ("kv varlen", ValueError, "kv: got shape [5, 2, 8], expected [total_k, 2,", lambda: flash_attn_ext.flash_attn_varlen_kvpacked_func(zeros(6, 4, 8), zeros(5, 2, 8), None, None, 1, 1)),
    ("qkv", ValueError, "qkv: got shape [2, 5, 4, 8], expected [batch, seqlen, 3, num_heads, head_dim]", lambda: flash_attn_ext.flash_attn_qkvpacked_func(zeros(2, 5, 4, 8))),
    ("qkv of 2", ValueError, "qkv: got shape [2, 5, 2, 4, 8], expected [batch, seqlen, 3,", lambda: flash_attn_ext.flash_attn_qkvpacked_func(zeros(2, 5, 2, 4, 8))),
    ("qkv heads", ValueError, "qkv: heads: got 7, expected num_heads_q + 2 * num_heads_kv with num_heads_q = 4", lambda: flash_attn_ext.flash_attn_qkvpacked_func(zeros(2, 5, 7, 8), num_heads_q=4)),
    ("qkv varlen", ValueError, "qkv: got shape [5, 2, 3, 4, 8], expected [total, 3,", lambda: flash_attn_ext.flash_attn_varlen_qkvpacked_func(zeros(5, 2, 3, 4, 8), None, 1)),
    # options
    ("dropout 1", ValueError, "dropout_p: got 1.0, expected 0 <= dropout_p < 1", lambda: fixed(dropout_p=1.0)),
    ("dropout < 0", ValueError, "dropout_p: got -0.1, expected 0 <= dropout_p < 1", lambda: fixed(dropout_p=-0.1)),
    ("dropout nan", ValueError, "dropout_p: got nan", lambda: fixed(dropout_p=float("nan"))),
    ("dropout text", TypeError, "dropout_p: got str, expected a number", lambda: fixed(dropout_p="0.1")),
    ("scale tensor", TypeError, "softmax_scale: got Tensor, expected a number", lambda: fixed(softmax_scale=torch.ones(()))),
    ("softcap", ValueError, "softcap: got -1.0, expected a number >= 0; 0.0 turns it off", lambda: fixed(softcap=-1.0)),
    ("window int", TypeError, "window_size: got 5, expected a pair (left, right); -1 or None = unbounded", lambda: fixed(window_size=5)),
    ("window of 3", TypeError, "window_size: got (1, 2, 3), expected a pair", lambda: fixed(window_size=(1, 2, 3))),
    ("window float", TypeError, "window_size: right: got 0.5, expected an int", lambda: fixed(window_size=(1, 0.5))),
    ("num_splits", ValueError, "num_splits: got 257, expected 0 to 256; 0 lets the plan choose", lambda: fixed(num_splits=257)),
    ("sm_margin", ValueError, "sm_margin: got -1, expected a number of multiprocessors >= 0", lambda: fixed(sm_margin=-1)),
    ("alibi type", TypeError, "alibi_slopes: got float, expected a tensor", lambda: fixed(alibi_slopes=1.0)),
    ("alibi dtype", ValueError, "alibi_slopes: got torch.float16, expected torch.float32", lambda: fixed(alibi_slopes=zeros(4, dtype=torch.float16))),
    ("alibi device", ValueError, "alibi_slopes: got device meta, expected cpu as q", lambda: fixed(alibi_slopes=zeros(4).to("meta"))),
    ("alibi shape", ValueError, "alibi_slopes: got shape [2], expected [num_heads_q = 4] or [batch = 2, num_heads_q]", lambda: fixed(alibi_slopes=zeros(2))),
    ("alibi gradient", UnsupportedError, "slopes have no gradient, pass alibi_slopes.detach()", lambda: fixed(alibi_slopes=needs_grad(4))),
    ("sink shape", ValueError, "s_aux: got shape [2], expected [num_heads_q = 4]", lambda: fixed(s_aux=zeros(2))),
    ("sink rank", ValueError, "s_aux: got shape [1, 4], expected [num_heads_q]", lambda: fixed(s_aux=zeros(1, 4))),
    ("sink dtype", ValueError, "s_aux: got torch.float64, expected float16, bfloat16 or float32", lambda: fixed(s_aux=zeros(4, dtype=torch.float64))),
    ("sink twice", TypeError, "s_aux and learnable_sink: got both, expected one of them", lambda: fixed(s_aux=zeros(4), learnable_sink=zeros(4))),
    ("sink and probabilities", UnsupportedError, "return_attn_probs: got True with s_aux, expected False", lambda: fixed(s_aux=zeros(4), return_attn_probs=True)),
    ("chunk", UnsupportedError, "attention_chunk: got 128, expected 0; chunked attention is not implemented", lambda: fixed(attention_chunk=128)),
    ("qv", UnsupportedError, "qv: got a tensor, expected None", lambda: fixed(qv=zeros(1))),
    ("q_descale", UnsupportedError, "q_descale: got a tensor, expected None; it scales fp8 inputs", lambda: fixed(q_descale=zeros(1))),
    ("k_descale", UnsupportedError, "k_descale: got a tensor, expected None", lambda: varlen(k_descale=zeros(1))),
    ("v_descale", UnsupportedError, "v_descale: got a tensor, expected None", lambda: cached(v_descale=zeros(1))),
    # out
    ("out shape", ValueError, "out: got shape [2, 3, 4, 9], expected [2, 3, 4, 8]", lambda: fixed(out=zeros(2, 3, 4, 9))),
    ("out rank", ValueError, "out: got shape [3, 4, 8], expected [2, 3, 4, 8]", lambda: fixed(out=zeros(3, 4, 8))),
    ("out dtype", ValueError, "out: got torch.float16, expected torch.float32 as q", lambda: fixed(out=zeros(2, 3, 4, 8, dtype=torch.float16))),
    ("out stride", ValueError, "out: got stride 2 in the last dimension, expected 1; it is written in place", lambda: fixed(out=strided(2, 3, 4, 8))),
    ("out gradient", UnsupportedError, "out: got an input that requires grad, expected none", lambda: fixed(q=needs_grad(2, 3, 4, 8), out=zeros(2, 3, 4, 8))),
    ("out varlen", ValueError, "out: got shape [6, 4, 9], expected [6, 4, 8]", lambda: varlen(out=zeros(6, 4, 9))),
    # varlen
    ("cu_seqlens dtype", ValueError, "cu_seqlens_q: got torch.int64, expected torch.int32; pass cu_seqlens_q.to(torch.int32)", lambda: varlen(cu_seqlens_q=cu_seqlens([4, 2]).long())),
    ("cu_seqlens type", TypeError, "cu_seqlens_q: got list, expected a tensor [batch + 1]", lambda: varlen(cu_seqlens_q=[0, 6])),
    ("cu_seqlens rank", ValueError, "cu_seqlens_k: got shape [1, 3], expected [batch + 1]", lambda: varlen(cu_seqlens_k=cu_seqlens([3, 4])[None])),
    ("cu_seqlens stride", ValueError, "cu_seqlens_q: got stride 2, expected a contiguous tensor; call .contiguous()", lambda: varlen(cu_seqlens_q=int32([0, 9, 4, 9, 6])[::2])),
    ("cu_seqlens empty", ValueError, "cu_seqlens_q: length: got 0, expected at least 1", lambda: varlen(cu_seqlens_q=int32([]))),
    ("cu_seqlens batch", ValueError, "cu_seqlens_k: length: got 2, expected batch + 1 = 3", lambda: varlen(cu_seqlens_k=cu_seqlens([7]))),
    ("cu_seqlens device", ValueError, "cu_seqlens_k: got device meta, expected cpu as q", lambda: varlen(cu_seqlens_k=cu_seqlens([3, 4]).to("meta"))),
    ("cu_seqlens start", ValueError, "cu_seqlens_q: got [1, 4, 6], expected ascending values that begin with 0", lambda: varlen(cu_seqlens_q=int32([1, 4, 6]))),
    ("cu_seqlens order", ValueError, "cu_seqlens_k: got [0, 5, 4], expected ascending values that begin with 0", lambda: varlen(cu_seqlens_k=int32([0, 5, 4]))),
    ("cu_seqlens long", ValueError, "cu_seqlens_q: got [0, 1, 2, 3, 4, 5, 6, 7] and more, expected ascending", lambda: varlen(cu_seqlens_q=int32([*range(9), 0]), cu_seqlens_k=int32([0] * 10))),
    ("cu_seqlens total", ValueError, "cu_seqlens_k[-1]: got 8, expected at most the 7 rows given", lambda: varlen(cu_seqlens_k=int32([0, 4, 8]))),
    ("cu_seqlens missing", ValueError, "cu_seqlens_k: got None, expected a tensor; None is for page_table with seqused_k only", lambda: varlen(cu_seqlens_k=None)),
    ("max_seqlen", ValueError, "max_seqlen_q: got 3, expected at least 4, the longest sequence of cu_seqlens_q", lambda: varlen(max_seqlen_q=3)),
    ("max_seqlen type", TypeError, "max_seqlen_k: got NoneType, expected an int or 0-dim int tensor", lambda: varlen(max_seqlen_k=None)),
    ("max_seqlen tensor", TypeError, "max_seqlen_k: got a torch.float32 tensor of shape [], expected an int or 0-dim int tensor", lambda: varlen(max_seqlen_k=torch.ones(()))),
    ("seqused length", ValueError, "seqused_k: length: got 3, expected batch = 2", lambda: varlen(seqused_k=int32([1, 1, 1]))),
    ("seqused_q", ValueError, "seqused_q[0]: got 5, expected 0 to 4, the length of the sequence", lambda: varlen(seqused_q=int32([5, 1]))),
    ("seqused_k", ValueError, "seqused_k[1]: got -1, expected 0 to 4, the length of the sequence", lambda: varlen(seqused_k=int32([1, -1]))),
    # pages
    ("page length", ValueError, "seqused_k: got None, expected the length of every sequence in the pages", lambda: paged(seqused_k=None)),
    ("page rank", ValueError, "k: got shape [7, 2, 8], expected [num_pages, page_size, num_heads_kv, head_dim]", lambda: paged(k=zeros(7, 2, 8))),
    ("page table rank", ValueError, "page_table: got shape [2], expected [batch, max_pages]", lambda: paged(page_table=int32([0, 1]))),
    ("page table rows", ValueError, "page_table: rows: got 1, expected batch = 2", lambda: paged(page_table=int32([0, 1])[None])),
    ("page table dtype", ValueError, "page_table: got torch.int64, expected torch.int32", lambda: paged(page_table=torch.zeros(2, 2, dtype=torch.int64))),
    ("page id", ValueError, "page_table[1, 0]: got 5, expected a page id below 5", lambda: paged(page_table=torch.tensor([[0, 1], [5, 0]], dtype=torch.int32))),
    ("page id < 0", ValueError, "page_table[0, 1]: got -1, expected a page id below 5", lambda: paged(page_table=torch.tensor([[0, -1], [2, 0]], dtype=torch.int32))),
    ("page capacity", ValueError, "seqlen_k: got 7, expected at most max_pages * page_size = 6", lambda: paged(seqused_k=int32([7, 2]), max_seqlen_k=8)),
    ("page max_seqlen", ValueError, "seqused_k[0]: got 5, expected 0 to 4, max_seqlen_k", lambda: paged(seqused_k=int32([5, 2]))),
    ("pages twice", TypeError, "page_table and block_table: got both, expected one of them", lambda: paged(block_table=int32([[0, 1], [2, 3]][0])[None])),
    # cache
    ("cache rank", ValueError, "k_cache: got shape [6, 2, 8], expected [batch_cache, seqlen_cache, num_heads_kv, head_dim]", lambda: cached(k_cache=zeros(6, 2, 8))),
    ("cache q rank", ValueError, "q: got shape [2, 4, 8], expected [batch, seqlen_q,", lambda: cached(q=zeros(2, 4, 8))),
    ("cache ragged q", ValueError, "q: got shape [2, 1, 4, 8], expected [total_q, num_heads_q, head_dim] with cu_seqlens_q", lambda: cached(cu_seqlens_q=cu_seqlens([1, 1]))),
    ("cache max_seqlen_q", TypeError, "max_seqlen_q: got NoneType, expected an int", lambda: cached(q=zeros(2, 4, 8), cu_seqlens_q=cu_seqlens([1, 1]))),
    ("cache stride", ValueError, "v_cache: got stride 2 in the last dimension, expected 1; it is written in place", lambda: cached(v_cache=strided(2, 6, 2, 8))),
    ("cache dtype", ValueError, "v_cache: got torch.float64, expected torch.float32 as q", lambda: cached(v_cache=zeros(2, 6, 2, 8, dtype=torch.float64))),
    ("cache batch", ValueError, "k_cache: batch: got 1, expected at least 2 as q; or cache_batch_idx", lambda: cached(k_cache=zeros(1, 6, 2, 8), v_cache=zeros(1, 6, 2, 8))),
    ("cache_seqlens type", TypeError, "cache_seqlens: got float, expected an int or an int32 tensor", lambda: cached(cache_seqlens=1.5)),
    ("cache_seqlens dtype", ValueError, "cache_seqlens: got torch.int64, expected torch.int32", lambda: cached(cache_seqlens=torch.zeros(2, dtype=torch.int64))),
    ("cache_seqlens value", ValueError, "cache_seqlens[0]: got 7, expected 0 to 6, what fits the cache", lambda: cached(cache_seqlens=7)),
    ("cache_batch_idx", ValueError, "cache_batch_idx[1]: got 2, expected 0 to 1, a cache row", lambda: cached(cache_batch_idx=int32([0, 2]))),
    ("cache_leftpad", ValueError, "cache_leftpad[1]: got 4, expected 0 to 3, the length of the sequence", lambda: cached(cache_seqlens=3, cache_leftpad=int32([0, 4]))),
    ("cache page id", ValueError, "page_table[0, 1]: got 9, expected a page id below 2", lambda: cached(page_table=torch.tensor([[0, 9], [1, 1]], dtype=torch.int32), cache_seqlens=7)),
    ("append without length", ValueError, "cache_seqlens: got None, expected the lengths before the append", lambda: appended(cache_seqlens=None)),
    ("append without v", ValueError, "v: got None, expected a tensor; k and v are appended together", lambda: appended(v=None)),
    ("v without k", ValueError, "k: got None, expected a tensor with v", lambda: appended(k=None)),
    ("rotary without k", ValueError, "k: got None, expected a tensor with rotary_cos", lambda: cached(rotary_cos=zeros(6, 4), rotary_sin=zeros(6, 4))),
    ("append batch", ValueError, "k: batch: got 1, expected 2 as q", lambda: appended(k=zeros(1, 1, 2, 8), v=zeros(1, 1, 2, 8))),
    ("append lengths", ValueError, "v: got shape [2, 2, 2, 8], expected k's [2, 1, 2, 8] up to the heads", lambda: appended(v=zeros(2, 2, 2, 8))),
    ("append heads", ValueError, "k: heads and head_dim: got [4, 8], expected [2, 8] as k_cache", lambda: appended(k=zeros(2, 1, 4, 8), v=zeros(2, 1, 4, 8))),
    ("append rank", ValueError, "k: got shape [2, 2, 8], expected [batch, seqlen_new, num_heads_kv, head_dim]", lambda: appended(k=zeros(2, 2, 8))),
    ("append ragged rank", ValueError, "v: got shape [2, 1, 2, 8], expected [total_new, num_heads_kv, head_dim_v] with cu_seqlens_k_new", lambda: appended(k=zeros(2, 2, 8), cu_seqlens_k_new=cu_seqlens([1, 1]))),
    ("append ragged total", ValueError, "cu_seqlens_k_new[-1]: got 3, expected at most the 2 rows given", lambda: appended(k=zeros(2, 2, 8), v=zeros(2, 2, 8), cu_seqlens_k_new=cu_seqlens([1, 2]))),
    ("overflow", ValueError, "cache_seqlens[0]: got 6, expected 0 to 5, what fits the cache", lambda: appended(cache_seqlens=6)),
    ("rotary pair", ValueError, "rotary_sin: got None, expected a tensor as rotary_cos", lambda: appended(rotary_cos=zeros(6, 4))),
    ("rotary shapes", ValueError, "rotary_sin: got shape [6, 2], expected [6, 4] as rotary_cos", lambda: appended(rotary_cos=zeros(6, 4), rotary_sin=zeros(6, 2))),
    ("rotary rank", ValueError, "rotary_cos: got shape [1, 6, 4], expected [seqlen_ro, rotary_dim / 2]", lambda: appended(rotary_cos=zeros(1, 6, 4), rotary_sin=zeros(6, 2))),
    ("rotary dtype", ValueError, "rotary_cos: got torch.float16, expected torch.float32 as q", lambda: appended(rotary_cos=zeros(6, 4).half(), rotary_sin=zeros(6, 4).half())),
    ("rotary dim", ValueError, "rotary_dim: got 10, expected at most head_dim = 8", lambda: appended(rotary_cos=zeros(6, 5), rotary_sin=zeros(6, 5))),
    ("rotary rows", ValueError, "rotary_cos: rows: got 4, expected at least the 6 keys that fit the cache", lambda: appended(rotary_cos=zeros(4, 4), rotary_sin=zeros(4, 4))),
    ("rotary_seqlens", ValueError, "rotary_seqlens[0]: got 4, expected 0 to 3, a row of rotary_cos", lambda: appended(rotary_cos=zeros(4, 4), rotary_sin=zeros(4, 4), rotary_seqlens=int32([4, 0]))),
    ("metadata", ValueError, "cache_seqlens: length: got 2, expected batch = 3", lambda: flash_attn_ext.get_scheduler_metadata(3, 1, 6, 4, 2, 8, int32([1, 1]))),
    ("metadata chunk", UnsupportedError, "attention_chunk: got 2, expected 0", lambda: flash_attn_ext.get_scheduler_metadata(1, 1, 6, 4, 2, 8, int32([1]), attention_chunk=2)),
    # combine
    ("partial rank", ValueError, "out_partial: got shape [3, 5], expected [num_splits, batch, seqlen, num_heads, head_dim]", lambda: combined(out_partial=zeros(3, 5))),
    ("partial dtype", ValueError, "out_partial: got torch.float16, expected torch.float32; pass out_partial.float()", lambda: combined(out_partial=zeros(3, 2, 5, 4, 8).half())),
    ("partial lse", ValueError, "lse_partial: got shape [3, 2, 4, 5], expected [3, 2, 5, 4] as out_partial; heads come last", lambda: combined(lse_partial=zeros(3, 2, 4, 5))),
    ("partial splits", UnsupportedError, "out_partial: num_splits: got 257, expected 1 to 256", lambda: combined(out_partial=zeros(257, 1, 1, 1, 1), lse_partial=zeros(257, 1, 1, 1))),
    ("combine out", ValueError, "out: got shape [2, 5, 4, 9], expected [2, 5, 4, 8]", lambda: combined(out=zeros(2, 5, 4, 9))),
    ("combine dtype", ValueError, "out_dtype: got torch.float16, expected torch.float32 as out; leave one out", lambda: combined(out=zeros(2, 5, 4, 8), out_dtype=torch.float16)),
    ("combine gradient", UnsupportedError, "out: got an input that requires grad", lambda: combined(out_partial=needs_grad(3, 2, 5, 4, 8), out=zeros(2, 5, 4, 8))),
    # companions
    ("merge shapes", ValueError, "out_b: got shape [1, 3, 2, 8], expected [1, 2, 2, 8] as out_a", lambda: flash_attn_ext.merge_states(zeros(1, 2, 2, 8), zeros(1, 2, 2), zeros(1, 3, 2, 8), zeros(1, 2, 3))),
    ("merge lse", ValueError, "lse_a: got shape [1, 5, 2], expected [1, 2, 5] with out_a of shape [1, 5, 2, 8]; heads come before rows", lambda: flash_attn_ext.merge_states(zeros(1, 5, 2, 8), zeros(1, 5, 2), zeros(1, 5, 2, 8), zeros(1, 2, 5))),
    ("merge rank", ValueError, "out_a: got shape [2, 8], expected [batch, seqlen, num_heads, head_dim] or [total,", lambda: flash_attn_ext.merge_states(zeros(2, 8), zeros(2), zeros(2, 8), zeros(2))),
    ("mask shape", ValueError, "attention_mask: got shape [2, 4], expected [batch, seqlen] = [2, 5] as hidden_states", lambda: unpad_input(zeros(2, 5, 3), zeros(2, 4))),
    ("unused mask", ValueError, "unused_mask: got shape [2, 4], expected [batch, seqlen] = [2, 5]", lambda: unpad_input(zeros(2, 5, 3), zeros(2, 5), zeros(2, 4))),
    ("length mask", ValueError, "attention_mask_in_length: got shape [2, 4], expected [batch, seqlen] = [2, 5]", lambda: unpad_input_for_concatenated_sequences(zeros(2, 5, 3), zeros(2, 4))),
    ("rotary x", ValueError, "x: got shape [5, 4, 8], expected [batch, seqlen, num_heads, head_dim]", lambda: rotated(x=zeros(5, 4, 8))),
    ("rotary x varlen", ValueError, "x: got shape [2, 5, 4, 8], expected [total, num_heads, head_dim] with cu_seqlens", lambda: rotated(cu_seqlens=cu_seqlens([5, 5]))),
    ("rotary cos", ValueError, "cos: got torch.float64, expected torch.float32 as x", lambda: rotated(cos=zeros(9, 4).double(), sin=zeros(9, 4).double())),
    ("rotary cos gradient", UnsupportedError, "cos: got a tensor that requires grad, expected a constant", lambda: rotated(cos=needs_grad(9, 4))),
    ("rotary length", ValueError, "cos: rows: got 4, expected at least max_seqlen = 5", lambda: rotated(cos=zeros(4, 4), sin=zeros(4, 4))),
    ("rotary offset", ValueError, "cos: rows: got 3, expected at least max_seqlen = 5", lambda: rotated(seqlen_offsets=6)),
    ("rotary offsets", ValueError, "seqlen_offsets[1]: got 5, expected 0 to 4, rows of cos less max_seqlen", lambda: rotated(seqlen_offsets=int32([0, 5]))),
    ("rotary max_seqlen", TypeError, "max_seqlen: got NoneType, expected an int", lambda: rotated(x=zeros(7, 4, 8), cu_seqlens=cu_seqlens([3, 4]))),
    ("rotary cu_seqlens", ValueError, "cu_seqlens[-1]: got 7, expected at most the 6 rows given", lambda: rotated(x=zeros(6, 4, 8), cu_seqlens=cu_seqlens([3, 4]), max_seqlen=4)),
    ("rotary in place", ValueError, "x: got stride 2 in the last dimension, expected 1; it is written in place", lambda: rotated(x=strided(2, 5, 4, 8), inplace=True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "text", "call"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_message(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(text)) as raised:
        call()
    assert raised.type is error


def test_names_are_unique() -> None:
    names = [case[0] for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rank", [3, 4])
def test_sound_inputs_are_those_that_pass_every_check(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flat test of all conditions at once against the checks that name them."""
    heads_and_dims = [(4, 8), (2, 8), (3, 8), (0, 8), (4, 0), (4, 256), (4, 257), (2, 16)]
    shapes = [(*rows, *last) for rows in ((2, 5), (1, 5)) for last in heads_and_dims]
    tensors: list[Any] = [torch.empty(shape[-rank:], device="meta") for shape in shapes]
    tensors += [torch.empty(2, 5, 4, 8)[-1 if rank == 3 else slice(None)], torch.empty(8), "q"]
    tensors += [tensors[0].to(dtype) for dtype in (torch.int32, torch.bfloat16)]
    flat = _checks.is_sound
    monkeypatch.setattr(_checks, "is_sound", lambda *arguments: False)
    num_sound = 0
    for q, k, v in itertools.product(tensors, repeat=3):
        try:
            if rank == 4:
                _checks.fixed(q, k, v)
            else:
                _checks._varlen_rows(q, k, v, None, int32([0]), None)
            passes = True
        except (TypeError, ValueError):
            passes = False
        assert flat(q, k, v, rank, rank, rank == 4) == passes, (q, k, v)
        num_sound += passes
    assert num_sound > 20


def test_sound_caches_pass_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a cache and its new keys; caches of more rows or with strides are not flat."""
    flat = _checks.is_sound
    monkeypatch.setattr(_cache_checks, "is_sound", lambda *arguments: False)
    shapes = [(2, n, *last) for n in (1, 5) for last in ((4, 8), (2, 8), (3, 8), (4, 257), (2, 16))]
    tensors: list[Any] = [torch.empty(shape, device="meta") for shape in (*shapes, (3, 5, 2, 8))]
    tensors += [torch.empty(2, 5, 4, 8), torch.empty(8), "q", None, strided(2, 5, 2, 8)]
    tensors += [tensors[0].to(dtype) for dtype in (torch.int32, torch.bfloat16)]
    num_sound, num_new = 0, 0
    for q, k, v in itertools.product(tensors, repeat=3):
        for is_paged in (False, True):
            if flat(q, k, v, 4, 4, not is_paged) and k.is_contiguous() and v.is_contiguous():
                table = torch.empty(q.shape[0], 3, dtype=torch.int32, device=q.device)
                caches = (q, k, v, table if is_paged else None)
                assert _cache_checks.cache(*caches, None, None, None) == q.shape[0]
                num_sound += 1
        if not flat(q, k, v, 4, 4, True):
            continue
        for new_k, new_v in itertools.product(tensors, repeat=2):
            is_sound = _cache_checks._is_sound_beside(q, new_k, new_v, k, v, 2)
            with monkeypatch.context() as patch:
                patch.setattr(_cache_checks, "_is_sound_beside", lambda *arguments: False)
                try:
                    _cache_checks.new_keys(q, new_k, new_v, k, v, 0, None, 2)
                    passes = True
                except (TypeError, ValueError):
                    passes = False
            assert is_sound == passes, (q, k, v, new_k, new_v)
            num_new += is_sound
    assert num_sound > 20
    assert num_new > 20


def test_cpu_gpu_mix() -> None:
    require(NEEDS_CUDA)
    with pytest.raises(ValueError, match="k: got device cuda:0, expected cpu as q"):
        fixed(k=zeros(2, 5, 2, 8).cuda())


def test_values_on_the_gpu_are_read_in_debug_mode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    require(NEEDS_CUDA)
    lengths = int32([0, 5, 4], "cuda")
    assert not _checks.values_readable(lengths)
    monkeypatch.setattr(_checks, "DEBUG", True)
    assert _checks.values_readable(lengths)
    tensors = {name: zeros(n, 2, 8).cuda() for name, n in (("q", 6), ("k", 7), ("v", 7))}
    with pytest.raises(ValueError, match=r"cu_seqlens_q\S*: got"):
        varlen(**tensors, cu_seqlens_q=lengths, cu_seqlens_k=cu_seqlens([3, 4], "cuda"))


def test_numbers_of_other_libraries() -> None:
    class Number:
        def __float__(self) -> float:
            return 0.25

    assert _checks.number("softmax_scale", Number()) == 0.25


def test_window_normalisation() -> None:
    assert _checks.window(False, None) == (-1, -1)
    assert _checks.window(False, (None, -7)) == (-1, -1)
    assert _checks.window(True, (3, 5)) == (3, 0)
    assert _checks.window(False, [3, 5]) == (3, 5)


@pytest.mark.parametrize(
    "scalars",
    [
        {},
        {"window_size": None},
        {"window_size": [-1, -1]},
        {"window_size": (None, -7)},
        {"softcap": 0, "dropout_p": False, "num_splits": False},
        {"softmax_scale": 8**-0.5},
    ],
    ids=repr,
)
@pytest.mark.parametrize("causal", [False, True])
def test_spellings_of_a_plain_call(causal: bool, scalars: dict[str, Any]) -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    plain = flash_attn_ext.flash_attn_func(q, k, v, causal=causal)
    spelled = flash_attn_ext.flash_attn_func(q, k, v, causal=causal, **scalars)
    assert torch.equal(plain, spelled)


def test_max_seqlen_as_tensor() -> None:
    assert _checks.max_seqlen("max_seqlen_q", torch.tensor(7, dtype=torch.int32)) == 7
