// How the CTAs of a decode kernel share out keys: every CTA streams the same number of key blocks,
// whatever the lengths of the sequences.
//
// The blocks of all output tiles stand in one row, tile after tile, and every CTA takes a contiguous
// part of it. So a tile may be cut, into parts that belong to consecutive CTAs; only the first and
// the last tile of a CTA are.
#pragma once
#include "core/host_device.h"
#include "core/mask.h"

namespace fa {

// [0, total) in num_parts contiguous parts, the first num_longer of which have one position more
// than the others. 32-bit divisions only: the 64-bit one of a GPU is 100 instructions.
struct WorkSplit {
  int num_parts, per_part, num_longer;

  FA_HD constexpr int begin(int part) const { return part * per_part + min(part, num_longer); }
  // The part that has position `at`, in [0, total).
  FA_HD constexpr int part_of(int at) const {
    const int in_longer = num_longer * (per_part + 1);
    return at < in_longer ? at / (per_part + 1) : num_longer + (at - in_longer) / per_part;
  }
};

// For num_ctas CTAs, each with min_blocks at least; max_splits > 1: at most max_splits of them share
// a tile of longest_tile blocks. total, num_ctas, min_blocks >= 1.
FA_HD constexpr WorkSplit split_work(int total, int num_ctas, int min_blocks, int max_splits,
                                     int longest_tile) {
  const int least =
      max_splits > 1 ? max(min_blocks, ceil_div(longest_tile, max_splits - 1)) : min_blocks;
  const int num_parts = max(1, min(num_ctas, total / least));
  return {num_parts, total / num_parts, total % num_parts};
}

// Query heads of one KV head share its keys, so a tile of a decode kernel packs them: row r is
// query r / group_size, head r % group_size of the KV head. Number of tiles for `queries`, which the
// plan keeps below 2^30 rows:
FA_HD constexpr int packed_m_blocks(int queries, int group_size, int tile_m) {
  return ceil_div(queries * group_size, tile_m);
}

static_assert(split_work(10, 3, 1, 0, 10).begin(1) == 4);  // 4, 3, 3
static_assert(split_work(10, 3, 1, 0, 10).part_of(3) == 0);
static_assert(split_work(10, 3, 1, 0, 10).part_of(4) == 1);
static_assert(split_work(100, 8, 1, 0, 50).num_parts == 8);
static_assert(split_work(100, 8, 1, 2, 50).num_parts == 2);  // no tile is in three parts
static_assert(packed_m_blocks(3, 8, 16) == 2);

}  // namespace fa
