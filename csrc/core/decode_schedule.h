// How the CTAs of a decode kernel share out keys: every CTA streams the same number of key blocks,
// whatever the lengths of the sequences.
//
// The blocks of all output tiles stand in one row, tile after tile, and part p of `num_parts` CTAs
// takes positions [begin(p), begin(p + 1)). So a tile may be cut, into parts that belong to
// consecutive CTAs; only the first and the last tile of a CTA are.
#pragma once
#include "core/host_device.h"
#include "core/mask.h"

namespace fa {

struct WorkSplit {
  int total;      // positions; >= 1
  int num_parts;  // in [1, total]

  FA_HD constexpr int begin(int part) const {
    return static_cast<int>(int64_t{part} * total / num_parts);
  }
  // The part that has position `at`, in [0, total).
  FA_HD constexpr int part_of(int at) const {
    return static_cast<int>(((int64_t{at} + 1) * num_parts - 1) / total);
  }
};

// For num_ctas CTAs, each with min_blocks at least; max_splits > 1: at most max_splits of them share
// a tile of longest_tile blocks. total, num_ctas, min_blocks >= 1.
FA_HD constexpr WorkSplit split_work(int total, int num_ctas, int min_blocks, int max_splits,
                                     int longest_tile) {
  const int least =
      max_splits > 1 ? max(min_blocks, ceil_div(longest_tile, max_splits - 1)) : min_blocks;
  return {total, max(1, min(num_ctas, total / least))};
}

// Query heads of one KV head share its keys, so a tile of a decode kernel packs them: row r is
// query r / group_size, head r % group_size of the KV head. Number of tiles for `queries`:
FA_HD constexpr int packed_m_blocks(int queries, int group_size, int tile_m) {
  return static_cast<int>(ceil_div<int64_t>(int64_t{queries} * group_size, tile_m));
}

static_assert(WorkSplit{10, 3}.begin(1) == 3 && WorkSplit{10, 3}.part_of(2) == 0);
static_assert(WorkSplit{10, 3}.part_of(3) == 1 && WorkSplit{10, 3}.part_of(9) == 2);
static_assert(split_work(100, 8, 1, 0, 50).num_parts == 8);
static_assert(split_work(100, 8, 1, 2, 50).num_parts == 2);  // no tile is in three parts
static_assert(packed_m_blocks(3, 8, 16) == 2);

}  // namespace fa
