"""Cross-entropy, one loss a row."""

from flash_attn_ext.ops.cross_entropy import cross_entropy_loss

__all__ = ["cross_entropy_loss"]
