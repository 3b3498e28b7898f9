"""The tile loops: attention forward, backward and the dropout mask that users ask for.

A tile is [matrices, rows, columns] with one matrix per sequence and key head; the query heads that
share a key head lie below each other in the rows, so that keys and values are never expanded.
Algorithm: FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2, with all matrices side by side.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ._problem import Problem


class Rows(Protocol):
    """What the loops read; see _rows.py."""

    def load(self, rows: range, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """Reads [batch, heads, len(rows), dim]."""


class ResultRows(Rows, Protocol):
    """What the loops write; see _rows.py."""

    def store(self, rows: range, values: Tensor) -> None:
        """Writes [batch, heads, len(rows), dim]."""

    def add(self, rows: range, values: Tensor) -> None:
        """Adds [batch, heads, len(rows), dim]."""

    def finish(self) -> None:
        """To be called once, after the last write."""


def _load(problem: Problem, source: Rows, rows: range, fill: float = 0.0) -> Tensor:
    """Rows as matrices: [matrices, group_size * len(rows) or len(rows), dim]."""
    tile = source.load(rows, problem.dtype, fill)
    num_rows = tile.shape[1] // problem.num_heads_kv * tile.shape[2]
    return tile.reshape(problem.num_matrices, num_rows, tile.shape[3])


def _split(problem: Problem, matrices: Tensor, num_positions: int) -> Tensor:
    """Matrices as [batch, heads, positions, dim], the inverse of _load."""
    return matrices.view(len(problem.batch), -1, num_positions, matrices.shape[-1])


def _by_head(problem: Problem, scores: Tensor) -> Tensor:
    """Scores as [batch, heads_kv, group, queries, keys], a view."""
    return scores.view(
        len(problem.batch), problem.num_heads_kv, problem.group_size, -1, scores.shape[-1]
    )


def _scores(
    problem: Problem, q: Tensor, k: Tensor, queries: range, keys: range
) -> tuple[Tensor, Tensor | None]:
    """Scores of a tile, -inf where a query does not see a key.

    Args:
        problem: sizes and masks.
        q: query rows, already multiplied by softmax_scale.
        k: key rows.
        queries: positions of the query rows.
        keys: positions of the key rows.

    Returns:
        The scores, and tanh(q k^T / softcap) (None without softcap), which the backward needs.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    tanh = None
    if problem.options.softcap > 0.0:
        tanh = scores.div_(problem.options.softcap).tanh_()
        scores = tanh * problem.options.softcap
    bias = problem.alibi_bias(queries, keys)
    if bias is not None:
        _by_head(problem, scores).add_(bias)
    visible = problem.visible(queries, keys)
    if visible is not None:
        _by_head(problem, scores).masked_fill_(~visible, -torch.inf)
    return scores, tanh


def forward(
    problem: Problem, q: Rows, k: Rows, v: Rows, head_dim_v: int, out: ResultRows, lse: ResultRows
) -> None:
    """Writes out and lse.

    The running maximum starts at the smallest finite number instead of -inf: a row that has seen
    no key then has exp(-inf - finite) = 0 everywhere, and no -inf - -inf occurs.
    """
    options = problem.options
    lowest = torch.finfo(problem.dtype).min
    for queries in problem.query_tiles():
        q_tile = _load(problem, q, queries) * options.softmax_scale
        row_max = q_tile.new_full((*q_tile.shape[:2], 1), lowest)
        row_sum = torch.zeros_like(row_max)
        acc = q_tile.new_zeros(*q_tile.shape[:2], head_dim_v)
        for keys in problem.key_tiles(queries):
            scores, _ = _scores(problem, q_tile, _load(problem, k, keys), queries, keys)
            new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
            p = scores.sub_(new_max).exp_()
            rescale = row_max.sub_(new_max).exp_()
            row_sum.mul_(rescale).add_(p.sum(-1, keepdim=True))
            row_max = new_max
            kept = problem.dropout_mask(queries, keys)
            if kept is not None:
                _by_head(problem, p).mul_(kept)
            # As the kernels: P V multiplies numbers of the input type.
            p = p.to(problem.input_dtype).to(problem.dtype)
            acc.mul_(rescale).baddbmm_(p, _load(problem, v, keys))
        divisor = torch.where(row_sum == 0.0, 1.0, row_sum)
        acc.mul_(options.dropout_scale).div_(divisor)
        out.store(queries, _split(problem, acc, len(queries)))
        lse.store(queries, _split(problem, row_max.add_(row_sum.log_()), len(queries)))


