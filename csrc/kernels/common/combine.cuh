// Merge of partial attention results that cover disjoint sets of keys (split-KV, cascades).
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) * out_s
//
// A group of threads owns a row (one query of one head) or a few, each thread 4 columns. The splits
// are walked once, as online softmax walks keys: out and sum are kept relative to the largest
// LSE so far, so no load waits for another. Bytes bound: every partial is read once.
// A split with lse_s == -inf saw no key: its row of out_partial is never used and may hold
// anything, NaN included. If all are -inf, out = 0 and lse = -inf.
#pragma once
#include <cuda_runtime.h>

#include "core/fast_div.h"
#include "core/online_softmax.h"
#include "core/params.h"
#include "core/row_kernels.h"
#include "ptx/math.h"
#include "tile/vec.h"

namespace fa {

// Partial results of one row (kVec of its columns), merged so far.
template <int kVec>
struct PartialMerge {
  float acc[kVec] = {};  // sum_s exp(lse_s - max) out_s
  float sum = 0.f;       // sum_s exp(lse_s - max)
  float max = -INFINITY;

  // Adds one split. NaN in lse makes the result NaN.
  FA_DEVICE void add(float lse, const Vec<float, kVec>& out) {
    if (lse == -INFINITY) return;
    const float new_max = fmaxf(max, lse);  // finite unless lse is +inf or NaN
    const float rescale = ptx::ex2_approx_ftz((max - new_max) * kLog2e);
    const float weight = ptx::ex2_approx_ftz((lse - new_max) * kLog2e);
    max = new_max;
    sum = sum * rescale + weight;
    FA_UNROLL
    for (int i = 0; i < kVec; ++i) acc[i] = acc[i] * rescale + weight * out.x[i];
  }

  FA_DEVICE float lse() const {
    return sum == 0.f ? -INFINITY : max + ptx::lg2_approx_ftz(sum) * kLn2;
  }
  FA_DEVICE float inverse_sum() const { return sum == 0.f ? 0.f : ptx::rcp_approx_ftz(sum); }
};

// Offsets of one row in the tensors, elements.
struct CombineRow {
  int64_t out_partial, lse_partial, out;

  FA_DEVICE CombineRow(const CombineParams& p, int row, FastDiv by_heads, FastDiv by_seqlen) {
    const auto [token_row, head] = divide(row, by_heads);
    const auto [batch, token] = divide(token_row, by_seqlen);
    out_partial = batch * p.out_partial_strides.batch + token * p.out_partial_strides.token +
                  head * p.out_partial_strides.head;
    lse_partial = batch * p.lse_partial_batch_stride + token * p.lse_partial_token_stride +
                  head * p.lse_partial_head_stride;
    out = batch * p.out_strides.batch + token * p.out_strides.token + head * p.out_strides.head;
  }
};

// kPair: at most two splits.
template <class Out, int kVec, bool kPair>
__global__ void __launch_bounds__(kCombineThreads,
                                  combine_unroll(kPair ? 2 : kMaxCombineSplits).ctas_per_sm)
    combine_kernel(const __grid_constant__ CombineParams p, FastDiv by_heads, FastDiv by_seqlen,
                   FastDiv by_lanes) {
  constexpr CombineUnroll kUnroll = combine_unroll(kPair ? 2 : kMaxCombineSplits);
  const int groups = kCombineThreads / by_lanes.divisor();
  const auto [group, lane] = divide(threadIdx.x, by_lanes);
  if (group >= groups) return;                             // lanes need not divide the CTA
  const int rows = p.batch_size * p.seqlen * p.num_heads;  // the plan keeps it below 2^31
  const int first_row = blockIdx.x * groups * kUnroll.rows + group;
  const auto row_of = [&](int r) { return first_row + r * groups; };
  const auto offsets_of = [&](int r) {
    return CombineRow(p, min(row_of(r), rows - 1), by_heads, by_seqlen);
  };

  for (int column = lane * kVec; column < p.head_dim_v; column += by_lanes.divisor() * kVec) {
    PartialMerge<kVec> merged[kUnroll.rows];
    for (int split = 0; split < p.num_splits; split += kUnroll.splits) {
      Vec<float, kVec> part[kUnroll.rows][kUnroll.splits];
      float lse[kUnroll.rows][kUnroll.splits];
      FA_UNROLL
      for (int r = 0; r < kUnroll.rows; ++r) {
        const CombineRow row = offsets_of(r);
        FA_UNROLL
        for (int u = 0; u < kUnroll.splits; ++u) {
          const int64_t at = split + u;
          lse[r][u] = -INFINITY;
          if (at >= p.num_splits) continue;
          lse[r][u] = p.lse_partial[row.lse_partial + at * p.lse_partial_split_stride];
          part[r][u] = load_vec<kVec>(p.out_partial + row.out_partial +
                                      at * p.out_partial_split_stride + column);
        }
      }
      FA_UNROLL
      for (int r = 0; r < kUnroll.rows; ++r) {
        FA_UNROLL
        for (int u = 0; u < kUnroll.splits; ++u) merged[r].add(lse[r][u], part[r][u]);
      }
    }
    FA_UNROLL
    for (int r = 0; r < kUnroll.rows; ++r) {
      if (row_of(r) >= rows) continue;
      FA_UNROLL
      for (float& x : merged[r].acc) x *= merged[r].inverse_sum();
      Vec<Out, kVec> result;
      from_float(merged[r].acc, result);
      store_vec(static_cast<Out*>(p.out) + offsets_of(r).out + column, result);
      if (column == 0) p.lse[row_of(r)] = merged[r].lse();
    }
  }
}

template <class Out>
int launch_combine(const CombineParams& p, cudaStream_t stream) {
  const int vec = p.vectorized ? kCombineVec : 1;
  const int rows = p.batch_size * p.seqlen * p.num_heads;
  const int ctas = ceil_div(rows, combine_rows_per_cta(p.head_dim_v, vec, p.num_splits));
  const bool pair = p.num_splits <= 2;
  const auto kernel = p.vectorized
                          ? (pair ? combine_kernel<Out, kCombineVec, true>
                                  : combine_kernel<Out, kCombineVec, false>)
                          : (pair ? combine_kernel<Out, 1, true> : combine_kernel<Out, 1, false>);
  kernel<<<ctas, kCombineThreads, 0, stream>>>(p, FastDiv(p.num_heads), FastDiv(p.seqlen),
                                               FastDiv(combine_lanes_per_row(p.head_dim_v, vec)));
  return cudaGetLastError();
}

}  // namespace fa
