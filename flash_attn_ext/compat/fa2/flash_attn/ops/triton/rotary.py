"""The rotation without gradient."""

from flash_attn_ext.layers.rotary import apply_rotary

__all__ = ["apply_rotary"]
