"""flash-attn 3 under the name of its newer packages; see flash_attn_ext.compat."""

import flash_attn_interface

__all__ = ["flash_attn_interface"]
