"""Gated activations."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """``silu(x) * y``, arXiv:2002.05202; x and y of one shape."""
    return torch.nn.functional.silu(x) * y
