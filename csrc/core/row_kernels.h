// Limits and launch geometry of the kernels that work row by row: combine, bwd_preprocess, rotary,
// append_kv. A row is one head of one token. Kernels launch with these numbers and plans show them.
//
// `vec` is the number of elements that a thread moves at once: those of 16 bytes (combine: 32), or
// 1 where rows are not aligned.
#pragma once
#include "core/dtype.h"

namespace fa {

constexpr int kMaxRowHeadDim = 256;      // as for attention itself
constexpr int kMaxCombineSplits = 1024;  // every lane walks all splits of its row
constexpr int kVectorBytes = 16;         // the widest load or store of a thread

constexpr int kCombineThreads = 128;
constexpr int kCombineCtasPerSm = 6;  // 80 registers a thread; 64 would spill
constexpr int kCombineUnroll = 4;     // splits that a thread loads together
constexpr int kBwdPreprocessThreads = 128;
constexpr int kBwdPreprocessCtasPerSm = 5;  // 96 registers a thread: 48 hold loads in flight
constexpr int kBwdPreprocessRowsPerGroup = 2;
// rotary has 80 registers a thread, append_kv 72. Larger CTAs gain 1 % for rotary and lose 6 % for
// append_kv with rotary (H100, docs/performance/row_kernels.md).
constexpr int kRotaryThreads = 256;
constexpr int kRotaryCtasPerSm = 3;
constexpr int kAppendKvThreads = 128;
constexpr int kAppendKvCtasPerSm = 7;

// Elements of a partial result that a thread of combine merges: 32 bytes, so that the work that is
// done once a thread (where the row lies, the weights of the splits) is shared by enough of them.
constexpr int kCombineVec = 8;

FA_HD constexpr int elements_per_vector(DType dtype) {
  return kVectorBytes / dtype_bytes(dtype);
}

// Threads that share a row of combine; they exchange nothing.
FA_HD constexpr int combine_lanes_per_row(int head_dim_v, int vec) {
  return min(max(1, ceil_div(head_dim_v, vec)), kCombineThreads);
}
FA_HD constexpr int combine_rows_per_cta(int head_dim_v, int vec) {
  return kCombineThreads / combine_lanes_per_row(head_dim_v, vec);
}

// How bwd_preprocess shares a row: `lanes` lanes, a power of two and at most a warp, sum it up
// together and read `vectors` vectors each before they use the first.
struct RowShare {
  int lanes, vectors;
};
// Two vectors a lane, or three where fewer of them lie behind the row's end (160 in 16 bit: 8 lanes
// of three for 20 vectors, not 16 of two). Not with fewer than 8 lanes: they would read less than
// a whole cache line of a row at a time (92 instead of 95 % of a copy at 96 in 16 bit, H100).
FA_HD constexpr RowShare bwd_preprocess_row_share(int head_dim_v, int vec) {
  const int vectors = max(1, ceil_div(head_dim_v, vec));
  const int by_two = next_power_of_two(ceil_div(vectors, 2));
  const int by_three = next_power_of_two(ceil_div(vectors, 3));
  const bool three = vec > 1 && by_three >= 8 && 3 * by_three < 2 * by_two;
  return {min(three ? by_three : by_two, kWarpSize), three ? 3 : 2};
}
FA_HD constexpr int bwd_preprocess_rows_per_cta(int head_dim_v, int vec) {
  return kBwdPreprocessThreads / bwd_preprocess_row_share(head_dim_v, vec).lanes *
         kBwdPreprocessRowsPerGroup;
}

// What one thread of rotary and append_kv moves of a row is a unit: two vectors of `vec` elements.
// The rotated part is cut into halves, so is the part behind it; a unit takes the same vector of
// both halves, so that neighbouring threads touch neighbouring bytes. Not interleaved, the second
// vector holds the partners of the first; interleaved, each holds whole pairs. The part behind may
// have an odd number of vectors; then its last unit has one. The thread moves the same unit of
// kHeadsPerThread heads, which all turn by the same angles: heads group, group + num_head_groups,
// ..., so that neighbouring groups touch neighbouring heads.
constexpr int kHeadsPerThread = 2;  // or 1, where there is one head alone

FA_HD constexpr int num_head_groups(int num_heads) {
  return ceil_div(num_heads, kHeadsPerThread);
}

FA_HD constexpr int rotated_units(int rotary_dim, int vec) {
  return rotary_dim / (2 * vec);
}
FA_HD constexpr int row_units(int head_dim, int rotary_dim, int vec) {
  return rotated_units(rotary_dim, vec) + ceil_div(head_dim - rotary_dim, 2 * vec);
}

// Where unit `unit` of a row lies. vec divides head_dim, 2 vec divides rotary_dim; vec is even
// or 1.
struct UnitColumns {
  int first, second;  // first element of each vector
  bool has_second;
  bool rotates;
};
FA_HD constexpr UnitColumns unit_columns(int head_dim, int rotary_dim, bool interleaved, int vec,
                                         int unit) {
  const int rotated = rotated_units(rotary_dim, vec);
  if (unit < rotated) {
    if (interleaved && vec == 1) return {2 * unit, 2 * unit + 1, true, true};  // one pair
    return {unit * vec, unit * vec + rotary_dim / 2, true, true};
  }
  const int behind = row_units(head_dim, rotary_dim, vec) - rotated;
  const int first = rotary_dim + (unit - rotated) * vec, second = first + behind * vec;
  return {first, second, second < head_dim, false};
}

// Threads that a token needs: one for each unit of each group of heads.
FA_HD constexpr int units_per_token(int num_heads, int units_per_row) {
  return num_head_groups(num_heads) * units_per_row;
}

static_assert(combine_lanes_per_row(96, 8) == 12 && combine_lanes_per_row(256, 1) == 128);
static_assert(bwd_preprocess_row_share(128, 8).lanes == 8 &&
              bwd_preprocess_row_share(96, 8).lanes == 8 &&
              bwd_preprocess_row_share(1, 8).lanes == 1);
static_assert(bwd_preprocess_row_share(160, 8).lanes == 8 &&
              bwd_preprocess_row_share(160, 8).vectors == 3);
static_assert(row_units(128, 64, 8) == 4 + 4 && row_units(72, 64, 8) == 4 + 1);
static_assert(unit_columns(128, 64, false, 8, 1).second == 8 + 32);
static_assert(unit_columns(72, 64, true, 8, 4).first == 64 &&
              !unit_columns(72, 64, true, 8, 4).has_second);

}  // namespace fa
