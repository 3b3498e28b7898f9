"""One attention problem as the loops of _tiles.py see it: who sees whom, and in which tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._philox import keep_mask, keep_threshold

# Elements of one score tile, all heads and sequences together. 2 MB in fp32: smaller tiles pay
# for PyTorch's calls, larger ones leave the caches (2^18 to 2^20 are equal within the noise on an
# AMD EPYC with 1 MB of L2 cache per core; 2^17 and 2^22 are slower).
_TILE_ELEMENTS = 1 << 19
# A GPU has more to keep busy: 64 MB per tile make its memory the limit, not the launches.
_GPU_TILE_FACTOR = 32
_MAX_TILE_M, _MIN_TILE_M = 512, 64
_MAX_TILE_N, _MIN_TILE_N = 4096, 128


@dataclass(frozen=True)
class Options:
    """Arguments of the ops that change scores and probabilities."""

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Tensor | None  # [num_heads_q] or [batch_size, num_heads_q]
    rng_state: Tensor | None  # int64 [2]
    dropout_p: float

    @property
    def dropout(self) -> bool:
        """True if some probability can be dropped."""
        return self.rng_state is not None and keep_threshold(self.dropout_p) < 256

    @property
    def dropout_scale(self) -> float:
        """Factor of kept probabilities."""
        return 256 / keep_threshold(self.dropout_p) if self.dropout else 1.0


@dataclass(frozen=True)
class Lengths:
    """Lengths of the queries or keys of all sequences of a problem."""

    max: int
    min: int  # 0 where lengths may not be read on the host
    each: Tensor | None = None  # int64 [batch]; None: all equal `max`

    def column(self) -> Tensor | int:
        """The lengths in a form that broadcasts against [batch, 1, 1, rows, columns]."""
        return self.max if self.each is None else self.each.view(-1, 1, 1, 1, 1)


def _tiles(begin: int, end: int, step: int) -> Iterator[range]:
    return (range(i, min(i + step, end)) for i in range(begin, end, step))


@dataclass(frozen=True)
class Problem:
    """Sizes, masks and tiles of a set of sequences that are computed together.

    The diagonal is bottom-right aligned: query i of a sequence stands at key i + shift with
    shift = seqlen_k - seqlen_q. Where lengths differ or are unknown on the host, `shift_min` and
    `shift_max` bound it, and the tile ranges below are those of the bounds.
    """

    input_dtype: torch.dtype
    device: torch.device
    batch: range  # indices of the sequences in the user's batch
    num_heads_q: int
    num_heads_kv: int
    lengths_q: Lengths
    lengths_k: Lengths
    shift_min: int
    shift_max: int
    options: Options

    @property
    def dtype(self) -> torch.dtype:
        """Of all arithmetic."""
        return torch.float64 if self.input_dtype == torch.float64 else torch.float32

    @property
    def group_size(self) -> int:
        """Query heads that share a key head: they are folded into the rows of a tile."""
        return self.num_heads_q // self.num_heads_kv

    @property
    def num_matrices(self) -> int:
        """Matrices of a batched product."""
        return len(self.batch) * self.num_heads_kv

    def tile_sizes(self) -> tuple[int, int]:
        """Query positions and key positions of a tile."""
        heads = max(1, len(self.batch) * self.num_heads_q)
        elements = _TILE_ELEMENTS * (1 if self.device.type == "cpu" else _GPU_TILE_FACTOR)
        tile_m = max(1, min(self.lengths_q.max, _MAX_TILE_M))
        while tile_m > _MIN_TILE_M and heads * tile_m * tile_m > elements:
            tile_m = (tile_m + 1) // 2
        tile_n = elements // (heads * tile_m) // _MIN_TILE_N * _MIN_TILE_N
        return tile_m, min(max(tile_n, _MIN_TILE_N), _MAX_TILE_N)

    def query_tiles(self, keys: range | None = None) -> Iterator[range]:
        """Tiles of query positions: all, or those that see one of the given keys."""
        begin, end = 0, self.lengths_q.max
        left, right = self.options.window_left, self.options.window_right
        if keys is not None and right >= 0:
            begin = max(begin, keys.start - self.shift_max - right)
        if keys is not None and left >= 0:
            end = min(end, keys.stop - self.shift_min + left)
        return _tiles(begin, end, self.tile_sizes()[0])

    def key_tiles(self, queries: range | None = None) -> Iterator[range]:
        """Tiles of key positions: all, or those that one of the given queries sees."""
        begin, end = 0, self.lengths_k.max
        left, right = self.options.window_left, self.options.window_right
        if queries is not None and left >= 0:
            begin = max(begin, queries.start + self.shift_min - left)
        if queries is not None and right >= 0:
            end = min(end, queries.stop + self.shift_max + right)
        return _tiles(begin, end, self.tile_sizes()[1])

    def _distance(self, queries: range, keys: range) -> Tensor:
        """Key position minus the query's place on the diagonal, [1 | batch, 1, 1, rows, cols]."""
        device = self.device
        i = torch.arange(queries.start, queries.stop, device=device).view(1, 1, 1, -1, 1)
        j = torch.arange(keys.start, keys.stop, device=device)
        return j - i - (self.lengths_k.column() - self.lengths_q.column())

    def visible(self, queries: range, keys: range) -> Tensor | None:
        """Which keys each query sees, [1 | batch, 1, 1, rows, cols]; None: all of them."""
        left, right = self.options.window_left, self.options.window_right
        tail = keys.stop > self.lengths_k.min
        above = right >= 0 and keys.stop - 1 > queries.start + self.shift_min + right
        below = left >= 0 and keys.start < queries.stop - 1 + self.shift_max - left
        if not (tail or above or below):
            return None
        distance = self._distance(queries, keys)
        kept = torch.ones_like(distance, dtype=torch.bool)
        if tail:
            j = torch.arange(keys.start, keys.stop, device=self.device)
            kept = kept & (j < self.lengths_k.column())
        if above:
            kept = kept & (distance <= right)
        if below:
            kept = kept & (distance >= -left)
        return kept

    def exists(self, queries: range, keys: range) -> Tensor:
        """Which elements are inside the lengths, [1 | batch, 1, 1, rows, cols]."""
        i = torch.arange(queries.start, queries.stop, device=self.device).view(1, 1, 1, -1, 1)
        j = torch.arange(keys.start, keys.stop, device=self.device)
        return (i < self.lengths_q.column()) & (j < self.lengths_k.column())

    def alibi_bias(self, queries: range, keys: range) -> Tensor | None:
        """What ALiBi adds to the scores, [1 | batch, heads_kv, group, rows, cols]; None: 0."""
        slopes = self.options.alibi_slopes
        if slopes is None:
            return None
        if slopes.dim() == 2:
            slopes = slopes[self.batch.start : self.batch.stop]
        slopes = slopes.to(self.dtype).reshape(-1, self.num_heads_kv, self.group_size, 1, 1)
        return -slopes * self._distance(queries, keys).abs()

    def dropout_mask(self, queries: range, keys: range) -> Tensor | None:
        """Kept elements, [batch, heads_kv, group, rows, cols]; None: all of them."""
        rng_state = self.options.rng_state
        if rng_state is None or not self.options.dropout:
            return None
        batch = torch.arange(self.batch.start, self.batch.stop, device=self.device)
        head = torch.arange(self.num_heads_q, device=self.device)
        kept = keep_mask(
            rng_state, batch[:, None], head, queries, keys, self.num_heads_q, self.options.dropout_p
        )
        shape = (len(self.batch), self.num_heads_kv, self.group_size, *kept.shape[2:])
        return kept.view(shape)
