// Rotary position embedding in registers. RoFormer, arXiv:2104.09864.
//
// (a, b) at position p and pair i becomes (a cos - b sin, b cos + a sin) with cos, sin = row p,
// column i of the tables. A thread holds one unit (core/row_kernels.h) of a row: kVec pairs in two
// vectors. Every head of a token turns by the same angles, so a thread reads them once and turns
// its unit of several heads.
#pragma once
#include "core/params.h"
#include "core/row_kernels.h"
#include "tile/vec.h"

namespace fa {

// cos and sin of the pairs of a unit at `position`; the identity outside the table. Interleaved,
// the first half belongs to the first vector.
template <class T, int kVec>
struct RotaryAngles {
  float cos[kVec], sin[kVec];

  FA_DEVICE RotaryAngles(const RotaryTable& table, int position, UnitColumns columns) {
    if (position < 0 || position >= table.num_positions) {
      FA_UNROLL
      for (int i = 0; i < kVec; ++i) {
        cos[i] = 1.f;
        sin[i] = 0.f;
      }
      return;
    }
    const int64_t row = position * table.row_stride;
    const T* cos_row = static_cast<const T*>(table.cos) + row;
    const T* sin_row = static_cast<const T*>(table.sin) + row;
    if (table.interleaved && kVec > 1) {
      constexpr int kHalf = kVec > 1 ? kVec / 2 : 1;
      load<kHalf>(cos_row + columns.first / 2, cos);
      load<kHalf>(sin_row + columns.first / 2, sin);
      load<kHalf>(cos_row + columns.second / 2, cos + kVec / 2);
      load<kHalf>(sin_row + columns.second / 2, sin + kVec / 2);
    } else {
      const int pair = table.interleaved ? columns.first / 2 : columns.first;
      load<kVec>(cos_row + pair, cos);
      load<kVec>(sin_row + pair, sin);
    }
    if (table.conjugate) {
      FA_UNROLL
      for (int i = 0; i < kVec; ++i) sin[i] = -sin[i];
    }
  }

 private:
  template <int N>
  static FA_DEVICE void load(const T* from, float* to) {
    float x[N];
    to_float(load_vec_l1<N>(from), x);
    FA_UNROLL
    for (int i = 0; i < N; ++i) to[i] = x[i];
  }
};

// The two vectors of a unit.
template <class T, int kVec>
struct RowUnit {
  Vec<T, kVec> first, second;
};

template <class T, int kVec>
FA_DEVICE void rotate(RowUnit<T, kVec>& unit, const RotaryAngles<T, kVec>& angles,
                      bool interleaved) {
  float x[2][kVec];  // the two vectors
  to_float(unit.first, x[0]);
  to_float(unit.second, x[1]);
  const auto turn = [&](float& a, float& b, int pair) {
    const float old_a = a;
    a = old_a * angles.cos[pair] - b * angles.sin[pair];
    b = b * angles.cos[pair] + old_a * angles.sin[pair];
  };
  if (interleaved && kVec > 1) {
    FA_UNROLL
    for (int i = 0; i < 2 * kVec; i += 2)
      turn(x[i / kVec][i % kVec], x[i / kVec][(i + 1) % kVec], i / 2);
  } else {
    FA_UNROLL
    for (int i = 0; i < kVec; ++i) turn(x[0][i], x[1][i], i);
  }
  from_float(x[0], unit.first);
  from_float(x[1], unit.second);
}

// The heads whose units a thread moves, and how they follow each other in one tensor.
struct HeadGroup {
  int first, step;  // heads first, first + step, ...
  int num_heads;    // of the whole token; first < num_heads

  FA_DEVICE HeadGroup(int group, int num_heads)
      : first(group), step(num_head_groups(num_heads)), num_heads(num_heads) {}
  FA_DEVICE int head(int i) const { return first + i * step; }
  FA_DEVICE bool has(int i) const { return head(i) < num_heads; }
};

// One unit of the kHeads heads of one token that a thread moves. Loading, turning and storing are
// separate steps, so that the loads are under way while the caller finds out where the row goes.
template <class T, int kVec, int kHeads>
struct HeadUnits {
  RowUnit<T, kVec> units[kHeads];

  // token: its head 0. What is not there is loaded from the first head or vector instead, so that
  // no load waits for a branch; it is not stored.
  FA_DEVICE void load(const T* token, int64_t head_stride, HeadGroup heads, UnitColumns columns) {
    const int second = columns.has_second ? columns.second : columns.first;
    FA_UNROLL
    for (int i = 0; i < kHeads; ++i) {
      const T* row = token + (heads.has(i) ? heads.head(i) : heads.first) * head_stride;
      units[i].first = load_vec_l1<kVec>(row + columns.first);
      units[i].second = load_vec_l1<kVec>(row + second);
    }
  }

  FA_DEVICE void turn(const RotaryTable& table, int position, UnitColumns columns) {
    if (!columns.rotates) return;
    const RotaryAngles<T, kVec> angles(table, position, columns);
    if (table.interleaved) {
      FA_UNROLL
      for (RowUnit<T, kVec>& unit : units) rotate(unit, angles, true);
    } else {
      FA_UNROLL
      for (RowUnit<T, kVec>& unit : units) rotate(unit, angles, false);
    }
  }

  FA_DEVICE void store(T* token, int64_t head_stride, HeadGroup heads, UnitColumns columns) const {
    FA_UNROLL
    for (int i = 0; i < kHeads; ++i) {
      if (!heads.has(i)) continue;
      T* row = token + heads.head(i) * head_stride;
      store_vec(row + columns.first, units[i].first);
      if (columns.has_second) store_vec(row + columns.second, units[i].second);
    }
  }
};

}  // namespace fa
