"""Merging attention results over disjoint sets of keys, by their log-sum-exp.

With ``out_a = sum_a(exp(s) v) / exp(lse_a)`` over the keys of a, and the same for b:

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

Plain torch operations: differentiable, and traced by torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import layout, like, message


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from the attention over each of them.

    The building block of ring attention, cascade attention and any other split of the keys. Pass
    fp32 ``out`` tensors where many merges follow each other: the result has their dtype.

    Args:
        out_a: [batch, seqlen, num_heads, head_dim], or [total, num_heads, head_dim].
        lse_a: [batch, num_heads, seqlen], or [num_heads, total]; natural logarithm, -inf for a
            row without keys (its ``out`` has to be finite, it is 0 in this library).
        out_b: as out_a.
        lse_b: as lse_a.

    Returns:
        (out, lse) in the layouts and dtypes of the inputs. A row without keys on both sides gives
        out = 0 * (out_a + out_b) and lse = -inf. Gradients reach all four inputs.

    Raises:
        ValueError: shapes that do not belong together.

    Example:
        >>> out_a, lse_a = flash_attn_func(q, k[:, :n], v[:, :n], return_softmax_lse=True)
        >>> out_b, lse_b = flash_attn_func(q, k[:, n:], v[:, n:], return_softmax_lse=True)
        >>> out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    """
    _check_state("a", out_a, lse_a)
    _check_state("b", out_b, lse_b)
    like("out_b", out_b, out_a, "out_a")
    if out_a.shape != out_b.shape:
        raise ValueError(
            message("out_b", f"shape {list(out_b.shape)}", f"{list(out_a.shape)} as out_a")
        )
    is_empty = torch.isneginf(lse_a) & torch.isneginf(lse_b)
    # Rows without keys would give inf - inf: they are computed with 0 instead.
    lse_a, lse_b = lse_a.masked_fill(is_empty, 0.0), lse_b.masked_fill(is_empty, 0.0)
    lse = torch.logaddexp(lse_a, lse_b).masked_fill(is_empty, float("-inf"))
    weight_a = torch.sigmoid(lse_a - lse_b).masked_fill(is_empty, 0.0)
    weight_b = torch.sigmoid(lse_b - lse_a).masked_fill(is_empty, 0.0)
    out = out_a * _per_row(weight_a) + out_b * _per_row(weight_b)
    return out.to(out_a.dtype), lse


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Adds one logit without a value to every row: a merge with the state (0, sink).

    Args:
        out: [batch, seqlen, num_heads, head_dim], or [total, num_heads, head_dim].
        lse: [batch, num_heads, seqlen], or [num_heads, total].
        sink: [num_heads], natural logarithm, not multiplied by softmax_scale; -inf = no sink.

    Returns:
        (out, lse) with the sink. A row without keys gives out = 0 and lse = sink.
    """
    sink = sink.to(lse.dtype).unsqueeze(-1)
    # A finite stand-in for a sink of -inf keeps inf - inf out of the weight.
    weight = torch.sigmoid(lse - sink.clamp(min=torch.finfo(lse.dtype).min))
    return (out * _per_row(weight)).to(out.dtype), torch.logaddexp(lse, sink)


def _per_row(weight: Tensor) -> Tensor:
    """[.., num_heads, seqlen] -> [.., seqlen, num_heads, 1]."""
    return weight.transpose(-1, -2).unsqueeze(-1)


def _check_state(which: str, out: Tensor, lse: Tensor) -> None:
    if out.dim() not in (3, 4):
        layout(
            f"out_{which}",
            out,
            4,
            "[batch, seqlen, num_heads, head_dim] or [total, num_heads, head_dim]",
        )
    expected = [*out.shape[:-3], out.shape[-2], out.shape[-3]]
    if list(lse.shape) != expected:
        raise ValueError(
            message(
                f"lse_{which}",
                f"shape {list(lse.shape)}",
                f"{expected} with out_{which} of shape {list(out.shape)}",
                "heads come before rows, transpose if yours come after",
            )
        )