def _load_lse(problem: Problem, lse: Rows, queries: range) -> Tensor:
    """LSE rows; +inf for rows without a key, so that exp(score - lse) is 0 there."""
    tile = _load(problem, lse, queries, fill=torch.inf)
    return torch.where(tile == -torch.inf, torch.inf, tile)


def backward(
    problem: Problem,
    inputs: tuple[Rows, Rows, Rows, Rows],
    statistics: tuple[Rows, Rows],
    gradients: tuple[ResultRows, ResultRows, ResultRows],
) -> None:
    """Adds to dq, writes dk and dv.

    Args:
        problem: sizes and masks.
        inputs: q, k, v, dout.
        statistics: lse and delta = rowsum(dout * out) - dlse.
        gradients: dq (zero, in the accumulation dtype), dk, dv.
    """
    q, k, v, dout = inputs
    lse, delta = statistics
    dq, dk, dv = gradients
    options = problem.options
    for keys in problem.key_tiles():
        k_tile, v_tile = _load(problem, k, keys), _load(problem, v, keys)
        acc_dk, acc_dv = torch.zeros_like(k_tile), torch.zeros_like(v_tile)
        for queries in problem.query_tiles(keys):
            q_tile = _load(problem, q, queries) * options.softmax_scale
            dout_tile = _load(problem, dout, queries)
            lse_tile = _load_lse(problem, lse, queries)
            delta_tile = _load(problem, delta, queries).masked_fill(lse_tile == torch.inf, 0.0)

            scores, tanh = _scores(problem, q_tile, k_tile, queries, keys)
            p = scores.sub_(lse_tile).exp_()
            ds = torch.bmm(dout_tile, v_tile.transpose(1, 2))
            kept = problem.dropout_mask(queries, keys)
            if kept is None:
                acc_dv.baddbmm_(p.transpose(1, 2), dout_tile)
            else:
                factor = kept.to(problem.dtype).mul_(options.dropout_scale).view_as(p)
                acc_dv.baddbmm_((p * factor).transpose(1, 2), dout_tile)
                ds.mul_(factor)
            ds.sub_(delta_tile).mul_(p)
            if tanh is not None:
                ds.mul_(1.0 - tanh * tanh)
            acc_dk.baddbmm_(ds.transpose(1, 2), q_tile)
            dq_tile = torch.bmm(ds, k_tile).mul_(options.softmax_scale)
            dq.add(queries, _split(problem, dq_tile, len(queries)))
        dk.store(keys, _split(problem, acc_dk, len(keys)))
        dv.store(keys, _split(problem, acc_dv, len(keys)))


def write_dmask(problem: Problem, q: Rows, k: Rows, lse: Rows, dmask: Tensor) -> None:
    """Writes the probabilities before dropout, negative where dropped.

    Args:
        problem: sizes and masks.
        q: query rows.
        k: key rows.
        lse: what `forward` wrote.
        dmask: [batch, num_heads_q, >= seqlen_q, >= seqlen_k], zero.
    """
    for queries in problem.query_tiles():
        q_tile = _load(problem, q, queries) * problem.options.softmax_scale
        lse_tile = _load_lse(problem, lse, queries)
        for keys in problem.key_tiles():
            scores, _ = _scores(problem, q_tile, _load(problem, k, keys), queries, keys)
            p = _by_head(problem, scores.sub_(lse_tile).exp_())
            kept = problem.dropout_mask(queries, keys)
            if kept is not None:
                p = torch.where(kept | ~problem.exists(queries, keys), p, -p)
            tile = dmask[:, :, queries.start : queries.stop, keys.start : keys.stop]
            tile.copy_(p.flatten(1, 2))
