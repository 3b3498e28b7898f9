"""Rotary position embedding (RoPE) of queries and keys, arXiv:2104.09864.

The first ``rotary_dim`` elements of every head are rotated in pairs; row p of ``cos`` and ``sin``
holds the angles of position p.
"""

from __future__ import annotations

from torch import Tensor

from .. import _cache_checks, _checks, _schema
from ..autograd import needs_grad, rotary
from ..backends import raise_refusal_behind
from ..errors import UnsupportedError

_rotary_ = _schema.op("rotary_")


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotates the first ``2 * cos.shape[1]`` elements of every head by the angles of its position.

    Args:
        x: [batch, seqlen, num_heads, head_dim]; with cu_seqlens [total, num_heads, head_dim].
        cos: [seqlen_ro, rotary_dim / 2] in x's dtype, rotary_dim <= head_dim.
        sin: as cos.
        interleaved: rotate the pairs (0, 1), (2, 3) ... (GPT-J); else (i, i + rotary_dim / 2)
            (GPT-NeoX, Llama).
        inplace: write the result into x.
        seqlen_offsets: position of the first token of each sequence: an int, or int32 [batch].
        cu_seqlens: int32 [batch + 1], ascending from 0: packed sequences of different lengths.
        max_seqlen: the longest sequence or more; needed with cu_seqlens.

    Returns:
        As x; with ``inplace`` x itself. Computed in fp32 (fp64 for fp64). Differentiable with
        respect to x.

    Raises:
        ValueError: inputs that contradict each other, or positions past the rows of cos.
        UnsupportedError: cos or sin require grad.
    """
    if cu_seqlens is None:
        _checks.layout("x", x, 4, "[batch, seqlen, num_heads, head_dim]")
        batch_size, longest = x.shape[:2]
    else:
        _checks.layout("x", x, 3, "[total, num_heads, head_dim] with cu_seqlens")
        _checks.cumulative("cu_seqlens", cu_seqlens, x)
        batch_size = cu_seqlens.shape[0] - 1
        longest = _checks.max_seqlen("max_seqlen", max_seqlen)
        if _checks.values_readable(cu_seqlens):
            _checks.ascending("cu_seqlens", cu_seqlens, x.shape[0], "max_seqlen", longest)
    _checks.floating("x", x)
    _cache_checks.rotary_tables(x, cos, sin, "x", prefix="")
    if needs_grad(cos, sin):
        raise UnsupportedError(
            _checks.message("cos", "a tensor that requires grad", "a constant", "detach() it")
        )
    if isinstance(seqlen_offsets, Tensor):
        _checks.per_sequence("seqlen_offsets", seqlen_offsets, batch_size, x)
        offsets = seqlen_offsets
        if _checks.values_readable(offsets):
            limits = [cos.shape[0] - longest] * batch_size
            _checks.bounded("seqlen_offsets", offsets, limits, "rows of cos less max_seqlen")
    else:
        # Rows that begin at the offset are a view: no tensor of equal offsets is made.
        cos, sin, offsets = cos[seqlen_offsets:], sin[seqlen_offsets:], None
    if cos.shape[0] < longest:
        raise ValueError(
            _checks.message("cos: rows", cos.shape[0], f"at least max_seqlen = {longest}")
        )

    arguments = (cos, sin, offsets, cu_seqlens, longest, interleaved, False)
    if not inplace:
        return rotary(_checks.last_dim_contiguous(x), *arguments)
    _checks.written_in_place("x", x)
    if needs_grad(x):
        return x.copy_(rotary(x, *arguments))
    try:
        _rotary_(x, *arguments, False)
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise
    return x


apply_rotary_emb_func = apply_rotary_emb
"""Another word for apply_rotary_emb, as in flash-attn."""
