"""Who computes attention: flash_attn_ext and its peers, on the same tensors.

A provider is a function (problem, [q, k, v]) -> call that returns ``out`` in the layout of q. It
raises ImportError where it is not installed, and anything else where it does not take the problem;
whoever asks leaves it out then. Peers are imported at first use only.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_ext

from .problems import Call, DecodeProblem, PackedProblem, Problem

Provider = Callable[..., Call]

LABELS = {
    "ours": "flash_attn_ext",
    "ours_deterministic": "flash_attn_ext, deterministic",
    "sdpa_flash": "PyTorch, FlashAttention-2",
    "sdpa_cudnn": "PyTorch, cuDNN",
    "sdpa_efficient": "PyTorch, memory-efficient",
    "sdpa_math": "PyTorch, math",
    "torch_varlen": "PyTorch, varlen_attn",
    "flash_attn": "flash-attn 2",
    "flash_attn_3": "flash-attn 3",
    "flash_attn_4": "flash-attn 4",
    "xformers": "xFormers",
    "flex_attention": "FlexAttention",
    "flashinfer": "FlashInfer",
    "plain": "plain PyTorch",
}
"""Name of a provider -> how people call it."""


def label(name: str, device: torch.device) -> str:
    """The name of a provider for people. On the CPU PyTorch has a flash kernel of its own."""
    if device.type != "cuda":
        if name == "ours":
            return "flash_attn_ext (tiled PyTorch operations)"
        if name == "sdpa_flash":
            return "PyTorch, CPU flash kernel"
    return LABELS[name]


def peer(name: str) -> ModuleType:
    """Imports a peer; an alias of this package is none.

    Raises:
        ImportError: it is not installed, or it is ours.
    """
    module = importlib.import_module(name)
    root = importlib.import_module(name.partition(".")[0])
    if getattr(root, "__flash_attn_ext__", False):
        raise ImportError(f"{name} is flash_attn_ext's alias (flash_attn_ext.compat), not a peer")
    return module


def first(result: Any) -> Tensor:
    """``out`` of functions of which some versions return (out, lse, ...)."""
    out: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return out


def _no_window(problem: Problem, who: str) -> None:
    if problem.window != (-1, -1):
        raise RuntimeError(f"{who} has no window")


# ---- sequences of one length -------------------------------------------------------------------


def ours(problem: Problem, tensors: Sequence[Tensor], **options: Any) -> Call:
    """flash_attn_ext, whatever its plan says."""
    q, k, v = tensors
    causal, window = problem.causal, problem.window
    return lambda: flash_attn_ext.flash_attn_func(
        q, k, v, causal=causal, window_size=window, **options
    )


def sdpa(backend: SDPBackend, problem: Problem, tensors: Sequence[Tensor]) -> Call:
    """One backend of PyTorch's attention; an error where it does not take the problem."""
    _no_window(problem, "PyTorch's attention")
    q, k, v = (x.transpose(1, 2) for x in tensors)
    grouped = problem.num_heads != problem.num_heads_kv

    def call() -> Tensor:
        with sdpa_kernel(backend):
            out: Tensor = F.scaled_dot_product_attention(
                q, k, v, is_causal=problem.causal, enable_gqa=grouped
            )
        return out.transpose(1, 2)

    return call


