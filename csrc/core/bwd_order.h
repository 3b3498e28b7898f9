// The order in which tiles of keys add to a tile of queries in SM90's backward, where it is theirs
// alone: with the same bits from run to run, and a first that needs no zeros and a last that has
// the whole dQ.
//
// Each tile of keys walks the blocks of queries that see it upwards and around, from a block of its
// own on. With no mask, and all tiles of a head running at once, tile n begins at block
// n * num_m_blocks / num_n_blocks, and the order is that of the walks: no tile waits for another.
// Else all begin at their first block, and the order is from the last tile of keys down, as they
// are dealt out, so that whoever is waited for already runs; under a causal mask tile n meets a
// block two steps after tile n + 1.
#pragma once
#include "core/mask.h"

namespace fa {

// Whether all tiles of keys of a head run at the same time for sure, so that they may wait for each
// other in a circle. Others may have SMs, as kernels of the same kind whose last head lacks a tile.
// Deterministic: two such. Where dQ is completed, which nobody asks for: eight, as many as CUDA has
// queues unless told otherwise.
FA_HD constexpr bool bwd_heads_fit(int num_n_blocks, int num_ctas, int num_sms, bool complete_dq) {
  return (complete_dq ? 8 : 2) * num_n_blocks * num_ctas <= num_sms;
}

// Of the tiles of keys that meet a tile of queries.
struct BwdTurn {
  int before, count;  // tiles that add before this one, tiles that add

  FA_HD constexpr bool is_first() const { return before == 0; }
  FA_HD constexpr bool is_last() const { return before == count - 1; }
};

struct BwdOrder {
  MaskSpec mask;
  int tile_m, tile_n;
  int num_n_blocks;  // that are launched: fewer than there are if max_seqlen is too small, and
                     // nobody is to wait for the others
  bool heads_fit;    // all of them run at the same time

  FA_HD constexpr bool is_circle() const {
    return heads_fit && mask.window_left == kUnbounded && mask.window_right == kUnbounded;
  }
  FA_HD constexpr int num_tiles() const {
    return min(ceil_div(mask.seqlen_k, tile_n), num_n_blocks);
  }

  // Which of the blocks that it meets a tile of keys begins at. num_m_blocks: how many it meets.
  FA_HD constexpr int first_step(int n_block, int num_m_blocks) const {
    return is_circle() ? n_block * num_m_blocks / max(1, num_tiles()) : 0;
  }

  // n_block meets m_block.
  FA_HD constexpr BwdTurn turn(int n_block, int m_block) const {
    if (!is_circle()) {
      const BlockRange range = n_block_range(mask, m_block, tile_m, tile_n);
      const int end = min(range.end, num_n_blocks);
      return {end - 1 - n_block, end - range.begin};
    }
    // The last tile that begins at m_block or below adds first.
    const int tiles = num_tiles(), num_m_blocks = ceil_div(mask.seqlen_q, tile_m);
    const int first = min(tiles - 1, ((m_block + 1) * tiles - 1) / num_m_blocks);
    return {first - n_block + (n_block > first ? tiles : 0), tiles};
  }
};

}  // namespace fa
