// delta[b, h, i] = sum_d dout[b, i, h, d] * out[b, i, h, d] - dlse[b, h, i].
//
// dS = P * (dP - delta): the backward subtracts it in place of the softmax's own Jacobian; the
// gradient of the LSE enters here and nowhere else (FlashAttention-2, arXiv:2307.08691, alg. 2).
// A CTA takes a run of tokens of one head, a group of lanes kBwdPreprocessRowsPerGroup of them
// (bwd_preprocess_row_share in core/row_kernels.h); the heads run fastest over the grid, so that
// CTAs on the chip at the same time read whole DRAM pages.
#pragma once
#include <cuda_runtime.h>

#include "core/params.h"
#include "core/row_kernels.h"
#include "tile/vec.h"

namespace fa {

// kVectors: vectors of a row that a lane reads before it uses the first.
template <class T, int kVec, int kVectors>
__global__ void __launch_bounds__(kBwdPreprocessThreads, kBwdPreprocessCtasPerSm)
    bwd_preprocess_kernel(const __grid_constant__ BwdPreprocessParams p, int row_lanes) {
  constexpr int kRows = kBwdPreprocessRowsPerGroup;
  const int groups = kBwdPreprocessThreads / row_lanes;
  const int group = threadIdx.x / row_lanes, lane = threadIdx.x % row_lanes;
  const int rows_per_cta = groups * kRows;
  const int token_blocks = ceil_div(p.seqlen, rows_per_cta);
  const int head = blockIdx.x % p.num_heads;
  const int token_block = blockIdx.x / p.num_heads % token_blocks;
  const int batch = blockIdx.x / p.num_heads / token_blocks;

  const T* out =
      static_cast<const T*>(p.out) + batch * p.out_strides.batch + head * p.out_strides.head;
  const T* dout =
      static_cast<const T*>(p.dout) + batch * p.dout_strides.batch + head * p.dout_strides.head;
  // Row r of this group: neighbouring groups take neighbouring tokens, so that delta is written in
  // runs.
  const auto token_of = [&](int r) { return token_block * rows_per_cta + r * groups + group; };

  // dlse first: it arrives while the rows are summed up.
  float dlse[kRows] = {};
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (p.dlse == nullptr || lane != 0 || token_of(r) >= p.seqlen) continue;
    dlse[r] = p.dlse[batch * p.dlse_batch_stride + head * p.dlse_head_stride +
                     token_of(r) * p.dlse_token_stride];
  }

  float sum[kRows] = {};
  for (int begin = 0; begin < p.head_dim_v; begin += kVectors * row_lanes * kVec) {
    const auto column_of = [&](int v) { return begin + (v * row_lanes + lane) * kVec; };
    // Tokens and columns past the end read the last ones instead, so that no load waits for a
    // branch; they are not summed up or not written.
    Vec<T, kVec> o[kRows][kVectors], d[kRows][kVectors];
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int token = min(token_of(r), p.seqlen - 1);
      FA_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const int column = min(column_of(v), p.head_dim_v - kVec);
        o[r][v] = load_vec<kVec>(out + token * p.out_strides.token + column);
        d[r][v] = load_vec<kVec>(dout + token * p.dout_strides.token + column);
      }
    }
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FA_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if (column_of(v) >= p.head_dim_v) continue;
        float x[kVec], y[kVec];
        to_float(o[r][v], x);
        to_float(d[r][v], y);
        FA_UNROLL
        for (int i = 0; i < kVec; ++i) sum[r] += x[i] * y[i];
      }
    }
  }

  FA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    // All 32 lanes take part: a group is a power of two of them.
    for (int step = row_lanes / 2; step > 0; step /= 2)
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], step);
    const int token = token_of(r);
    if (lane != 0 || token >= p.seqlen) continue;
    const int64_t row = (static_cast<int64_t>(batch) * p.num_heads + head) * p.seqlen + token;
    p.delta[row] = sum[r] - dlse[r];
  }
}

template <class T>
int launch_bwd_preprocess(const BwdPreprocessParams& p, cudaStream_t stream) {
  const int vec = p.vectorized ? kVecSize<T> : 1;
  const RowShare share = bwd_preprocess_row_share(p.head_dim_v, vec);
  const int64_t ctas = static_cast<int64_t>(p.num_heads) * p.batch_size *
                       ceil_div(p.seqlen, bwd_preprocess_rows_per_cta(p.head_dim_v, vec));
  const auto kernel = !p.vectorized        ? bwd_preprocess_kernel<T, 1, 2>
                      : share.vectors == 3 ? bwd_preprocess_kernel<T, kVecSize<T>, 3>
                                           : bwd_preprocess_kernel<T, kVecSize<T>, 2>;
  kernel<<<static_cast<unsigned>(ctas), kBwdPreprocessThreads, 0, stream>>>(p, share.lanes);
  return cudaGetLastError();
}

}  // namespace fa
