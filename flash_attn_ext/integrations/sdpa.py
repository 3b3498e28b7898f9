"""``torch.nn.functional.scaled_dot_product_attention`` on these kernels, in one line.

    >>> from flash_attn_ext.integrations import sdpa
    >>> sdpa.activate()

torch has a registry of flash attention implementations (``torch.nn.attention``, torch >= 2.11).
Activating one replaces, for CUDA tensors, the kernels of the ops that SDPA, jagged nested tensors,
``torch.nn.attention.varlen``, ``torch.nn.attention.bias.causal_lower_right`` and DTensor's context
parallelism end in::

    aten::_scaled_dot_product_flash_attention{,_backward}    [batch, heads, seqlen, head_dim]
    aten::_flash_attention_{forward,backward}                [batch, seqlen, heads, head_dim]
                                                             or packed [total, heads, head_dim]
    aten::_flash_attention_forward_no_dropout_inplace        the same into a given buffer

Compiled graphs call the same ops. What is not computed by a kernel here (see `_sdpa_ops`) goes to
torch's own kernel, which was fetched before it was replaced. Forward and backward decide that from
the same facts, because a dropout mask can only be drawn again by the kernel that drew it.

**Masks.** SDPA's ``is_causal`` is aligned to the top left. torch sends a causal call with
seqlen_q != seqlen_k to another backend before these ops are reached; the ops themselves are aligned
to the bottom right, as everything else here is.

**Results.** As torch's FlashAttention-2, except for rows without a visible key, whose log-sum-exp
is -inf (torch: +inf).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _load
from ..errors import UnsupportedError
from ._sdpa_ops import CPU_KERNELS, KERNELS

NAME = "flash_attn_ext"
"""The name of these kernels in torch's registry."""

_FLASH = 1
"""``SDPBackend.FLASH_ATTENTION`` in the order of preference that torch's C++ holds."""


def activate(devices: Sequence[str] = ("cuda",), prefer: bool = True) -> None:
    """Puts these kernels under ``F.scaled_dot_product_attention`` until `restore`.

    Forward and backward, grouped heads, dropout, jagged nested tensors and ``varlen_attn``, eager
    and compiled. A second call replaces what the first one did; an implementation that somebody
    else activated is restored first, by torch.

    Args:
        devices: "cuda"; "cpu" as well puts the tiled PyTorch backend under SDPA of CPU tensors,
            which is slower than torch's kernel there and serves tests.
        prefer: put flash attention first in torch's order of SDPA backends, which has cuDNN first
            on some GPUs. A ``sdpa_kernel(...)`` context of the caller still decides.

    Raises:
        UnsupportedError: torch < 2.11; or there are a GPU and no kernels for it, see
            ``python -m flash_attn_ext doctor``.
        ValueError: another device.

    Note:
        A forward with dropout and its backward have to happen under the same implementation.
        Without dropout they may lie on both sides of `activate` or `restore`.
    """
    registry = _registry()
    for device in devices:
        if device not in ("cuda", "cpu"):
            raise ValueError(f"devices: got {device!r}, expected 'cuda' or 'cpu'")
    status = _load.status()
    if "cuda" in devices and torch.cuda.is_available() and not status.binder_loaded:
        raise UnsupportedError(
            "sdpa.activate: got a GPU and no kernels for it, expected the compiled library",
            status.problems,
        )
    registry.register_flash_attention_impl(
        NAME, register_fn=functools.partial(_Registration, tuple(devices), prefer)
    )
    registry.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Gives SDPA torch's own kernels and order of backends back; does nothing if not active."""
    if is_active():
        _registry().restore_flash_attention_impl()


def is_active() -> bool:
    """Whether these kernels are under SDPA now."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current is not None and current() == NAME


def _registry() -> Any:
    import torch.nn.attention as registry

    names = ("register_flash_attention_impl", "current_flash_attention_impl")
    if not all(hasattr(registry, name) for name in names):
        raise UnsupportedError(
            f"sdpa.activate: got torch {torch.__version__}, expected torch >= 2.11, the first with "
            "a registry of flash attention implementations; pip install -U 'torch>=2.11'"
        )
    return registry


class _Registration:
    """Our kernels in torch's dispatcher, from construction until ``remove``."""

    def __init__(self, devices: tuple[str, ...], prefer: bool) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        for device in devices:
            kernels = KERNELS | (CPU_KERNELS if device == "cpu" else {})
            for op, function in kernels.items():
                self._replace(op, function, device.upper())
        self.order: list[int] | None = None
        if prefer and "cuda" in devices and torch.cuda.is_available():
            # Now, or as soon as the process uses a GPU: a process that forks must not until then.
            torch.cuda._lazy_call(self._prefer_flash)  # type: ignore[no-untyped-call]

    def _prefer_flash(self) -> None:
        if self.library is None:  # removed in the meantime
            return
        # Torch puts its own order in place at the first choice, over what was set before.
        x = torch.empty((1, 1, 8, 64), dtype=torch.float16, device="cuda")
        torch._fused_sdp_choice(x, x, x)
        self.order = torch._C._get_sdp_priority_order()
        torch._C._set_sdp_priority_order([_FLASH, *(x for x in self.order if x != _FLASH)])

    def _replace(self, op: str, function: Callable[..., Any], key: str) -> None:
        """Registers ``function(original, *arguments)`` for ``aten::op``."""
        if not hasattr(torch.ops.aten, op):  # this torch has no such op
            return
        try:
            kernel = torch.library.get_kernel(f"aten::{op}", key)
        except RuntimeError:  # torch has no kernel of its own for this device
            kernel = None

        def intercepted(keys: Any, *args: Any, **kwargs: Any) -> Any:
            def original() -> Any:
                if kernel is None:
                    raise UnsupportedError(
                        f"aten::{op} on {key}: got a call that {NAME} does not serve, and torch "
                        "has no kernel of its own there"
                    )
                return kernel.call_boxed(keys, *args, **kwargs)

            return function(original, *args, **kwargs)

        assert self.library is not None
        with warnings.catch_warnings():
            # That a kernel is replaced is the purpose.
            warnings.filterwarnings("ignore", ".*verrid(ing|den)", UserWarning)
            self.library.impl(op, intercepted, key, with_keyset=True)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Puts back what was there before."""
        if self.library is not None:
            self.library._destroy()  # type: ignore[no-untyped-call]
            self.library = None
        if self.order is not None:
            torch._C._set_sdp_priority_order(self.order)
            self.order = None
