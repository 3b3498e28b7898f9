"""Gated activations."""

from flash_attn_ext.ops.activations import swiglu

__all__ = ["swiglu"]
