// Merge of partial attention results that cover disjoint sets of keys (split-KV, cascades).
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) * out_s
//
// A group of threads owns a row (one query of one head), each thread 8 columns of it. The splits
// are walked once, as online softmax walks keys: out and sum are kept relative to the largest LSE
// so far, so no load waits for another. Bytes bound: every partial is read once. A split with lse_s
// == -inf saw no key: its row of out_partial is never used and may hold anything, NaN included. If
// all are -inf, out = 0 and lse = -inf.
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

template <class Out, int kVec>
__global__ void __launch_bounds__(kCombineThreads, kCombineCtasPerSm)
    combine_kernel(const __grid_constant__ CombineParams p, FastDiv by_heads, FastDiv by_seqlen,
                   FastDiv by_lanes) {
  const int rows_per_cta = kCombineThreads / by_lanes.divisor();
  const auto [cta_row, lane] = divide(threadIdx.x, by_lanes);
  const int rows = p.batch_size * p.seqlen * p.num_heads;  // the plan keeps it below 2^31
  const int row = blockIdx.x * rows_per_cta + cta_row;
  if (cta_row >= rows_per_cta || row >= rows) return;  // lanes need not divide the CTA
  const auto [token_row, head] = divide(row, by_heads);
  const auto [batch, token] = divide(token_row, by_seqlen);

  const float* lse_partial = p.lse_partial + batch * p.lse_partial_batch_stride +
                             token * p.lse_partial_token_stride + head * p.lse_partial_head_stride;
  const float* out_partial = p.out_partial + batch * p.out_partial_strides.batch +
                             token * p.out_partial_strides.token +
                             head * p.out_partial_strides.head;
  Out* out = static_cast<Out*>(p.out) + batch * p.out_strides.batch + token * p.out_strides.token +
             head * p.out_strides.head;

  for (int column = lane * kVec; column < p.head_dim_v; column += by_lanes.divisor() * kVec) {
    PartialMerge<kVec> merged;
    for (int split = 0; split < p.num_splits; split += kCombineUnroll) {
      Vec<float, kVec> part[kCombineUnroll];
      float lse[kCombineUnroll];
      FA_UNROLL
      for (int u = 0; u < kCombineUnroll; ++u) {
        const int64_t at = split + u;
        lse[u] = -INFINITY;
        if (at >= p.num_splits) continue;
        lse[u] = lse_partial[at * p.lse_partial_split_stride];
        part[u] = load_vec<kVec>(out_partial + at * p.out_partial_split_stride + column);
      }
      FA_UNROLL
      for (int u = 0; u < kCombineUnroll; ++u) merged.add(lse[u], part[u]);
    }
    FA_UNROLL
    for (float& x : merged.acc) x *= merged.inverse_sum();
    Vec<Out, kVec> result;
    from_float(merged.acc, result);
    store_vec(out + column, result);
    if (column == 0) p.lse[row] = merged.lse();
  }
}

template <class Out>
int launch_combine(const CombineParams& p, cudaStream_t stream) {
  const int vec = p.vectorized ? kCombineVec : 1;
  const int rows = p.batch_size * p.seqlen * p.num_heads;
  const int ctas = ceil_div(rows, combine_rows_per_cta(p.head_dim_v, vec));
  const auto kernel = p.vectorized ? combine_kernel<Out, kCombineVec> : combine_kernel<Out, 1>;
  kernel<<<ctas, kCombineThreads, 0, stream>>>(p, FastDiv(p.num_heads), FastDiv(p.seqlen),
                                               FastDiv(combine_lanes_per_row(p.head_dim_v, vec)));
  return cudaGetLastError();
}

}  // namespace fa
