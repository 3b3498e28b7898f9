"""vLLM on these kernels: ``vllm serve MODEL --attention-backend FLASH_ATTN_EXT``.

vLLM loads the entry point ``vllm.general_plugins`` of an installed flash_attn_ext in each of its
processes; `plugin` then gives the backend a name there and changes nothing else. The backend itself
is `_vllm_backend`, which vLLM imports when it is chosen: a subclass of vLLM's own FlashAttention
backend, whose batches (query_start_loc, seq_lens, block_table, slot_mapping), cache layout and
cache writes it keeps. What is computed here is attention, in `attend_batch` and what it calls,
which know nothing of vLLM.
"""

from __future__ import annotations

import importlib
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from ..attention import flash_attn_varlen_func
from ..errors import UnsupportedError
from ._vllm_prompts import Prompts

NAME = "FLASH_ATTN_EXT"
"""What ``--attention-backend`` may be where vLLM lets a backend have a name of its own."""

UNNAMED = "CUSTOM"
"""What it has to be in older versions, which have one name for all backends from outside."""

_OLDEST = (0, 26)
"""The first version known to keep keys and values of a position beside each other."""

_BACKEND = "flash_attn_ext.integrations._vllm_backend.FlashAttnExtBackend"


def register() -> str:
    """Makes the backend known to vLLM, which is imported for it; again is harmless.

    Returns:
        The name for ``--attention-backend``.

    Raises:
        ImportError: vLLM is not installed.
        UnsupportedError: this version of vLLM is too old or has not what is needed.
    """
    package: Any = importlib.import_module("vllm")
    version = str(getattr(package, "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)  # builds from sources may have no number
    try:
        if numbers is not None and (int(numbers[1]), int(numbers[2])) < _OLDEST:
            raise AttributeError("a cache with another layout")
        registry: Any = importlib.import_module("vllm.v1.attention.backends.registry")
        names = registry.AttentionBackendEnum
        if hasattr(names, "register"):
            member = names.__members__.get(NAME) or names.register(NAME, _BACKEND)
        else:
            member = names.CUSTOM
        registry.register_backend(member, _BACKEND)
    except (AttributeError, ModuleNotFoundError) as error:
        oldest = ".".join(map(str, _OLDEST))
        raise UnsupportedError(
            f"vllm: got version {version or 'unknown'}, expected >= {oldest}; pip install -U vllm",
            [str(error)],
        ) from error
    return str(member.name)


def plugin() -> None:
    """The entry point: `register`, with a warning in place of an error.

    vLLM does not start if this raises, also where another backend is asked for.
    """
    try:
        register()
    except Exception as error:
        warnings.warn(f"flash_attn_ext: no attention backend for vLLM: {error}", stacklevel=2)


def split_cache(kv_cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of vLLM's cache as pages.

    Args:
        kv_cache: [num_pages, num_heads_kv, page_size, 2 * head_dim], any order in memory that has
            the last dimension contiguous.
        head_dim: of keys and of values.

    Returns:
        Two views [num_pages, page_size, num_heads_kv, head_dim].

    Raises:
        UnsupportedError: another layout.
    """
    if kv_cache.dim() != 4 or kv_cache.shape[-1] != 2 * head_dim:
        raise UnsupportedError(
            f"kv_cache: got shape {list(kv_cache.shape)}, expected [num_pages, num_heads_kv, "
            f"page_size, {2 * head_dim}]; this version of vLLM has another layout, use "
            "--attention-backend FLASH_ATTN"
        )
    k, v = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return k, v


def window_of(sliding_window: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    """The window of a layer for this batch: in both directions where attention is not causal."""
    if sliding_window is None:
        return -1, -1
    left, right = sliding_window
    return (left, left) if left >= 0 and right == 0 and not causal else (left, right)


def attend_pages(
    query: Tensor,
    kv_cache: Tensor,
    output: Tensor,
    *,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    max_query_len: int,
    softmax_scale: float,
    causal: bool = True,
    sliding_window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a batch of vLLM's, prompts and single tokens mixed, to its cache.

    The keys of the new tokens are in the cache already.

    Args:
        query: [num_tokens, num_heads_q, head_dim].
        kv_cache: see `split_cache`.
        output: as query, written and returned.
        query_start_loc: int32 [num_reqs + 1], the first token of each request.
        seq_lens: int32 [num_reqs], keys of each request, the new ones included.
        block_table: int32 [num_reqs, max_pages].
        max_query_len: the largest number of new tokens of a request or more.
        softmax_scale: see flash_attn_func.
        causal: see flash_attn_func.
        sliding_window: (left, right) as flash_attn_func's; see `window_of`.
        softcap: see flash_attn_func.
        alibi_slopes: see flash_attn_func.
        sinks: [num_heads_q], flash_attn_func's s_aux.

    Returns:
        output.
    """
    k, v = split_cache(kv_cache, query.shape[-1])
    with torch.no_grad():
        out: Tensor = flash_attn_varlen_func(
            query,
            k,
            v,
            query_start_loc,
            None,
            max_query_len,
            block_table.shape[1] * k.shape[1],
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_of(sliding_window, causal),
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            block_table=block_table,
            seqused_k=seq_lens,
            s_aux=sinks,
            out=output,
        )
    return out


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    *,
    query_start_loc: Tensor,
    max_query_len: int,
    softmax_scale: float,
    causal: bool = False,
    sliding_window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of each request to itself, without the cache: encoders, and whole prompts.

    Args:
        query: [num_tokens, num_heads_q, head_dim].
        key: [num_tokens, num_heads_kv, head_dim].
        value: [num_tokens, num_heads_kv, head_dim].
        output: as query, written and returned.
        query_start_loc: int32 [num_reqs + 1].
        max_query_len: the longest request or more.
        softmax_scale: see flash_attn_func.
        causal: see flash_attn_func.
        sliding_window: as in `attend_pages`.
        softcap: see flash_attn_func.
        alibi_slopes: see flash_attn_func.
        sinks: as in `attend_pages`.

    Returns:
        output.
    """
    with torch.no_grad():
        out: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            query_start_loc,
            query_start_loc,
            max_query_len,
            max_query_len,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_of(sliding_window, causal),
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            s_aux=sinks,
            out=output,
        )
    return out


def attend_batch(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    kv_cache: Tensor,
    output: Tensor,
    prompts: Prompts | None,
    *,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    max_query_len: int,
    causal: bool = True,
    **options: Any,
) -> Tensor:
    """Attention of a decoder's batch: whole prompts to the new keys, all others to the cache.

    Args:
        query: [num_tokens, num_heads_q, head_dim].
        key: [num_tokens, num_heads_kv, head_dim], the new keys; read for prompts only.
        value: as key.
        kv_cache: see `split_cache`.
        output: as query, written and returned.
        prompts: the whole prompts with which the batch ends; see `prompts_at_end`.
        query_start_loc: as in `attend_pages`.
        seq_lens: as in `attend_pages`.
        block_table: as in `attend_pages`.
        max_query_len: as in `attend_pages`.
        causal: see flash_attn_func.
        options: softmax_scale and what else `attend_pages` takes.

    Returns:
        output.
    """
    num_reqs, num_tokens = len(seq_lens), len(query)
    if prompts is not None and key is not None and value is not None:
        num_reqs, num_tokens = prompts.first, prompts.first_token
        max_query_len = prompts.max_query_len_before
        attend_packed(
            *(x[num_tokens:] for x in (query, key, value, output)),
            query_start_loc=prompts.query_start_loc,
            max_query_len=prompts.max_query_len,
            causal=causal,
            **options,
        )
    if num_reqs > 0:
        attend_pages(
            query[:num_tokens],
            kv_cache,
            output[:num_tokens],
            query_start_loc=query_start_loc[: num_reqs + 1],
            seq_lens=seq_lens[:num_reqs],
            block_table=block_table[:num_reqs],
            max_query_len=max_query_len,
            causal=causal,
            **options,
        )
    return output
