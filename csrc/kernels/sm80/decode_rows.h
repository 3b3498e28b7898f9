// Rows of the decode kernel: their softmax, and results over disjoint sets of keys merged.
#pragma once
#include <cuda_runtime.h>

#include "attention/softmax.h"
#include "core/tile_config.h"
#include "ptx/math.h"
#include "tile/mma_sm80.h"

namespace fa {

// Online softmax of two rows of a lane, as attention/softmax.h, in log2 units. Every row moves its
// reference on its own, so that a result does not depend on the other rows of its tile.
template <class T>
struct RowSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.f, 0.f};

  template <int kN, int kD>
  FA_DEVICE void step(AccumTile<1, kN>& acc_s, AccumTile<1, kD>& acc_o) {
    float high[2];
    bool moves = false;
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      high[r] = -INFINITY;
      FA_UNROLL
      for (int n = 0; n < kN; ++n)
        high[r] = fmaxf(high[r], fmaxf(acc_s.x[0][n][2 * r], acc_s.x[0][n][2 * r + 1]));
      moves |= high[r] - row_max[r] > kMaxWeightLog2<T>;  // false for -inf - -inf
    }
    if (__any_sync(0xffffffffu, moves)) {
      FA_UNROLL
      for (int r = 0; r < 2; ++r) {
        high[r] = fmaxf(high[r], __shfl_xor_sync(0xffffffffu, high[r], 1));
        high[r] = fmaxf(high[r], __shfl_xor_sync(0xffffffffu, high[r], 2));
        if (!(high[r] - row_max[r] > kMaxWeightLog2<T>)) continue;
        const float factor = ptx::ex2_approx_ftz(row_max[r] - high[r]);
        row_max[r] = high[r];
        row_sum[r] *= factor;
        FA_UNROLL
        for (int d = 0; d < kD; ++d) {
          acc_o.x[0][d][2 * r] *= factor;
          acc_o.x[0][d][2 * r + 1] *= factor;
        }
      }
    }
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float reference = finite_max(row_max[r]);
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        FA_UNROLL
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          float& weight = acc_s.x[0][n][i];
          weight = ptx::ex2_approx_ftz(weight - reference);
          row_sum[r] += weight;
        }
      }
    }
  }

  // Adds up the sums of the lanes of a quad; once, behind the last step.
  FA_DEVICE void finish() {
    FA_UNROLL
    for (float& sum : row_sum) {
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    }
  }
};

// Four columns of a row, merged from results over disjoint sets of keys. Maxima in log2 units.
struct MergedRow {
  float4 acc = {0.f, 0.f, 0.f, 0.f};
  float sum = 0.f, max = -INFINITY;

  // Makes new_max, which is no smaller, the reference.
  FA_DEVICE void rescale(float new_max) {
    const float factor = ptx::ex2_approx_ftz(max - finite_max(new_max));
    max = new_max;
    sum *= factor;
    acc = {acc.x * factor, acc.y * factor, acc.z * factor, acc.w * factor};
  }

  FA_DEVICE void add(float4 part_acc, float weight) {
    acc.x += weight * part_acc.x;
    acc.y += weight * part_acc.y;
    acc.z += weight * part_acc.z;
    acc.w += weight * part_acc.w;
  }
};

// Groups of 4 columns of a row of results that a lane has where a warp has the row: lane,
// lane + 32.
FA_HD constexpr int decode_lane_groups(int head_dim) {
  return ceil_div(head_dim / 4, kWarpSize);
}

// One row of up to kNumParts partial results, in a warp: the columns of all parts of its groups in
// each lane, the statistics of part lane % kNumParts.
template <int kHeadDim, int kNumParts>
struct PartsOfRow {
  static constexpr int kLaneGroups = decode_lane_groups(kHeadDim);
  static_assert(kWarpSize % kNumParts == 0);
  float4 acc[kNumParts][kLaneGroups];
  float2 statistics;  // maximum and sum of weights

  // The row of part 0 is at `first`, that of part i at others + i * stride; num_parts of them
  // exist. They were written in this kernel: past L1.
  FA_DEVICE void load(const float* first, const float* others, int stride, int num_parts,
                      int lane) {
    const auto part_from = [&](int i) { return i == 0 ? first : others + i * stride; };
    const int own = lane % kNumParts;
    statistics = own < num_parts
                     ? __ldcg(reinterpret_cast<const float2*>(part_from(own) + kHeadDim))
                     : float2{-INFINITY, 0.f};
    FA_UNROLL
    for (int i = 0; i < kNumParts; ++i) {
      FA_UNROLL
      for (int g = 0; g < kLaneGroups; ++g) {
        const int group = lane + g * kWarpSize;
        acc[i][g] = i < num_parts && group < kHeadDim / 4
                        ? __ldcg(reinterpret_cast<const float4*>(part_from(i)) + group)
                        : float4{0.f, 0.f, 0.f, 0.f};
      }
    }
  }

  FA_DEVICE void add_to(MergedRow (&merged)[kLaneGroups]) const {
    float max = fmaxf(merged[0].max, statistics.x);
    FA_UNROLL
    for (int step = 1; step < kNumParts; step *= 2)
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
    const float weight = ptx::ex2_approx_ftz(statistics.x - finite_max(max));
    float sum = weight * statistics.y;
    FA_UNROLL
    for (int step = 1; step < kNumParts; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    FA_UNROLL
    for (MergedRow& row : merged) {
      row.rescale(max);
      row.sum += sum;
    }
    FA_UNROLL
    for (int i = 0; i < kNumParts; ++i) {
      const float part_weight = __shfl_sync(0xffffffffu, weight, i);
      FA_UNROLL
      for (int g = 0; g < kLaneGroups; ++g) merged[g].add(acc[i][g], part_weight);
    }
  }
};

}  // namespace fa
