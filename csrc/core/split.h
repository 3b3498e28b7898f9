// Split-KV: how many CTAs share the keys of one (m_block, head, batch), and which blocks each
// takes.
//
// Integers only. In floating point, exact ties of the occupancy rule (61 tiles, 108 SMs, 88
// n_blocks at 85 %) decide differently in C++ and Python; cross-multiplied integers do not.
#pragma once
#include "core/host_device.h"
#include "core/mask.h"

namespace fa {

// Part `split` of `r` in num_splits contiguous parts of equal size, the last ones smaller or empty.
FA_HD constexpr Range split_range(Range r, int split, int num_splits) {
  const int per_split = ceil_div(max(0, r.size()), num_splits);
  const int begin = min(max(r.begin, r.end), r.begin + split * per_split);
  return {begin, min(max(r.begin, r.end), begin + per_split)};
}

// The same for the blocks of a tile: the part's own maskless interior.
FA_HD constexpr BlockRange split_blocks(BlockRange r, int split, int num_splits) {
  const Range part = split_range({r.begin, r.end}, split, num_splits);
  if (part.size() == 0) return {0, 0, 0, 0};
  return {part.begin, part.end, clamp(r.full_begin, part.begin, part.end),
          clamp(r.full_end, part.begin, part.end)};
}

// How full a launch of `tiles` equal CTAs keeps the SMs, as the exact ratio used / offered.
struct Occupancy {
  int64_t used, offered;
};
FA_HD constexpr Occupancy occupancy(int64_t tiles, int num_sms) {
  return {tiles, ceil_div<int64_t>(tiles, num_sms) * num_sms};
}
// a >= percent / 100 * b.
FA_HD constexpr bool at_least(Occupancy a, int percent, Occupancy b) {
  return 100 * a.used * b.offered >= percent * b.used * a.offered;
}

// True iff num_splits parts of num_n_blocks blocks are all non-empty.
FA_HD constexpr bool no_empty_split(int num_n_blocks, int num_splits) {
  return ceil_div(num_n_blocks, ceil_div(num_n_blocks, num_splits)) == num_splits;
}

// Smallest number of splits within 85 % of the best occupancy (the rule of FlashAttention-2).
//
// num_tiles: CTAs without splitting. 1 if they keep 80 % of the SMs busy already. Example: 48 tiles
// on 108 SMs: 2 splits use 96 of 108 SMs, 3 use 144 of 216; the answer is 2.
// num_tiles in [0, 2^40], num_sms >= 1, max_splits >= 1.
FA_HD constexpr int choose_num_splits(int64_t num_tiles, int num_sms, int num_n_blocks,
                                      int max_splits) {
  if (num_tiles <= 0 || num_n_blocks <= 1 || num_tiles * 5 >= int64_t{num_sms} * 4) return 1;
  const int limit = min(max_splits, min(num_sms, num_n_blocks));
  Occupancy best{0, 1};
  for (int s = 1; s <= limit; ++s) {
    const Occupancy candidate = occupancy(num_tiles * s, num_sms);
    if (no_empty_split(num_n_blocks, s) && at_least(candidate, 100, best)) best = candidate;
  }
  for (int s = 1; s <= limit; ++s) {
    const Occupancy candidate = occupancy(num_tiles * s, num_sms);
    if (no_empty_split(num_n_blocks, s) && at_least(candidate, 85, best)) return s;
  }
  return 1;
}

static_assert(choose_num_splits(48, 108, 64, 128) == 2);   // the example above
static_assert(choose_num_splits(100, 108, 64, 128) == 1);  // full enough

}  // namespace fa
