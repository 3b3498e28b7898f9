"""The dropout mask: a function of (seed, offset, batch, head, row, column) and of nothing else.

Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) with

    key     = (seed low word, seed high word ^ offset high word)
    counter = (row // 16, (column // 32) * 32 + lane, batch * num_heads_q + head, offset low word)

gives 16 random bytes for one lane of a block of 16 rows x 32 columns. Which element of the block a
byte serves is the layout of a tensor core accumulator, so that a warp draws its bytes in place:

    lane = (row % 8) * 4 + (column % 8) // 2
    byte = (column % 32 // 8) * 4 + (row % 16 // 8) * 2 + column % 2

Every backend draws these bytes: the mask does not depend on tile sizes, device or architecture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7

_BLOCK_ROWS, _BLOCK_COLS, _LANES = 16, 32, 32


def keep_threshold(dropout_p: float) -> int:
    """Number of the 256 byte values that keep an element: 1..256, 256 = no dropout.

    A kept probability is multiplied by exactly 256 / threshold, so the expectation is unbiased.
    """
    return min(256, max(1, math.floor((1.0 - dropout_p) * 256.0 + 0.5)))


ROW_KEEP_ALL = 65536


def row_keep_threshold(dropout_p: float) -> int:
    """As `keep_threshold`, of the 65536 values of a half word: 1..65536, 65536 = no dropout."""
    return min(ROW_KEEP_ALL, max(1, math.floor((1.0 - dropout_p) * ROW_KEEP_ALL + 0.5)))


def row_keep_scale(dropout_p: float) -> float:
    """What kept elements of a norm's rows are multiplied by."""
    return ROW_KEEP_ALL / row_keep_threshold(dropout_p)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-7 of four counter words and two key words.

    Args:
        counter: four int64 tensors of 32-bit values, broadcast together.
        key: two int64 tensors of 32-bit values.

    Returns:
        Four int64 tensors of 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64 bits of the int64 product are those of the unsigned one; >> drags the sign in.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    rng_state: Tensor,
    batch: Tensor,
    head: Tensor,
    rows: range,
    cols: range,
    num_heads_q: int,
    dropout_p: float,
) -> Tensor:
    """Which elements of a tile of the probability matrix dropout keeps.

    Args:
        rng_state: int64 [2] = (seed, offset).
        batch: batch indices, integer, any shape that broadcasts with `head`, rng_state's device.
        head: query head indices.
        rows: query positions inside the sequence, step 1.
        cols: key positions inside the sequence, step 1.
        num_heads_q: number of query heads of the whole problem.
        dropout_p: probability of dropping an element.

    Returns:
        Boolean [*broadcast(batch, head), len(rows), len(cols)], True = kept.
    """
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    key = (seed & _WORD, ((seed >> 32) ^ (offset >> 32)) & _WORD)

    row_begin, col_begin = rows.start // _BLOCK_ROWS, cols.start // _BLOCK_COLS
    row_blocks = torch.arange(row_begin, -(-rows.stop // _BLOCK_ROWS), device=device)
    col_blocks = torch.arange(col_begin, -(-cols.stop // _BLOCK_COLS), device=device)
    lanes = col_blocks[:, None] * _LANES + torch.arange(_LANES, device=device)
    batch_head = (batch.long() * num_heads_q + head.long()) & _WORD
    words = torch.stack(
        philox(
            (row_blocks[:, None, None], lanes, batch_head[..., None, None, None], offset & _WORD),
            key,
        ),
        dim=-1,
    )  # [..., row block, column block, lane, word]

    random_bytes = words.view(torch.uint8).view(*words.shape, 8)[..., :4]  # little endian
    kept = random_bytes <= keep_threshold(dropout_p) - 1  # 256 is no uint8
    # lane = (row low, column pair), word = column / 8, byte of the word = (row / 8, column % 2).
    blocks = (len(row_blocks), len(col_blocks))
    kept = kept.reshape(*batch_head.shape, *blocks, 8, 4, 4, 2, 2)
    order = [-7, -2, -5, -6, -3, -4, -1]  # (block, / 8, % 8) of the row, (block, / 8, pair, % 2)
    kept = kept.permute(*range(batch_head.dim()), *(kept.dim() + i for i in order))
    kept = kept.reshape(*batch_head.shape, blocks[0] * _BLOCK_ROWS, blocks[1] * _BLOCK_COLS)
    first_row, first_col = row_begin * _BLOCK_ROWS, col_begin * _BLOCK_COLS
    kept = kept[..., rows.start - first_row : rows.stop - first_row, :]
    return kept[..., cols.start - first_col : cols.stop - first_col]


def row_keep_mask(rng_state: Tensor, rows: int, hidden_size: int, dropout_p: float) -> Tensor:
    """Which elements of the rows of a norm dropout keeps.

    One call of Philox gives 16 random bits to each of 8 neighbouring columns; an element is kept
    iff its bits are below the threshold. The key is that of the module's head, and

        counter = (column // 8, row low word, row high word, offset low word)

    Args:
        rng_state: int64 [2] = (seed, offset).
        rows: number of rows.
        hidden_size: number of columns.
        dropout_p: probability of dropping an element.

    Returns:
        Boolean [rows, hidden_size] on rng_state's device, True = kept.
    """
    seed, offset = rng_state[0], rng_state[1]
    key = (seed & _WORD, ((seed >> 32) ^ (offset >> 32)) & _WORD)
    row = torch.arange(rows, device=rng_state.device)[:, None]
    group = torch.arange(-(-hidden_size // 8), device=rng_state.device)
    words = torch.stack(philox((group, row & _WORD, row >> 32, offset & _WORD), key), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)
    return halves[:, :hidden_size] < row_keep_threshold(dropout_p)
