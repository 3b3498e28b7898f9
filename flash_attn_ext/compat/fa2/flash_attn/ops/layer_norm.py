"""LayerNorm with residual and dropout, the older functions."""

from flash_attn_ext.ops.layer_norm import (
    DropoutAddLayerNorm,
    dropout_add_layer_norm,
    layer_norm,
)

__all__ = ["DropoutAddLayerNorm", "dropout_add_layer_norm", "layer_norm"]
