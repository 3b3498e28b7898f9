"""Backends in Python, and how the user chooses and hears about them.

``FLASH_ATTN_EXT_BACKEND`` is ``auto`` (default: kernels where there are some) or ``tiled`` (always
PyTorch operations). ``FLASH_ATTN_EXT_FALLBACK`` says what happens when CUDA tensors end up in the
tiled backend without that being asked for: ``warn`` (default), ``allow`` or ``error``.
"""

from __future__ import annotations

import os
import threading
import warnings

from torch import Tensor

from ..errors import FallbackWarning, UnsupportedError

_BACKENDS = ("auto", "tiled")
_FALLBACKS = ("warn", "allow", "error")

_warned: set[str] = set()


class _Refusal(threading.local):
    """Of this thread: why its last fallback was refused, for `raise_refusal_behind`.

    An exception that was never raised, so that no traceback keeps tensors alive.
    """

    error: UnsupportedError | None = None


_refusal = _Refusal()


def _choice(variable: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "") or allowed[0]
    if value not in allowed:
        raise ValueError(
            f"environment variable {variable}={value!r}: expected one of {', '.join(allowed)}"
        )
    return value


def chosen_backend() -> str:
    """Value of FLASH_ATTN_EXT_BACKEND: ``auto`` or ``tiled``.

    Raises:
        ValueError: the variable has another value.
    """
    return _choice("FLASH_ATTN_EXT_BACKEND", _BACKENDS)


def note_fallback(op: str, tensor: Tensor) -> None:
    """Tells the user, once per op, that PyTorch operations stand in for a CUDA kernel.

    Args:
        op: name of the op, as in ``torch.ops.flash_attn_ext``.
        tensor: one of its inputs; nothing happens unless it is a CUDA tensor.

    Raises:
        UnsupportedError: FLASH_ATTN_EXT_FALLBACK=error.
        ValueError: an environment variable has an unknown value.
    """
    if not tensor.is_cuda or chosen_backend() == "tiled":
        return
    _refusal.error = None
    fallback = _choice("FLASH_ATTN_EXT_FALLBACK", _FALLBACKS)
    if fallback == "error":
        message = (
            f"flash_attn_ext.{op}: no kernel takes these inputs and FLASH_ATTN_EXT_FALLBACK=error "
            "forbids PyTorch operations; flash_attn_ext.explain(...) names the reason"
        )
        _refusal.error = UnsupportedError(message)
        raise UnsupportedError(message)
    if fallback == "warn" and op not in _warned:
        _warned.add(op)
        warnings.warn(
            f"flash_attn_ext.{op} on {tensor.device} runs as PyTorch operations, because no kernel "
            "takes these inputs (flash_attn_ext.explain(...) names the reason). Results are the "
            "same, slower. FLASH_ATTN_EXT_FALLBACK=allow silences this, =error forbids it.",
            FallbackWarning,
            stacklevel=2,
        )


def raise_refusal_behind(error: RuntimeError) -> None:
    """Raises the UnsupportedError of `note_fallback` that ``error`` stands for, if it does.

    The compiled library calls the tiled backend through torch's stable ABI, which tells it that the
    call failed and neither the type of the exception nor, before torch 2.13, its text.

    Args:
        error: what an op raised in this thread.

    Raises:
        UnsupportedError: the op was refused.
    """
    refused, _refusal.error = _refusal.error, None
    if refused is not None and "torch_call_dispatcher" in str(error):
        raise refused from error
