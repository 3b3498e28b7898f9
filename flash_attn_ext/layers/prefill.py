"""Long prompts in pieces: the results of one call, with the activations of a piece in memory.

Attention with a cache is aligned to the bottom right, so a piece of a prompt sees all that came
before it, and itself as a causal mask allows. Whatever else a model does to its tokens, it does to
each by itself. So a prompt may be cut anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _checks


def chunked_prefill(
    forward: Callable[..., Tensor],
    x: Tensor,
    chunk_size: int,
    *,
    cu_seqlens: Tensor | None = None,
    last_only: bool = False,
) -> Tensor:
    """Gives ``x`` to ``forward`` in pieces of ``chunk_size`` tokens of each sequence.

        >>> cache = layer.new_cache(batch_size=1, max_seqlen=131072)
        >>> y = chunked_prefill(lambda x: layer(x, cache), prompt, 8192)

    Args:
        forward: a causal layer or model that appends to its caches what it is given:
            ``forward(piece)``, and with cu_seqlens ``forward(piece, cu_seqlens=, max_seqlen=)``,
            where sequences whose tokens are used up have length 0. Returns one row for each token.
        x: [batch, seqlen, ...], hidden states or token ids; with cu_seqlens [total, ...].
        chunk_size: tokens of a sequence in a piece, at least 1.
        cu_seqlens: int32 [batch + 1], ascending from 0: prompts of different lengths. Its values
            are read by the host.
        last_only: keep only the row of each sequence's last token, which is what the next token is
            drawn from.

    Returns:
        What ``forward(x)`` returns: [batch, seqlen, ...] or [total, ...]; with ``last_only``
        [batch, ...] (a sequence without tokens: zeros).

    Raises:
        ValueError: chunk_size is not positive, there is no token, or cu_seqlens does not fit x.
    """
    if chunk_size < 1:
        raise ValueError(_checks.message("chunk_size", chunk_size, "at least 1"))
    if cu_seqlens is None:
        return _fixed(forward, x, chunk_size, last_only)
    _checks.cumulative("cu_seqlens", cu_seqlens, x)
    ends: list[int] = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] != x.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(
            _checks.message("cu_seqlens", ends, f"ascending from 0 to x.shape[0] = {x.shape[0]}")
        )
    return _packed(forward, x, chunk_size, ends, last_only)


def _no_tokens(x: Tensor) -> ValueError:
    return ValueError(_checks.message("x", _checks.shape_of(x), "at least one token"))


def _fixed(forward: Callable[..., Tensor], x: Tensor, chunk_size: int, last_only: bool) -> Tensor:
    if x.shape[1] == 0:
        raise _no_tokens(x)
    out = None
    for begin in range(0, x.shape[1], chunk_size):
        rows = forward(x[:, begin : begin + chunk_size])
        if last_only:
            out = rows[:, -1]
            continue
        if out is None:
            out = rows.new_empty(*x.shape[:2], *rows.shape[2:])
        out[:, begin : begin + chunk_size] = rows
    assert out is not None
    return out


def _pieces(ends: list[int], chunk_size: int) -> Iterator[tuple[list[range], list[int]]]:
    """For each piece: the rows of x of each sequence, and where they begin in the piece."""
    longest = max(end - begin for begin, end in itertools.pairwise(ends))
    for done in range(0, longest, chunk_size):
        rows = [
            range(min(begin + done, end), min(begin + done + chunk_size, end))
            for begin, end in itertools.pairwise(ends)
        ]
        piece_ends = [0]
        for of_sequence in rows:
            piece_ends.append(piece_ends[-1] + len(of_sequence))
        yield rows, piece_ends


def _packed(
    forward: Callable[..., Tensor], x: Tensor, chunk_size: int, ends: list[int], last_only: bool
) -> Tensor:
    if ends[-1] == 0:
        raise _no_tokens(x)
    out = None
    for rows, piece_ends in _pieces(ends, chunk_size):
        piece = forward(
            torch.cat([x[of_sequence.start : of_sequence.stop] for of_sequence in rows]),
            cu_seqlens=torch.tensor(piece_ends, dtype=torch.int32, device=x.device),
            max_seqlen=max(map(len, rows)),
        )
        if out is None:
            num_rows = len(rows) if last_only else x.shape[0]
            out = piece.new_zeros(num_rows, *piece.shape[1:])
        for sequence, (of_sequence, begin) in enumerate(zip(rows, piece_ends, strict=False)):
            if not of_sequence:
                continue
            new = piece[begin : begin + len(of_sequence)]
            if last_only:
                out[sequence] = new[-1]
            else:
                out[of_sequence.start : of_sequence.stop] = new
    assert out is not None
    return out
