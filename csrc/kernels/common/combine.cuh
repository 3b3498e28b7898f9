// Merge of partial attention results that cover disjoint sets of keys (split-KV, cascades).
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) * out_s
//
// A group of lanes owns one row (one query of one head): each lane 4 columns at a time, all splits.
// Bytes bound: every partial is read once. A split with lse_s == -inf saw no key: its row of
// out_partial is never used and may hold anything, NaN included. If all are -inf, out = 0.
#pragma once
#include <cuda_runtime.h>

#include "core/params.h"
#include "ptx/math.h"
#include "tile/vec.h"

namespace fa {

constexpr int kCombineThreads = 128;
// 64 registers a thread. Left alone, ptxas aims at 32 for the scalar kernel on sm_90 and spills.
constexpr int kCombineCtasPerSm = 8;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// LSE of `n` values `stride` apart, natural log. Any NaN makes the result NaN, as a sum would.
FA_DEVICE float log_sum_exp(const float* lse, int64_t stride, int n) {
  float max = -INFINITY;
  for (int s = 0; s < n; ++s) max = fmaxf(max, lse[s * stride]);
  const float shift = max == -INFINITY ? 0.f : max;  // -inf - -inf would be NaN
  float sum = 0.f;
  for (int s = 0; s < n; ++s) sum += ptx::ex2_approx_ftz((lse[s * stride] - shift) * kLog2e);
  return shift + ptx::lg2_approx_ftz(sum) * kLn2;  // sum in [1, n]: error below 2^-21
}

template <class Out, int kVec>
__global__ void __launch_bounds__(kCombineThreads, kCombineCtasPerSm)
    combine_kernel(const __grid_constant__ CombineParams p, int lanes_per_row) {
  constexpr int kUnroll = 4;  // partial rows in flight per lane
  const int rows = p.batch_size * p.seqlen * p.num_heads;
  const int row = blockIdx.x * (kCombineThreads / lanes_per_row) + threadIdx.x / lanes_per_row;
  const int lane = threadIdx.x % lanes_per_row;
  if (row >= rows) return;
  const int head = row % p.num_heads;
  const int token = row / p.num_heads % p.seqlen;
  const int batch = row / p.num_heads / p.seqlen;

  const float* lse_partial = p.lse_partial + batch * p.lse_partial_batch_stride +
                             token * p.lse_partial_token_stride + head * p.lse_partial_head_stride;
  const float* out_partial = p.out_partial + batch * p.out_partial_strides.batch +
                             token * p.out_partial_strides.token +
                             head * p.out_partial_strides.head;
  Out* out = static_cast<Out*>(p.out) + batch * p.out_strides.batch + token * p.out_strides.token +
             head * p.out_strides.head;

  const float lse = log_sum_exp(lse_partial, p.lse_partial_split_stride, p.num_splits);
  if (lane == 0) p.lse[row] = lse;
  const float shift = lse == -INFINITY ? 0.f : lse;

  for (int column = lane * kVec; column < p.head_dim_v; column += lanes_per_row * kVec) {
    float acc[kVec] = {};
    for (int split = 0; split < p.num_splits; split += kUnroll) {
      Vec<float, kVec> part[kUnroll];
      float weight[kUnroll];
      FA_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        weight[u] = 0.f;
        if (split + u < p.num_splits) {
          part[u] = load_vec<kVec>(out_partial + (split + u) * p.out_partial_split_stride + column);
          weight[u] = ptx::ex2_approx_ftz(
              (lse_partial[(split + u) * p.lse_partial_split_stride] - shift) * kLog2e);
        }
      }
      FA_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        if (weight[u] == 0.f) continue;
        FA_UNROLL
        for (int i = 0; i < kVec; ++i) acc[i] += weight[u] * part[u].x[i];
      }
    }
    Vec<Out, kVec> result;
    FA_UNROLL
    for (int i = 0; i < kVec; ++i) result.x[i] = from_float<Out>(acc[i]);
    store_vec(out + column, result);
  }
}

template <class Out>
int launch_combine(const CombineParams& p, cudaStream_t stream) {
  const int vec = p.vectorized ? 4 : 1;
  int lanes_per_row = 1;
  while (lanes_per_row < 32 && lanes_per_row * vec < p.head_dim_v) lanes_per_row *= 2;
  const int rows = p.batch_size * p.seqlen * p.num_heads;
  const int rows_per_cta = kCombineThreads / lanes_per_row;
  const auto kernel = p.vectorized ? combine_kernel<Out, 4> : combine_kernel<Out, 1>;
  kernel<<<ceil_div(rows, rows_per_cta), kCombineThreads, 0, stream>>>(p, lanes_per_row);
  return cudaGetLastError();
}

}  // namespace fa
