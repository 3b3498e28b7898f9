"""SGLang's calls on these kernels: plain tensors, and its own classes where it is installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    assert_close_2x,
    assert_equals,
    cu_seqlens,
    int32,
    needs_module,
    poisoned_empty,
    randn,
    require,
)
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext.integrations import sglang as integration
from flash_attn_ext.reference import varlen_attention_reference

NEEDS_SGLANG = needs_module("sglang")
HEADS, HEADS_KV, HEAD_DIM = 4, 2, 16
DTYPES = {"cpu": torch.float64, "cuda": torch.bfloat16}


def tensors(lengths_q: list[int], lengths_k: list[int], device: str) -> tuple[Tensor, ...]:
    dtype = DTYPES[device]
    q = randn(sum(lengths_q), HEADS, HEAD_DIM, dtype=dtype, device=device)
    k, v = (randn(sum(lengths_k), HEADS_KV, HEAD_DIM, dtype=dtype, device=device) for _ in "kv")
    return q, k, v


def paged(
    x: Tensor, lengths: list[int], page_size: int, pages: list[int]
) -> tuple[Tensor, list[list[int]]]:
    """The rows of each sequence in its pages, NaN elsewhere; and the table's rows."""
    cache = poisoned_empty((len(pages), page_size, *x.shape[1:]), x)
    rows, begin, taken = [], 0, 0
    for length in lengths:
        count = -(-length // page_size)
        rows.append(pages[taken : taken + count])
        for j in range(length):
            cache[rows[-1][j // page_size], j % page_size] = x[begin + j]
        begin, taken = begin + length, taken + count
    return cache, rows


def expected(
    parts: tuple[Tensor, ...],
    lengths: tuple[list[int], list[int]],
    sinks: Tensor | None = None,
    upcast: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double() for x in parts) if upcast else parts
    starts = (cu_seqlens(x).tolist() for x in lengths)
    out, lse = varlen_attention_reference(q, k, v, *starts, upcast=upcast, **options)
    if sinks is not None:
        share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
        out = (out * share.T[..., None].to(out.dtype)).to(out.dtype)
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out, lse


def check(out: Tensor, device: str, *arguments: Any, **options: Any) -> None:
    exact = expected(*arguments, **options)[0]
    if device == "cpu":
        assert_equals(out, exact, 1e-10)
    else:
        assert_close_2x(out, exact, expected(*arguments, upcast=False, **options)[0])


def options_of(name: str, device: str) -> dict[str, Any]:
    return {
        "causal": {"causal": True},
        "window": {"causal": True, "window_size": (5, 0)},
        "softcap": {"causal": True, "softcap": 2.0},
        "sinks": {"causal": True, "sinks": randn(HEADS, dtype=torch.float32, device=device)},
        "all keys": {},
    }[name]


OPTIONS = ["causal", "window", "softcap", "sinks", "all keys"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    "lengths", [([1, 1, 1], [5, 40, 17]), ([7, 20, 1], [31, 20, 9])], ids=["decode", "extend"]
)
def test_cache(
    lengths: tuple[list[int], list[int]], page_size: int, options: str, device: str
) -> None:
    given = options_of(options, device)
    parts = q, k, v = tensors(*lengths, device)
    pages = torch.randperm(sum(-(-n // page_size) for n in lengths[1]) + 2).tolist()
    (k_cache, rows), (v_cache, _) = (paged(x, lengths[1], page_size, pages) for x in (k, v))
    width = max(map(len, rows)) + 1
    table = int32([[*row, *[-7] * (width - len(row))] for row in rows], device)  # type: ignore[arg-type]
    arguments = {
        "page_table": table,
        "cache_seqlens": int32(lengths[1], device),
        "cu_seqlens_q": cu_seqlens(lengths[0], device),
        "cu_seqlens_k_new": cu_seqlens(lengths[1], device),
        "max_seqlen_q": max(lengths[0]),
        "softmax_scale": 0.3,
        "ver": 3,
        "num_splits": 0,
        "scheduler_metadata": None,
        "only_qv": False,
        "score_mod": None,
    } | given
    out = integration.attend_cache(q, k_cache, v_cache, **arguments)
    check(out, device, parts, lengths, softmax_scale=0.3, **given)
    buffer = poisoned_empty(q.shape, q)
    result, lse = integration.attend_cache(
        q, k_cache, v_cache, **arguments, out=buffer, return_softmax_lse=True
    )
    assert result is buffer
    assert torch.equal(result, out)
    exact = expected(parts, lengths, softmax_scale=0.3, **given)[1]
    assert_equals(lse, exact, 1e-10 if device == "cpu" else 1e-2, "lse")


@pytest.mark.parametrize("options", OPTIONS)
def test_without_cache(options: str, device: str) -> None:
    given = options_of(options, device)
    lengths = ([9, 1, 20],) * 2
    parts = tensors(*lengths, device)
    starts = cu_seqlens(lengths[0], device)
    out = integration.attend_packed(
        *parts,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=20,
        max_seqlen_k=20,
        num_splits=1,
        softmax_scale=0.3,
        out=poisoned_empty(parts[0].shape, parts[0]),
        **given,
    )
    check(out, device, parts, lengths, softmax_scale=0.3, **given)


@pytest.mark.parametrize("name", ["qv", "k_descale", "mask_mod", "rel_bias", "attention_chunk"])
@pytest.mark.parametrize("function", ["attend_cache", "attend_packed"])
def test_what_changes_the_result_is_refused(function: str, name: str) -> None:
    call = getattr(integration, function)
    needed = [
        p.name
        for p in inspect.signature(call).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    with pytest.raises(fa.UnsupportedError, match=f"{name}: got int, expected None with"):
        call(**dict.fromkeys(needed), **{name: 3})


@pytest.mark.parametrize(
    ("latent", "dtype", "text"),
    [
        (True, torch.bfloat16, "with a model of latent attention"),
        (False, torch.float8_e4m3fn, "--kv-cache-dtype: got torch.float8_e4m3fn, expected"),
    ],
)
def test_refused_before_a_server_starts(latent: bool, dtype: torch.dtype, text: str) -> None:
    runner = SimpleNamespace(use_mla_backend=latent, kv_cache_dtype=dtype)
    with pytest.raises(fa.UnsupportedError, match=text):
        integration.create_backend(runner)


def test_without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sglang", None)
    with pytest.raises(ImportError):
        integration.register()
    with pytest.warns(UserWarning, match="no attention backend for SGLang"):
        integration.plugin()


# ---- with SGLang ---------------------------------------------------------------------------------


def test_registered() -> None:
    require(NEEDS_SGLANG)
    integration.register()
    integration.register()
    choices = importlib.import_module("sglang.srt.arg_groups.choices").ATTENTION_BACKEND_CHOICES
    assert choices.count(integration.NAME) == 1
    registry = importlib.import_module("sglang.srt.layers.attention.attention_registry")
    assert registry.ATTENTION_BACKENDS[integration.NAME] is integration.create_backend


def calls_in(method: Any) -> list[tuple[str, set[str]]]:
    """Name and keywords of each call of one of flash-attn's functions in a method's source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("flash_attn_with_kvcache", "flash_attn_varlen_func"):
                found.append((name, {x.arg for x in node.keywords if x.arg}))
    return found


def test_methods_of_the_class() -> None:
    """Every call of flash-attn in SGLang's class ends in ours, with keywords that ours take."""
    require(NEEDS_SGLANG)
    module = importlib.import_module(integration._BACKEND)
    ours = integration.backend_class()
    base = module.FlashAttentionBackend
    assert issubclass(ours, base)
    functions = {
        "flash_attn_with_kvcache": integration.attend_cache,
        "flash_attn_varlen_func": integration.attend_packed,
    }
    num_calls = 0
    for name in ("forward_extend", "forward_decode"):
        scope = getattr(ours, name).__globals__
        assert all(scope[x] is function for x, function in functions.items())
        assert getattr(base, name).__globals__ is vars(module)
        for function, keywords in calls_in(getattr(base, name)):
            num_calls += 1
            known = set(inspect.signature(functions[function]).parameters)
            # Those of latent attention, which is refused before.
            assert keywords - known <= {"qv", "k_descale", "v_descale"}, (name, function)
    assert num_calls >= 10
    assert module.flash_attn_with_kvcache is not integration.attend_cache
