"""Multi-head attention; flash-attn's functions too, which some take from here."""

from flash_attn_ext import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn_ext.layers.mha import (
    MHA,
    FlashCrossAttention,
    FlashSelfAttention,
    get_alibi_slopes,
)

__all__ = [
    "MHA",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_alibi_slopes",
]
