"""FLOP counts of the attention ops for ``torch.utils.flop_counter.FlopCounterMode``.

The rule is PyTorch's own for its attention ops: one multiply-add is two operations, softmax is not
counted, and masks (causal, window) do not lower the count. Sequence lengths of the varlen ops are
read from ``cu_seqlens`` and ``seqused``.

``torch.utils.flop_counter`` imports Triton, so that it is not imported here: the formulas are
registered when somebody else imports it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ._after_import import after_import

_COUNTER_MODULE = "torch.utils.flop_counter"


def _forward_flops(num_heads_q: int, pairs: int, head_dim: int, head_dim_v: int) -> int:
    """``pairs``: number of (query, key) pairs of one head, summed over the batch."""
    return 2 * num_heads_q * pairs * (head_dim + head_dim_v)


def _backward_flops(num_heads_q: int, pairs: int, head_dim: int, head_dim_v: int) -> int:
    # S, dQ and dK contract with head_dim; dP and dV with head_dim_v.
    return 2 * num_heads_q * pairs * (3 * head_dim + 2 * head_dim_v)


def _lengths(cu_seqlens: Tensor | None, seqused: Tensor | None, max_seqlen: int) -> list[int]:
    """The length of every sequence; ``max_seqlen`` for each where the values are not known."""
    from torch._subclasses.fake_tensor import FakeTensor

    given = seqused if seqused is not None else cu_seqlens
    assert given is not None  # the API wants one of them
    if isinstance(given, FakeTensor) or given.device.type == "meta":
        return [max_seqlen] * (given.shape[0] - (0 if seqused is not None else 1))
    lengths: list[int] = (given if seqused is not None else given.diff()).tolist()
    return lengths


def _fwd_flops(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    batch_size, seqlen_q, num_heads_q, head_dim = q.shape
    return _forward_flops(num_heads_q, batch_size * seqlen_q * k.shape[1], head_dim, v.shape[-1])


def _bwd_flops(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    batch_size, seqlen_q, num_heads_q, head_dim = q.shape
    return _backward_flops(num_heads_q, batch_size * seqlen_q * k.shape[1], head_dim, v.shape[-1])


def _pairs(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> int:
    lengths_q = _lengths(cu_seqlens_q, seqused_q, max_seqlen_q)
    lengths_k = _lengths(cu_seqlens_k, seqused_k, max_seqlen_k)
    return sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))


def _varlen_fwd_flops(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, _, max_seqlen_q, max_seqlen_k = args[:7]
    pairs = _pairs(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    return _forward_flops(q.shape[1], pairs, q.shape[-1], v.shape[-1])


def _varlen_fwd_out_flops(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *args: Any, **kwargs: Any
) -> int:
    return _varlen_fwd_flops(q, k, v, *args)


def _varlen_bwd_flops(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> int:
    _out, _lse, _dlse, *lengths = args[:9]
    return _backward_flops(q.shape[1], _pairs(*lengths), q.shape[-1], v.shape[-1])


def _register(counter: Any) -> None:
    ops = torch.ops.flash_attn_ext
    for targets, formula in (
        ([ops.fwd, ops.fwd_out], _fwd_flops),
        ([ops.bwd], _bwd_flops),
        ([ops.varlen_fwd], _varlen_fwd_flops),
        ([ops.varlen_fwd_out], _varlen_fwd_out_flops),
        ([ops.varlen_bwd], _varlen_bwd_flops),
    ):
        counter.register_flop_formula(targets, get_raw=True)(formula)


def register() -> None:
    """Registers the formulas now or, if the counter is not imported yet, when it is."""
    after_import(_COUNTER_MODULE, lambda: _register(sys.modules[_COUNTER_MODULE]))
