// Online softmax over the accumulators of a warp, with lazy rescaling.
//
// FlashAttention-2, arXiv:2307.08691, algorithm 1, with one change: row_max is only a point of
// reference. It moves when a score exceeds it by more than a factor of 2^kMaxWeightLog2, so the
// weights of a row are at most that, and in most steps neither the maximum is exchanged between
// lanes nor is acc_o multiplied. LSE and the output do not depend on the point of reference, but
// for one rounding: the largest weight, a power of two in the textbook's form, is rounded like the
// others. The first block always sets the reference, as -inf is below any score.
#pragma once
#include "core/online_softmax.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "tile/mma_sm80.h"

namespace fa {

// A row that one key dominates is exact in plain fp16; so that twice the error of plain PyTorch
// stays the bound there, fp16's reference follows closely (1 to 4 % slower). In bf16 the rounding
// of the scores themselves outweighs that of the largest weight.
template <class T>
constexpr float kMaxWeightLog2 = std::is_same_v<T, __half> ? 1.f : 8.f;

// How the lanes that hold parts of the same rows agree, beyond the quad: any() is true for all of
// them if it is for one; combine() replaces each row's value, which the quad shares already, by
// that over all parts.

// All keys of a row in one warp.
struct RowsOfWarp {
  FA_DEVICE bool any(bool predicate) const { return __any_sync(0xffffffffu, predicate); }
  template <int kRows, class Combine>
  FA_DEVICE void combine(float (&)[kRows], Combine) const {}
};

// Two warps, each with half of the keys of the same rows.
struct RowsOfPair {
  int barrier;    // named barrier of the pair
  int part;       // 0 or 1
  float* buffer;  // [2, rows of the pair], in shared memory

  FA_DEVICE bool any(bool predicate) const {
    return ptx::bar_red_or(barrier, 2 * kWarpSize, predicate);
  }
  // The buffer is free again when both have met at the barrier once more, as any() does.
  template <int kRows, class Combine>
  FA_DEVICE void combine(float (&values)[kRows], Combine combine_two) const {
    const int lane = threadIdx.x % kWarpSize;
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) buffer[(part * kRows + r) * 8 + lane / 4] = values[r];
    ptx::bar_sync(barrier, 2 * kWarpSize);  // both halves are written
    FA_UNROLL
    for (int r = 0; r < kRows; ++r)
      values[r] = combine_two(values[r], buffer[((1 - part) * kRows + r) * 8 + lane / 4]);
  }
};

// Weights are 2^(scale_log2 (score - row_max)); scale_log2 > 0 is passed to each call, because a
// kernel that has it as a parameter spends no register on it.
//
// Rows of one lane: row 2 m + h is row l / 4 + 8 h of band m; the four lanes of a quad share it.
template <class T, int kM>
struct OnlineSoftmax {
  static constexpr int kRows = 2 * kM;
  float row_max[kRows];  // reference score, the same in the quad; -inf: no key kept so far
  float row_sum[kRows];  // of the weights in this lane's columns

