// dK and dV of CTAs that share the query heads of a KV head: each adds its rows in fp32, and a last
// kernel rounds the sums.
//
// The sums lie in rows: dk_accum [total_k, num_heads_kv, head_dim], dv_accum likewise.
// Deterministic: the splits of a tile of keys add in ascending order. Each of their warps adds its
// own rows, and a counter for the tile says how many warps are done; CTAs start in the order of the
// splits, so whoever is waited for already runs.
#pragma once
#include <cuda_runtime.h>

#include "core/bwd_workspace.h"
#include "core/params.h"
#include "ptx/global_memory.h"
#include "ptx/reduction.h"
#include "tile/mma_sm80.h"

namespace fa {

// Waits until `num_warps` have said that they are done.
FA_DEVICE void wait_for_warps(const int* counter, int num_warps, int lane) {
  while (lane == 0 && ptx::ld_acquire_gpu_s32(counter) < num_warps) {
  }
  __syncwarp();
}
FA_DEVICE void say_warp_is_done(int* counter, int lane) {
  __threadfence();  // the additions of every lane, before lane 0 says so
  __syncwarp();
  if (lane == 0) ptx::red_release_gpu_add_s32(counter, 1);
}

// Rows of keys that a warp adds to dk_accum or dv_accum.
struct SharedGradient {
  float* sums;         // of key 0 of the sequence, this KV head
  int64_t row_stride;  // elements between keys
  int num_cols;        // from `sums` on
  int* counter;        // of the tile; nullptr: not deterministic

  static FA_DEVICE SharedGradient of(const BwdParams& p, float* accum, int num_cols, int batch,
                                     int64_t first_row, int head_kv, int n_block, int tile_n) {
    const bool varlen = p.seqlens_k.cu_seqlens != nullptr;
    const int64_t tile = bwd_dq_accum_first_row(varlen, batch, p.seqlens_k.max_seqlen,
                                                static_cast<int>(first_row), tile_n) /
                             tile_n +
                         n_block;
    const int64_t row = varlen ? first_row : static_cast<int64_t>(batch) * p.seqlens_k.max_seqlen;
    const int64_t row_stride = static_cast<int64_t>(p.num_heads_kv) * num_cols;
    return {
        accum + row * row_stride + head_kv * num_cols, row_stride, num_cols,
        p.dkv_semaphore == nullptr ? nullptr : p.dkv_semaphore + tile * p.num_heads_kv + head_kv};
  }

  // A band of 16 keys from first_key on, those before end_key.
  template <int kN>
  FA_DEVICE void add(const float (&band)[kN][4], int first_key, int end_key, float scale,
                     int lane) const {
    FA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int key = first_key + 8 * h + lane / 4;
      if (key >= end_key) continue;
      float* row = sums + key * row_stride + lane % 4 * 2;
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        if (8 * n >= num_cols) continue;
        ptx::red_global_add_v2_f32(row + 8 * n, band[n][2 * h] * scale, band[n][2 * h + 1] * scale);
      }
    }
  }
};

// dk_accum and dv_accum become dK and dV. A CTA takes a row of all heads; blockIdx.y: dK or dV.
template <class T>
__global__ void __launch_bounds__(128) round_gradients_kernel(const __grid_constant__ BwdParams p) {
  const bool is_dv = blockIdx.y == 1;
  const int chunks = (is_dv ? p.head_dim_v : p.head_dim) / 8, row = blockIdx.x;
  const bool varlen = p.seqlens_k.cu_seqlens != nullptr;
  const int batch = varlen ? 0 : row / p.seqlens_k.max_seqlen;
  const int token = varlen ? row : row % p.seqlens_k.max_seqlen;
  const float* sums =
      (is_dv ? p.dv_accum : p.dk_accum) + static_cast<int64_t>(row) * p.num_heads_kv * chunks * 8;
  const Strides& strides = is_dv ? p.dv_strides : p.dk_strides;
  T* out = static_cast<T*>(is_dv ? p.dv : p.dk) +
           element_offset(strides.batch, strides.token, strides.head, batch, token, 0);
  for (int i = threadIdx.x; i < p.num_heads_kv * chunks; i += blockDim.x) {
    const float* x = sums + i * 8;
    uint32_t pairs[4];
    FA_UNROLL
    for (int j = 0; j < 4; ++j) pairs[j] = pack<T>(x[2 * j], x[2 * j + 1]);
    ptx::st_global_v4(out + i / chunks * strides.head + i % chunks * 8,
                      uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
  }
}

template <class T>
int launch_round_gradients(const BwdParams& p, cudaStream_t stream) {
  if (p.head_splits == 1) return cudaSuccess;
  round_gradients_kernel<T><<<dim3(static_cast<unsigned>(p.total_k), 2), 128, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fa
