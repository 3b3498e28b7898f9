"""LayerNorm and RMSNorm with residual and dropout."""

from flash_attn_ext.ops.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

__all__ = ["RMSNorm", "layer_norm_fn", "rms_norm_fn"]
