"""Cross-entropy as a module."""

from flash_attn_ext.ops.cross_entropy import CrossEntropyLoss

__all__ = ["CrossEntropyLoss"]
