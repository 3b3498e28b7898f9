"""RMSNorm with residual and dropout, the older functions."""

from flash_attn_ext.ops.layer_norm import (
    DropoutAddRMSNorm,
    RMSNorm,
    dropout_add_rms_norm,
    rms_norm,
)

__all__ = ["DropoutAddRMSNorm", "RMSNorm", "dropout_add_rms_norm", "rms_norm"]
