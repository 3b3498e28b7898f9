"""Padded batches to packed ones and back, with flash-attn's names and return values.

Everything here is differentiable and made of torch operations. ``unpad_input`` reads the number of
kept tokens back from the device; do it once per batch, not once per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import message


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]``: [n, ...] and [k] give [k, ...]."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse of index_first_axis: [k, ...] and [k] give [first_axis_dim, ...], 0 elsewhere."""
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens that a mask keeps.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask: [batch, seqlen], bool or int, 1 = valid token.
        unused_mask: [batch, seqlen], 1 = allocated but unused: packed too, but not counted in
            ``seqused``. No token may have a 1 in both masks.

    Returns:
        (hidden_states [total, ...], indices [total] int64 into the flattened batch and sequence,
        cu_seqlens [batch + 1] int32, max_seqlen_in_batch, seqused [batch] int32).

    Raises:
        ValueError: a mask has another shape than hidden_states' first two dimensions.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    used = attention_mask.to(torch.int32)
    packed = used
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        packed = used + unused_mask.to(torch.int32)
    seqused = used.sum(dim=-1, dtype=torch.int32)
    indices = packed.flatten().nonzero().flatten()
    cu_seqlens, max_seqlen = _cumulative(packed.sum(dim=-1, dtype=torch.int32))
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        max_seqlen,
        seqused,
    )


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs rows that hold several sequences one after the other.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask_in_length: [batch, seqlen] int. The nonzero entries of a row, in order, are
            the lengths of its sequences, which stand at the begin of the row without gaps. For
            example [[2, 3, 0, 0, 0, 0], [4, 1, 0, 0, 0, 0]]: two sequences in each row of 6.

    Returns:
        (hidden_states [total, ...], indices [total] int64 into the flattened batch and row,
        cu_seqlens [num_sequences + 1] int32, max_seqlen_in_batch).

    Raises:
        ValueError: the mask has another shape than hidden_states' first two dimensions.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    positions = torch.arange(attention_mask_in_length.shape[1], device=hidden_states.device)
    is_token = positions < attention_mask_in_length.sum(dim=-1, keepdim=True)
    indices = is_token.flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    cu_seqlens, max_seqlen = _cumulative(lengths[lengths != 0])
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        max_seqlen,
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input.

    Args:
        hidden_states: [total, ...].
        indices: [total] int64, from unpad_input.
        batch: batch size of the result.
        seqlen: padded length of the result.

    Returns:
        [batch, seqlen, ...], 0 where no token was.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


def _cumulative(lengths: Tensor) -> tuple[Tensor, int]:
    """(cu_seqlens, the longest length) of [n] lengths."""
    cu_seqlens = lengths.new_zeros(lengths.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(lengths, dim=0, dtype=torch.int32, out=cu_seqlens[1:])
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            message(
                name,
                f"shape {list(mask.shape)}",
                f"[batch, seqlen] = {list(hidden_states.shape[:2])} as hidden_states",
            )
        )
