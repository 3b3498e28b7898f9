"""FlashAttention for any device: the functions of flash-attn 2 and 3, and what belongs to them.

    >>> from flash_attn_ext import flash_attn_func
    >>> out = flash_attn_func(q, k, v, causal=True)

Importing makes no CUDA call and needs no GPU, no CUDA toolkit and no compiled library: what no
kernel computes is computed by PyTorch operations with the same results, in memory that grows
linearly with the length. ``python -m flash_attn_ext info`` says what is used where.
"""

from __future__ import annotations

from flash_attn_ext import _installed

if not _installed.redirect(__name__):
    import importlib
    import os
    from typing import Any

    from flash_attn_ext import _flops, _load
    from flash_attn_ext._version import __version__
    from flash_attn_ext.attention import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from flash_attn_ext.errors import FallbackWarning, UnsupportedError
    from flash_attn_ext.integrations import transformers as _transformers
    from flash_attn_ext.kvcache import (
        flash_attn_combine,
        flash_attn_with_kvcache,
        get_scheduler_metadata,
    )
    from flash_attn_ext.merge import merge_states

    _load.load()
    _flops.register()
    _transformers.register_when_imported()
    if os.environ.get("FLASH_ATTN_EXT_SDPA", "0") not in ("", "0"):
        importlib.import_module("flash_attn_ext.integrations.sdpa").activate()

    _LAZY = {
        "AttentionShape": "flash_attn_ext.memory",
        "estimate_memory": "flash_attn_ext.memory",
        "explain": "flash_attn_ext.plans",
        "max_seqlen": "flash_attn_ext.memory",
    }
    """Public name -> the module that has it, imported at first use."""

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)

    __all__ = [
        "AttentionShape",
        "FallbackWarning",
        "UnsupportedError",
        "__version__",
        "estimate_memory",
        "explain",
        "flash_attn_combine",
        "flash_attn_func",
        "flash_attn_kvpacked_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_attn_with_kvcache",
        "get_scheduler_metadata",
        "max_seqlen",
        "merge_states",
    ]
