"""SGLang on these kernels: ``sglang.launch_server --attention-backend flash_attn_ext``.

SGLang loads the entry point ``sglang.srt.plugins`` of an installed flash_attn_ext in each of its
processes; `plugin` then adds a name to its choices and changes nothing else. The backend is
SGLang's own for flash-attn 3, as a subclass whose methods call `attend_cache` and `attend_packed`
where they called flash-attn 3: batches, page tables, windows, CUDA graphs and cache writes stay
SGLang's.

What flash-attn 3 is not asked for there (another mask, a bias, a quantised cache, latent attention)
is refused with `UnsupportedError`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionResult, WindowSize, flash_attn_varlen_func
from ..errors import UnsupportedError

NAME = "flash_attn_ext"
"""What ``--attention-backend`` may be."""

_OLDEST = "0.5.23"
_BACKEND = "sglang.srt.layers.attention.flashattention_backend"
_CACHE_DTYPES = (torch.float16, torch.bfloat16)


def register() -> None:
    """Makes the backend known to SGLang, which is imported for it; again is harmless.

    Raises:
        ImportError: SGLang is not installed.
        UnsupportedError: this version of SGLang has not what is needed.
    """
    package: Any = importlib.import_module("sglang")
    try:
        choices: Any = importlib.import_module("sglang.srt.arg_groups.choices")
        registry: Any = importlib.import_module("sglang.srt.layers.attention.attention_registry")
        registry.register_attention_backend(NAME)(create_backend)
        if NAME not in choices.ATTENTION_BACKEND_CHOICES:
            choices.add_attention_backend_choices([NAME])
    except (AttributeError, ModuleNotFoundError) as error:
        raise UnsupportedError(
            f"sglang: got version {getattr(package, '__version__', 'unknown')}, expected one like "
            f"{_OLDEST}; pip install -U sglang",
            [str(error)],
        ) from error


def plugin() -> None:
    """The entry point: `register`, with a warning in place of an error."""
    try:
        register()
    except Exception as error:
        warnings.warn(f"flash_attn_ext: no attention backend for SGLang: {error}", stacklevel=2)


def create_backend(runner: Any) -> Any:
    """The backend of one of SGLang's model runners.

    Args:
        runner: SGLang's ModelRunner.

    Raises:
        UnsupportedError: latent attention (MLA) or a quantised cache.
    """
    if runner.use_mla_backend:
        raise UnsupportedError(
            f"--attention-backend: got {NAME!r} with a model of latent attention, expected one "
            "with keys and values; use 'fa3' or 'flashmla'"
        )
    if runner.kv_cache_dtype not in _CACHE_DTYPES:
        raise UnsupportedError(
            f"--kv-cache-dtype: got {runner.kv_cache_dtype}, expected torch.float16 or "
            f"torch.bfloat16 with --attention-backend {NAME}"
        )
    return backend_class()(runner)


@functools.cache
def backend_class() -> Any:
    """SGLang's FlashAttentionBackend with our functions in place of flash-attn 3's."""
    module: Any = importlib.import_module(_BACKEND)
    ours = {"flash_attn_with_kvcache": attend_cache, "flash_attn_varlen_func": attend_packed}
    missing = [name for name in ours if not hasattr(module, name)]
    if missing:
        raise UnsupportedError(f"{_BACKEND}: got no {', '.join(missing)}, expected flash-attn 3's")
    base = module.FlashAttentionBackend
    methods = {
        name: _seeing(ours, method)
        for name, method in vars(base).items()
        if isinstance(method, FunctionType) and name != "__init__" and _names(method.__code__, ours)
    }

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        for name, function in ours.items():
            setattr(self, name, function)
        self._get_scheduler_metadata = None  # would be computed for flash-attn 3

    return type("FlashAttnExtBackend", (base,), {"__init__": init, **methods})


def _names(code: CodeType, names: Any) -> bool:
    """Whether a function, or one inside it, looks one of the names up."""
    inner = (x for x in code.co_consts if isinstance(x, CodeType))
    return not set(names).isdisjoint(code.co_names) or any(_names(x, names) for x in inner)


def _seeing(functions: dict[str, Any], method: FunctionType) -> FunctionType:
    """The method with other global functions. Its module and other users of it are not changed."""
    copy = FunctionType(
        method.__code__,
        {**method.__globals__, **functions},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


def _refuse(given: dict[str, Any]) -> None:
    """Arguments that would change the result and that nothing here computes."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UnsupportedError(
                f"{name}: got {type(value).__name__}, expected None with --attention-backend "
                f"{NAME}; use 'fa3' or 'triton'"
            )


def attend_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    page_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    max_seqlen_k: int | None = None,
    ver: int = 3,
    **others: Any,
) -> AttentionResult:
    """Attention of SGLang's batch to its cache, which holds the keys of the new tokens already.

    Args:
        q: [num_tokens, num_heads_q, head_dim].
        k_cache: [num_pages, page_size, num_heads_kv, head_dim].
        v_cache: [num_pages, page_size, num_heads_kv, head_dim_v].
        page_table: int32 [batch, max_pages].
        cache_seqlens: int32 [batch], keys of each request, the new ones included.
        cu_seqlens_q: int32 [batch + 1].
        max_seqlen_q: the largest number of new tokens of a request or more.
        softmax_scale: see flash_attn_func.
        causal: see flash_attn_func.
        window_size: see flash_attn_func.
        softcap: see flash_attn_func; None = 0.
        num_splits: see flash_attn_func.
        return_softmax_lse: see flash_attn_func.
        sinks: [num_heads_q], flash_attn_func's s_aux.
        out: as q with head_dim_v, written and returned.
        cu_seqlens_k_new: not read; SGLang writes the cache itself.
        scheduler_metadata: not read.
        max_seqlen_k: not read; the page table bounds it.
        ver: not read; the version of flash-attn.
        others: must be None or False.

    Returns:
        out [num_tokens, num_heads_q, head_dim_v], or (out, lse [num_heads_q, num_tokens]).

    Raises:
        UnsupportedError: another argument has a value.
    """
    _refuse(others)
    with torch.no_grad():
        return flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q,
            None,
            max_seqlen_q,
            page_table.shape[1] * k_cache.shape[1],
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap or 0.0,
            block_table=page_table,
            seqused_k=cache_seqlens,
            s_aux=sinks,
            num_splits=num_splits,
            return_softmax_lse=return_softmax_lse,
            out=out,
        )


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    ver: int = 3,
    **others: Any,
) -> AttentionResult:
    """flash_attn_varlen_func with SGLang's keywords, for models that embed and keep no cache.

    Args:
        q: [total_q, num_heads_q, head_dim].
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: see flash_attn_varlen_func.
        cu_seqlens_k: see flash_attn_varlen_func.
        max_seqlen_q: see flash_attn_varlen_func.
        max_seqlen_k: see flash_attn_varlen_func.
        softmax_scale: see flash_attn_func.
        causal: see flash_attn_func.
        window_size: see flash_attn_func.
        softcap: see flash_attn_func; None = 0.
        num_splits: not read; these kernels do not split.
        return_softmax_lse: see flash_attn_func.
        sinks: as in `attend_cache`.
        out: see flash_attn_varlen_func.
        ver: not read.
        others: must be None or False.

    Returns:
        As flash_attn_varlen_func.

    Raises:
        UnsupportedError: another argument has a value.
    """
    _refuse(others)
    with torch.no_grad():
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap or 0.0,
            s_aux=sinks,
            return_softmax_lse=return_softmax_lse,
            out=out,
        )