  FA_DEVICE OnlineSoftmax() {
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = -INFINITY;
      row_sum[r] = 0.f;
    }
  }

  // Scores become weights; acc_o and row_sum are made relative to the new row_max if it moves.
  template <int kN, int kD, class Rows>
  FA_DEVICE void step(AccumTile<kM, kN>& acc_s, AccumTile<kM, kD>& acc_o, float scale_log2,
                      const Rows& rows) {
    float tile_max[kRows];
    bool moves = false;
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      tile_max[r] = maximum(acc_s, r);
      moves |=
          (tile_max[r] - row_max[r]) * scale_log2 > kMaxWeightLog2<T>;  // false for -inf - -inf
    }
    if (rows.any(moves)) {
      float factor[kRows];
      move_reference(tile_max, factor, scale_log2, rows);
      rescale(acc_o, factor);
    }
    weigh_far(acc_s, scale_log2);
  }

  // step() in parts, for a kernel whose acc_o is still being added to: start() for the first block,
  // follow() for the others, then weigh_far().
  template <int kN>
  FA_DEVICE void start(const AccumTile<kM, kN>& acc_s, float scale_log2) {
    float factor[kRows];  // of an empty acc_o
    move_to(acc_s, scale_log2, factor);
  }

  // True, for the whole warp, if the reference moves: acc_o is to be multiplied by `factor` before
  // the block's products join it. threshold: kMaxWeightLog2 / scale_log2.
  template <int kN>
  FA_DEVICE bool follow(const AccumTile<kM, kN>& acc_s, float scale_log2, float threshold,
                        float (&factor)[kRows]) {
    // As integers, floats above a limit >= 0 compare like floats, and one instruction takes the
    // maximum of three. Rows with a limit below 0 send the warp to the exact path.
    bool moves = false;
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float limit = row_max[r] + threshold;
      moves |= __int_as_float(maximum_as_int(acc_s, r)) > limit || limit < 0.f;
    }
    if (!__any_sync(0xffffffffu, moves)) return false;
    move_to(acc_s, scale_log2, factor);
    return true;
  }

  // Scores become weights.
  template <int kN>
  FA_DEVICE void weigh(AccumTile<kM, kN>& acc_s, float scale_log2) {
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float offset = -finite_max(row_max[r]) * scale_log2;
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        FA_UNROLL
        for (int i = r % 2 * 2; i < r % 2 * 2 + 2; ++i) {
          float& weight = acc_s.x[r / 2][n][i];
          weight = ptx::ex2_approx_ftz(fmaf(weight, scale_log2, offset));
          row_sum[r] += weight;
        }
      }
    }
  }

  // weigh() for a row that one key may dominate at any distance from 0. Its weight has to be
  // exactly 1 in fp16, where the difference of two products is off by up to half an ulp of them.
  template <int kN>
  FA_DEVICE void weigh_far(AccumTile<kM, kN>& acc_s, float scale_log2) {
    if (any_far(scale_log2)) return weigh_exactly(acc_s, scale_log2);
    weigh(acc_s, scale_log2);
  }

  template <int kD>
  static FA_DEVICE void rescale(AccumTile<kM, kD>& acc_o, const float (&factor)[kRows]) {
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FA_UNROLL
      for (int d = 0; d < kD; ++d) {
        acc_o.x[r / 2][d][r % 2 * 2] *= factor[r];
        acc_o.x[r / 2][d][r % 2 * 2 + 1] *= factor[r];
      }
    }
  }

  // Adds up the sums of all lanes that share a row; call once, behind the last step.
  template <class Rows>
  FA_DEVICE void finish(const Rows& rows) {
    FA_UNROLL
    for (float& sum : row_sum) {
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    }
    rows.combine(row_sum, [](float a, float b) { return a + b; });
  }

  // LSE of a row, natural logarithm; behind finish().
  FA_DEVICE float lse(int row, float scale_log2) const {
    return row_sum[row] == 0.f
               ? -INFINITY
               : (finite_max(row_max[row]) * scale_log2 + ptx::lg2_approx_ftz(row_sum[row])) * kLn2;
  }

 protected:
  FA_DEVICE bool any_far(float scale_log2) const {
    if constexpr (std::is_same_v<T, __half>) {
      constexpr float kFar = 4096.f;  // half an ulp below: 2^-13, a quarter of fp16's next to 1
      bool far = false;
      FA_UNROLL
      for (const float high : row_max) far |= fabsf(finite_max(high) * scale_log2) >= kFar;
      return __any_sync(0xffffffffu, far);
    }
    return false;
  }

  // The largest score of a row in this lane's columns.
  template <int kN>
  static FA_DEVICE float maximum(const AccumTile<kM, kN>& acc_s, int row) {
    float high = acc_s.x[row / 2][0][row % 2 * 2];
    FA_UNROLL
    for (int n = 0; n < kN; ++n) {
      const float* x = &acc_s.x[row / 2][n][row % 2 * 2];
      high = fmaxf(high, fmaxf(x[0], x[1]));
    }
    return high;
  }

  // The same of scores read as integers: two take one instruction.
  template <int kN>
  static FA_DEVICE int maximum_as_int(const AccumTile<kM, kN>& acc_s, int row) {
    int high = __float_as_int(acc_s.x[row / 2][0][row % 2 * 2]);
    FA_UNROLL
    for (int n = 0; n < kN; ++n) {
      const float* x = &acc_s.x[row / 2][n][row % 2 * 2];
      high = max(max(high, __float_as_int(x[0])), __float_as_int(x[1]));
    }
    return high;
  }

  // weigh() that subtracts before it scales.
  template <int kN>
  FA_DEVICE void weigh_exactly(AccumTile<kM, kN>& acc_s, float scale_log2) {
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float reference = finite_max(row_max[r]);
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        FA_UNROLL
        for (int i = r % 2 * 2; i < r % 2 * 2 + 2; ++i) {
          float& weight = acc_s.x[r / 2][n][i];
          weight = ptx::ex2_approx_ftz((weight - reference) * scale_log2);
          row_sum[r] += weight;
        }
      }
    }
  }

  // Moves the reference to the largest score of acc_s where that is above it.
  template <int kN>
  FA_DEVICE void move_to(const AccumTile<kM, kN>& acc_s, float scale_log2, float (&factor)[kRows]) {
    float tile_max[kRows];
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) tile_max[r] = maximum(acc_s, r);
    move_reference(tile_max, factor, scale_log2, RowsOfWarp{});
  }

  // The new reference, row_sum relative to it, and what acc_o is to be multiplied by.
  template <class Rows>
  FA_DEVICE void move_reference(float (&tile_max)[kRows], float (&factor)[kRows], float scale_log2,
                                const Rows& rows) {
    FA_UNROLL
    for (float& high : tile_max) {
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
    }
    rows.combine(tile_max, [](float a, float b) { return fmaxf(a, b); });
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float high = fmaxf(tile_max[r], row_max[r]);
      factor[r] = ptx::ex2_approx_ftz((row_max[r] - finite_max(high)) * scale_log2);
      row_max[r] = high;
      row_sum[r] *= factor[r];
    }
  }
};

}  // namespace fa
