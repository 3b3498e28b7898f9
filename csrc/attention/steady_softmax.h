// Online softmax that keeps in registers what every step needs of the reference, which hardly ever
// moves: the exponentials of a step can begin before it is known whether it does.
#pragma once
#include <climits>

#include "attention/softmax.h"

namespace fa {

// Of OnlineSoftmax: start() and follow(), then weigh_far() or weigh_spread(). Four registers more.
template <class T, int kM>
struct SteadySoftmax : OnlineSoftmax<T, kM> {
  using Base = OnlineSoftmax<T, kM>;
  using Base::kRows, Base::row_max, Base::row_sum;
  float offset[kRows];  // -row_max in log2 units; 0: no key kept so far
  int limit[kRows];  // bits of row_max + threshold; the least int if that is below 0, where floats
                     // do not compare like their bits

  template <int kN>
  FA_DEVICE void start(const AccumTile<kM, kN>& acc_s, float scale_log2, float threshold) {
    Base::start(acc_s, scale_log2);
    keep_reference(scale_log2, threshold);
  }

  template <int kN>
  FA_DEVICE bool follow(const AccumTile<kM, kN>& acc_s, float scale_log2, float threshold,
                        float (&factor)[kRows]) {
    bool moves = false;
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) moves |= Base::maximum_as_int(acc_s, r) >= limit[r];
    if (!__any_sync(0xffffffffu, moves)) return false;
    Base::move_to(acc_s, scale_log2, factor);
    keep_reference(scale_log2, threshold);
    return true;
  }

  template <int kN>
  FA_DEVICE void weigh_far(AccumTile<kM, kN>& acc_s, float scale_log2) {
    if (Base::any_far(scale_log2)) return Base::weigh_exactly(acc_s, scale_log2);
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        FA_UNROLL
        for (int i = r % 2 * 2; i < r % 2 * 2 + 2; ++i) {
          float& weight = acc_s.x[r / 2][n][i];
          weight = ptx::ex2_approx_ftz(fmaf(weight, scale_log2, offset[r]));
          row_sum[r] += weight;
        }
      }
    }
  }

  // weigh_far() in chunks of 8 kChunk columns: the arguments of a chunk wait for a weight of the
  // one before, its sums for one of the next, through products with `zero`, which is 0 and not
  // known to the compiler. It puts all arguments first otherwise, where they compete with the
  // exponentials of other warps. Each row waits for weights of its own, so that a NaN stays in its
  // row.
  template <int kChunk, int kN>
  FA_DEVICE void weigh_spread(AccumTile<kM, kN>& acc_s, float scale_log2, float zero) {
    static_assert(kN % kChunk == 0);
    if (Base::any_far(scale_log2)) return Base::weigh_exactly(acc_s, scale_log2);
    FA_UNROLL
    for (int n = 0; n < kN + kChunk; ++n) {
      FA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        auto& x = acc_s.x[r / 2];
        const int first = n / kChunk * kChunk, i = r % 2 * 2;  // first: of the chunk
        if (n < kN) {
          const float scale = first > 0 ? fmaf(x[first - kChunk][i], zero, scale_log2) : scale_log2;
          x[n][i] = ptx::ex2_approx_ftz(fmaf(x[n][i], scale, offset[r]));
          x[n][i + 1] = ptx::ex2_approx_ftz(fmaf(x[n][i + 1], scale, offset[r]));
        }
        if (n >= kChunk) {
          const float one = n < kN ? fmaf(x[first][i], zero, 1.f) : 1.f;
          row_sum[r] = fmaf(x[n - kChunk][i], one, row_sum[r]);
          row_sum[r] = fmaf(x[n - kChunk][i + 1], one, row_sum[r]);
        }
      }
    }
  }

 private:
  FA_DEVICE void keep_reference(float scale_log2, float threshold) {
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float highest = row_max[r] + threshold;
      offset[r] = -finite_max(row_max[r]) * scale_log2;
      limit[r] = highest < 0.f ? INT_MIN : __float_as_int(highest);
    }
  }
};

}  // namespace fa
