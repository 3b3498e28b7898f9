"""Padded batches to packed ones and back."""

from typing import Any

from flash_attn_ext.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def __getattr__(name: str) -> Any:
    """``rearrange`` and ``repeat``, which flash-attn imports here and others take from here."""
    if name in ("rearrange", "repeat"):
        try:
            import einops
        except ImportError as error:
            raise ImportError(
                f"flash_attn.bert_padding.{name}: needs einops, as flash-attn does; "
                "pip install einops"
            ) from error
        return getattr(einops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
