// Rotary embedding: which elements of a head form a pair, and which position a token has.
//
// Pair i of rotary_dim / 2 turns by the angle in column i of the cos and sin tables. Interleaved:
// elements (2 i, 2 i + 1); otherwise (i, i + rotary_dim / 2). Elements from rotary_dim on stay.
// RoFormer, arXiv:2104.09864.
#pragma once
#include "core/host_device.h"

namespace fa {

struct RotaryPair {
  int first, second;  // elements of the head: new first = first cos - second sin,
                      //                       new second = second cos + first sin
};

// Elements of pair `pair` in [0, rotary_dim / 2).
FA_HD constexpr RotaryPair rotary_pair(int pair, int rotary_dim, bool interleaved) {
  return interleaved ? RotaryPair{2 * pair, 2 * pair + 1} : RotaryPair{pair, pair + rotary_dim / 2};
}

// The inverse: the column of cos and sin that turns element `element` in [0, rotary_dim).
FA_HD constexpr int rotary_column(int element, int rotary_dim, bool interleaved) {
  return interleaved ? element / 2 : element % (rotary_dim / 2);
}
FA_HD constexpr bool is_second_of_pair(int element, int rotary_dim, bool interleaved) {
  return interleaved ? element % 2 == 1 : element >= rotary_dim / 2;
}

// Row of the tables for token `index` of a sequence whose first token has position `base`.
// same_position: a query of non-causal decoding stands behind the whole cache, wherever it is in
// its chunk.
FA_HD constexpr int rotary_position(int base, int index, bool same_position) {
  return same_position ? base : base + index;
}

static_assert(rotary_pair(1, 8, true).first == 2 && rotary_pair(1, 8, true).second == 3);
static_assert(rotary_pair(1, 8, false).first == 1 && rotary_pair(1, 8, false).second == 5);

}  // namespace fa