def plain(problem: Problem, tensors: Sequence[Tensor]) -> Call:
    """PyTorch operations that store the scores."""
    group = problem.num_heads // problem.num_heads_kv
    q, k, v = (x.transpose(1, 2) for x in tensors)

    def call() -> Tensor:
        keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        scores = q @ keys.transpose(2, 3) * problem.head_dim**-0.5
        if problem.causal:
            ones = torch.ones(problem.seqlen, problem.seqlen, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(ones.triu(1), -torch.inf)
        out: Tensor = scores.softmax(-1) @ values
        return out.transpose(1, 2)

    return call


def flash_attn(module: str, problem: Problem, tensors: Sequence[Tensor]) -> Call:
    """flash-attn 2, 3 or 4."""
    function = peer(module).flash_attn_func
    q, k, v = tensors
    options: dict[str, Any] = {"causal": problem.causal}
    if problem.window != (-1, -1):
        options["window_size"] = problem.window
    return lambda: first(function(q, k, v, **options))


def _grouped(x: Tensor, num_heads_kv: int, group: int) -> Tensor:
    """[batch, tokens, heads, head_dim] with groups as xFormers has them, without a copy."""
    if x.shape[2] == num_heads_kv * group and group > 1 and x.shape[2] != num_heads_kv:
        return x.view(*x.shape[:2], num_heads_kv, group, x.shape[3])
    return x[:, :, :, None].expand(-1, -1, -1, group, -1) if group > 1 else x


def xformers(problem: Problem, tensors: Sequence[Tensor]) -> Call:
    """xFormers, whatever operator it chooses."""
    _no_window(problem, "this provider of xFormers")
    ops = peer("xformers.ops")
    group = problem.num_heads // problem.num_heads_kv
    q, k, v = (_grouped(x, problem.num_heads_kv, group) for x in tensors)
    bias = ops.LowerTriangularMask() if problem.causal else None

    def call() -> Tensor:
        out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
        return out.flatten(2, 3) if group > 1 else out

    return call


_MAX_SHAPES = 256


@functools.cache
def _compiled_flex() -> Any:
    """Compiled for each shape; ``fullgraph`` makes giving up an error, not a slow eager call."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    limits: Any = config
    limits.recompile_limit = max(limits.recompile_limit, _MAX_SHAPES)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask_mod: Any) -> Call:
    """FlexAttention, compiled, of [batch, tokens, heads, head_dim]."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask = None
    if mask_mod is not None:
        mask = create_block_mask(mask_mod, None, None, q.shape[1], k.shape[1], device=q.device.type)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flex = _compiled_flex()
    return lambda: flex(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def flex_attention(problem: Problem, tensors: Sequence[Tensor]) -> Call:
    """torch.nn.attention.flex_attention."""
    _no_window(problem, "this provider of FlexAttention")
    q, k, v = tensors
    causal = (lambda b, h, i, j: i >= j) if problem.causal else None
    return _flex(q, k, v, causal)


def _flashinfer_prefill(
    ends: Tensor, heads: tuple[int, int], head_dim: int, causal: bool, dtype: torch.dtype
) -> Any:
    module = peer("flashinfer")
    workspace = torch.empty(1 << 27, dtype=torch.uint8, device=ends.device)
    wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(ends, ends, *heads, head_dim, causal=causal, q_data_type=dtype)
    return wrapper


def _needs_no_gradient(who: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{who} has no backward")


def flashinfer(problem: Problem, tensors: Sequence[Tensor]) -> Call:
    """FlashInfer's batched prefill; it has no backward."""
    _no_window(problem, "this provider of FlashInfer")
    _needs_no_gradient("FlashInfer")
    q, k, v = (x.flatten(0, 1) for x in tensors)
    ends = torch.arange(problem.batch_size + 1, dtype=torch.int32, device=q.device) * problem.seqlen
    heads = (problem.num_heads, problem.num_heads_kv)
    wrapper = _flashinfer_prefill(ends, heads, problem.head_dim, problem.causal, q.dtype)
    return lambda: wrapper.run(q, k, v).unflatten(0, (problem.batch_size, problem.seqlen))


DENSE: dict[str, Provider] = {
    "ours": ours,
    "sdpa_flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": functools.partial(sdpa, SDPBackend.MATH),
    "flash_attn": functools.partial(flash_attn, "flash_attn"),
    "flash_attn_3": functools.partial(flash_attn, "flash_attn_interface"),
    "flash_attn_4": functools.partial(flash_attn, "flash_attn.cute"),
    "xformers": xformers,
    "flex_attention": flex_attention,
    "flashinfer": flashinfer,
    "plain": plain,
}
"""Name -> provider of a Problem."""


# ---- packed sequences --------------------------------------------------------------------------


def ours_packed(problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """flash_attn_ext."""
    q, k, v = tensors
    ends, longest = problem.cu_seqlens(q.device), max(problem.seqlens)
    return lambda: flash_attn_ext.flash_attn_varlen_func(
        q, k, v, ends, ends, longest, longest, causal=True
    )


def torch_packed(problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """PyTorch's FlashAttention-2 for packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = tensors
    ends, longest = problem.cu_seqlens(q.device), max(problem.seqlens)
    return lambda: first(varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0)))


def flash_attn_packed(module: str, problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """flash-attn 2, 3 or 4."""
    function = peer(module).flash_attn_varlen_func
    q, k, v = tensors
    ends, longest = problem.cu_seqlens(q.device), max(problem.seqlens)
    lengths: dict[str, Any] = {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
    return lambda: first(function(q, k, v, **lengths, causal=True))


def xformers_packed(problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """XFormers with a block-diagonal mask."""
    ops = peer("xformers.ops")
    mask = ops.fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(list(problem.seqlens))
    q, k, v = (x[None] for x in tensors)
    return lambda: ops.memory_efficient_attention(q, k, v, attn_bias=mask)[0]


def flex_packed(problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """FlexAttention over all tokens with a mask of sequences."""
    q, k, v = (x[None] for x in tensors)
    numbers = torch.arange(len(problem.seqlens), device=q.device)
    sequence = numbers.repeat_interleave(torch.tensor(problem.seqlens, device=q.device))
    call = _flex(q, k, v, lambda b, h, i, j: (i >= j) & (sequence[i] == sequence[j]))
    return lambda: call()[0]


def flashinfer_packed(problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """FlashInfer's batched prefill; it has no backward."""
    _needs_no_gradient("FlashInfer")
    q, k, v = tensors
    heads = (problem.num_heads, problem.num_heads)
    ends = problem.cu_seqlens(q.device)
    wrapper = _flashinfer_prefill(ends, heads, problem.head_dim, True, q.dtype)
    return lambda: first(wrapper.run(q, k, v))


def one_by_one(problem: PackedProblem, tensors: Sequence[Tensor]) -> Call:
    """PyTorch's attention, one call for each sequence."""
    q, k, v = (torch.split(x.transpose(0, 1)[None], list(problem.seqlens), 2) for x in tensors)

    def call() -> Tensor:
        parts = zip(q, k, v, strict=True)
        outs = [F.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
        return torch.cat(outs, 2)[0].transpose(0, 1)

    return call


VARLEN: dict[str, Provider] = {
    "ours": ours_packed,
    "torch_varlen": torch_packed,
    "flash_attn": functools.partial(flash_attn_packed, "flash_attn"),
    "flash_attn_3": functools.partial(flash_attn_packed, "flash_attn_interface"),
    "flash_attn_4": functools.partial(flash_attn_packed, "flash_attn.cute"),
    "xformers": xformers_packed,
    "flex_attention": flex_packed,
    "flashinfer": flashinfer_packed,
    "sdpa_loop": one_by_one,
}
"""Name -> provider of a PackedProblem."""
LABELS["sdpa_loop"] = "PyTorch, a call for each sequence"


# ---- one query against a cache -----------------------------------------------------------------


def _lengths(problem: DecodeProblem, device: torch.device) -> Tensor:
    return torch.full((problem.batch_size,), problem.seqlen_k, dtype=torch.int32, device=device)


def ours_decode(problem: DecodeProblem, tensors: Sequence[Tensor]) -> Call:
    """flash_attn_ext."""
    q, k, v = tensors
    lengths = _lengths(problem, q.device)
    return lambda: flash_attn_ext.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, causal=True
    )


def sdpa_decode(backend: SDPBackend, problem: DecodeProblem, tensors: Sequence[Tensor]) -> Call:
    """One backend of PyTorch's attention over the whole cache."""
    sizes = (problem.num_heads, problem.num_heads_kv, problem.head_dim)
    return sdpa(backend, Problem(problem.batch_size, problem.seqlen_k, *sizes), tensors)


def flash_attn_decode(module: str, problem: DecodeProblem, tensors: Sequence[Tensor]) -> Call:
    """flash-attn 2 or 3."""
    function = peer(module).flash_attn_with_kvcache
    q, k, v = tensors
    lengths = _lengths(problem, q.device)
    return lambda: first(function(q, k, v, cache_seqlens=lengths, causal=True))


def xformers_decode(problem: DecodeProblem, tensors: Sequence[Tensor]) -> Call:
    """xFormers, whatever operator it chooses."""
    sizes = (problem.num_heads, problem.num_heads_kv, problem.head_dim)
    return xformers(Problem(problem.batch_size, problem.seqlen_k, *sizes), tensors)


def flex_decode(problem: DecodeProblem, tensors: Sequence[Tensor]) -> Call:
    """FlexAttention, which has a kernel for few queries."""
    q, k, v = tensors
    return _flex(q, k, v, None)


_PAGE_SIZE = 16


def flashinfer_decode(problem: DecodeProblem, tensors: Sequence[Tensor]) -> Call:
    """FlashInfer's decode; the cache is seen as pages of 16 in order."""
    if problem.seqlen_k % _PAGE_SIZE:
        raise ValueError(f"seqlen_k={problem.seqlen_k}: expected a multiple of {_PAGE_SIZE}")
    module = peer("flashinfer")
    q, k, v = tensors
    pages = problem.seqlen_k // _PAGE_SIZE
    cache = tuple(x.view(-1, _PAGE_SIZE, *x.shape[2:]) for x in (k, v))
    new: dict[str, Any] = {"dtype": torch.int32, "device": q.device}
    workspace = torch.empty(1 << 27, dtype=torch.uint8, device=q.device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        torch.arange(problem.batch_size + 1, **new) * pages,
        torch.arange(problem.batch_size * pages, **new),
        torch.full((problem.batch_size,), _PAGE_SIZE, **new),
        problem.num_heads,
        problem.num_heads_kv,
        problem.head_dim,
        _PAGE_SIZE,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return lambda: wrapper.run(q[:, 0], cache)[:, None]


DECODE: dict[str, Provider] = {
    "ours": ours_decode,
    "sdpa_flash": functools.partial(sdpa_decode, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": functools.partial(sdpa_decode, SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": functools.partial(sdpa_decode, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": functools.partial(sdpa_decode, SDPBackend.MATH),
    "flash_attn": functools.partial(flash_attn_decode, "flash_attn"),
    "flash_attn_3": functools.partial(flash_attn_decode, "flash_attn_interface"),
    "xformers": xformers_decode,
    "flex_attention": flex_decode,
    "flashinfer": flashinfer_decode,
}
"""Name -> provider of a DecodeProblem."""

NAMES = tuple(dict.fromkeys(itertools.chain(DENSE, VARLEN, DECODE)))
"""Every provider."""
