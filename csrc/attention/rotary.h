// Rotary position embedding of a few pairs of one head, in registers. RoFormer, arXiv:2104.09864.
//
// (a, b) at position p and pair i becomes (a cos - b sin, b cos + a sin) with cos, sin = row p,
// column i of the tables. Rows of the tables are read many times (once a head), so they go through
// L1, unlike the rotated data.
#pragma once
#include "core/params.h"
#include "tile/vec.h"

namespace fa {

// cos and sin of pairs [pair, pair + kPairs) at `position`; the identity outside the table.
template <class T, int kPairs>
struct RotaryAngles {
  float cos[kPairs], sin[kPairs];

  FA_DEVICE RotaryAngles(const RotaryTable& table, int position, int pair) {
    const bool inside = position >= 0 && position < table.num_positions;
    const int64_t at = inside ? position * table.row_stride + pair : 0;
    Vec<T, kPairs> c{}, s{};
    if (inside) {
      c = *reinterpret_cast<const Vec<T, kPairs>*>(static_cast<const T*>(table.cos) + at);
      s = *reinterpret_cast<const Vec<T, kPairs>*>(static_cast<const T*>(table.sin) + at);
    }
    FA_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      cos[i] = inside ? to_float(c.x[i]) : 1.f;
      sin[i] = inside ? to_float(s.x[i]) : 0.f;
      if (table.conjugate) sin[i] = -sin[i];
    }
  }
};

// Rotates unit `unit` of one head's row from src to dst (which may be the same row).
//
// A unit is what one thread moves: interleaved, kVec consecutive elements (kVec / 2 pairs); else
// kVec elements of the first half and their partners in the second. kVec is even or 1, and with
// kVec == 1 an interleaved unit is one pair.
template <int kVec, class T>
FA_DEVICE void rotate_unit(const RotaryTable& table, int position, int unit, const T* src, T* dst) {
  if (table.interleaved) {
    constexpr int kPairs = kVec == 1 ? 1 : kVec / 2;
    const int column = unit * 2 * kPairs;
    Vec<T, 2 * kPairs> x = load_vec<2 * kPairs>(src + column);
    const RotaryAngles<T, kPairs> angle(table, position, unit * kPairs);
    FA_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const float a = to_float(x.x[2 * i]), b = to_float(x.x[2 * i + 1]);
      x.x[2 * i] = from_float<T>(a * angle.cos[i] - b * angle.sin[i]);
      x.x[2 * i + 1] = from_float<T>(b * angle.cos[i] + a * angle.sin[i]);
    }
    store_vec(dst + column, x);
  } else {
    const int first = unit * kVec, second = first + table.rotary_dim / 2;
    Vec<T, kVec> lo = load_vec<kVec>(src + first), hi = load_vec<kVec>(src + second);
    const RotaryAngles<T, kVec> angle(table, position, first);
    FA_UNROLL
    for (int i = 0; i < kVec; ++i) {
      const float a = to_float(lo.x[i]), b = to_float(hi.x[i]);
      lo.x[i] = from_float<T>(a * angle.cos[i] - b * angle.sin[i]);
      hi.x[i] = from_float<T>(b * angle.cos[i] + a * angle.sin[i]);
    }
    store_vec(dst + first, lo);
    store_vec(dst + second, hi);
  }
}

// Units of the rotated part of a row. Interleaved units are half as many pairs for kVec > 1.
template <int kVec>
FA_HD constexpr int rotary_units(const RotaryTable& table) {
  const int pairs_per_unit = table.interleaved && kVec > 1 ? kVec / 2 : kVec;
  return table.rotary_dim / 2 / pairs_per_unit;
}

}  // namespace fa
