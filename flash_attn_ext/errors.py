"""Exceptions and warnings of flash_attn_ext."""

from __future__ import annotations

from collections.abc import Sequence


class UnsupportedError(ValueError):
    """The inputs are well formed, but nothing here computes them.

    Attributes:
        reasons: one sentence for each kernel or backend that was considered.
    """

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        """Joins the reasons to the message, one line each."""
        self.reasons = list(reasons)
        super().__init__("\n  - ".join([message, *self.reasons]))


class FallbackWarning(UserWarning):
    """CUDA tensors are computed by PyTorch operations because no kernel takes them."""
