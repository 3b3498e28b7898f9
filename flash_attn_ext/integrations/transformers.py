"""Hugging Face transformers on these kernels: ``attn_implementation="flash_attn_ext"``.

    >>> import flash_attn_ext
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flash_attn_ext")

Importing flash_attn_ext is enough, before or after transformers, and does not import it: `register`
runs as soon as both are there. Versions 4.57 and 5.x are known; what differs between them is asked
of the functions themselves.

transformers' own flash attention code does the work around the kernels, so that padding, packed
sequences (``position_ids`` that restart, or ``cu_seq_lens_q`` ... from a collator), sliding
windows, softcap, static and dynamic caches and continuous batching behave as with
``flash_attention_2``; attention sinks, which that refuses, are computed. It takes four entries:

1. ``_lazy_imports``, which resolves a name that contains "flash" to functions, is wrapped: ours for
   our names, the original for all others;
2. `attention_forward` in ``AttentionInterface``, under each of our names;
3. transformers' ``flash_attention_mask`` in ``AttentionMaskInterface``. Without it every mask would
   be dropped, silently;
4. the check of ``attn_implementation``, which replaces what a model does not list, is wrapped.

``flash_attn_ext2`` is another name for the same. It ends in a digit, which transformers asks for
before it decodes in pages with continuous batching.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._after_import import after_import
from ..errors import UnsupportedError

NAME = "flash_attn_ext"
NAMES = (NAME, "flash_attn_ext2")
"""What ``attn_implementation`` may be."""

_READY = "transformers.modeling_utils"
"""The module after whose import `register` can run."""

_PAGED = "paged|"
"""Before a name: attention of continuous batching."""

_WITH_SINKS = frozenset({"flash_attention_4", "kernels-community/vllm-flash-attn3"})
"""Implementations that a model with attention sinks lists, because they compute them."""

_OLDEST = "4.57"


def register() -> None:
    """Makes our names known to transformers, which is imported for it; again is harmless.

    Raises:
        ImportError: transformers is not installed.
        UnsupportedError: this version of transformers has not what is needed.
    """
    try:
        flash: Any = importlib.import_module("transformers.modeling_flash_attention_utils")
        modeling = importlib.import_module(_READY)
        masking = importlib.import_module("transformers.masking_utils")
        forward = importlib.import_module("transformers.integrations.flash_attention")
        parts = (
            flash._lazy_imports,
            forward.flash_attention_forward,
            modeling.AttentionInterface.register,
            masking.AttentionMaskInterface.register,
            masking.flash_attention_mask,
        )
    except (AttributeError, ModuleNotFoundError) as error:
        found = sys.modules.get("transformers")
        if found is None:
            raise
        raise UnsupportedError(
            f"transformers: got version {getattr(found, '__version__', 'unknown')}, expected >= "
            f"{_OLDEST}; pip install -U transformers",
            [str(error)],
        ) from error
    resolve, attend, register_attention, register_mask, mask = parts
    if not hasattr(resolve, "__wrapped__"):
        flash._lazy_imports = _resolving_ours(resolve)
    model = modeling.PreTrainedModel
    check = getattr(model, "_check_and_adjust_attn_implementation", None)
    if check is not None and not hasattr(check, "__wrapped__"):
        model._check_and_adjust_attn_implementation = _accepting_ours(check)
    for name in NAMES:
        register_attention(name, functools.partial(attention_forward, attend, flash))
        register_mask(name, mask)
    # Early versions 5 have entries of their own for continuous batching.
    paged = modeling.AttentionInterface._global_mapping.get(f"{_PAGED}flash_attention_2")
    if paged is not None:
        for name in NAMES:
            register_attention(_PAGED + name, paged)


def _resolving_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_lazy_imports`` that knows our names, with a result of the same length."""
    # 4.57: dense, varlen, pad, unpad. 5.x: with the cache function in the middle.
    with_cache = "flash_attn_with_kvcache" in original.__code__.co_varnames

    @functools.wraps(original)
    def resolve(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation is None or implementation.removeprefix(_PAGED) not in NAMES:
            return original(implementation, *args, **kwargs)
        from .. import attention, bert_padding, kvcache

        dense, varlen = attention.flash_attn_func, attention.flash_attn_varlen_func
        cache = (kvcache.flash_attn_with_kvcache,) if with_cache else ()
        return dense, varlen, *cache, bert_padding.pad_input, bert_padding.unpad_input

    return resolve


def _accepting_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """The check of a model's ``attn_implementation``, which some models have a list for.

    A name that is not in the list is replaced by the first one that is. Where that is for attention
    sinks, ours belong there.
    """

    @functools.wraps(original)
    def check(model: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        listed = getattr(model, "_compatible_flash_implementations", None) or ()
        if (attn_implementation or "").removeprefix(_PAGED) in NAMES and not _WITH_SINKS.isdisjoint(
            listed
        ):
            paged = (_PAGED + name for name in NAMES)
            model._compatible_flash_implementations = [*listed, *NAMES, *paged]
        return original(model, attn_implementation, *args, **kwargs)

    return check


def attention_forward(
    attend: Callable[..., Any],
    flash: Any,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention layers call.

    Args:
        attend: transformers' ``flash_attention_forward``.
        flash: its module ``modeling_flash_attention_utils``.
        module: the layer.
        query: [batch, num_heads_q, seqlen_q, head_dim].
        key: [batch, num_heads_kv, seqlen_k, head_dim].
        value: [batch, num_heads_kv, seqlen_k, head_dim_v].
        attention_mask: [batch, seqlen_k], True = valid token; None = all.
        kwargs: scaling, dropout, sliding_window, softcap, is_causal, position_ids, s_aux ...

    Returns:
        ([batch, seqlen_q, num_heads_q, head_dim_v], None).

    Raises:
        UnsupportedError: a mask of scores, [batch, heads, seqlen_q, seqlen_k].
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedError(
            f"attention_mask: got shape {list(attention_mask.shape)}, expected [batch, seqlen_k] "
            f"with attn_implementation={NAME!r}; for a mask of your own use 'sdpa', 'eager' or "
            "'flex_attention'"
        )
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError(
            f"position_bias: got a tensor, expected None with attn_implementation={NAME!r}; use "
            "'sdpa' or 'eager'"
        )
    _load_ours(flash, module)
    result: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **kwargs)
    return result


def _load_ours(flash: Any, module: torch.nn.Module) -> None:
    """Version 4 keeps the functions that it loaded first, whatever name is asked for later."""
    from ..attention import flash_attn_varlen_func

    if hasattr(flash, "_loaded_implementation"):  # version 5 looks at the name
        return
    if flash._flash_varlen_fn is not flash_attn_varlen_func:
        name = module.config._attn_implementation  # type: ignore[union-attr]
        flash.lazy_import_flash_attention(name, force_import=True)


def _register_or_warn() -> None:
    """Somebody else's import must not fail because of us."""
    try:
        register()
    except Exception as error:
        warnings.warn(
            f"flash_attn_ext: attn_implementation={NAME!r} is not available: {error}",
            stacklevel=2,
        )


def register_when_imported() -> None:
    """Runs `register` now if transformers' models are imported already, else when they are."""
    after_import(_READY, _register_or_warn)
