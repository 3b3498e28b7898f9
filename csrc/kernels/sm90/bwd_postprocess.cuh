// dQ: from fp32 sums in the order of the backward's registers to rounded rows, times softmax_scale.
//
// A CTA takes a tile of queries of one head: each thread reads the registers that its like in the
// dQ warpgroup added, [column / 8][thread][4]. Rows that exist and do not attend become 0.
#pragma once
#include <cuda_runtime.h>

#include "core/accum_layout.h"
#include "kernels/common/bwd_rows.h"
#include "kernels/sm90/bwd_tile.h"
#include "ptx/global_memory.h"
#include "tile/mma_sm90.h"

namespace fa {

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kWarpgroupSize)
    bwd_postprocess_kernel(const __grid_constant__ BwdParams p, TileGrid grid) {
  const TileCoord at = tile_coord(grid, blockIdx.x, false);
  const SeqlenInfo seq = seqlen_info_or_rest(p.seqlens_q, at.batch, p.batch_size, p.total_q);
  T* head =
      static_cast<T*>(p.dq) + element_offset(p.dq_strides.batch, p.dq_strides.token,
                                             p.dq_strides.head, at.batch, seq.first_row, at.head);
  const int first = at.m_block * kBwdTileM, thread = threadIdx.x, lane = thread % kWarpSize;
  if (first >= seq.seqlen) {
    // The rest behind the last sequence may have more tiles than the grid.
    for (int row = first; row < seq.stored; row += grid.num_m_blocks * kBwdTileM)
      clear_rows<kWarpgroupSize>(head, p.dq_strides.token, {row, min(row + kBwdTileM, seq.stored)},
                                 p.head_dim, thread);
    return;
  }
  const int64_t index =
      bwd_dq_tile_index(p, kBwdTileM, at.batch, seq.first_row, at.m_block, at.head);
  const float* sums = p.dq_accum + index * (kBwdTileM * kHeadDim) + thread * 4;
  const float scale = p.score.softmax_scale;
  uint4 x[kHeadDim / 8];
  FA_UNROLL
  for (int n = 0; n < kHeadDim / 8; ++n)
    x[n] = ptx::ld_global_no_allocate_v4(sums + n * (4 * kWarpgroupSize));
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = first + thread / kWarpSize * 16 + r * 8 + lane / 4;
    FA_UNROLL
    for (int d = 0; d < kHeadDim / 8; d += 4) {
      uint32_t pairs[4];
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint4& sum = x[d + i];
        const float low = __uint_as_float(r == 0 ? sum.x : sum.z);
        const float high = __uint_as_float(r == 0 ? sum.y : sum.w);
        pairs[i] = row < seq.seqlen ? pack<T>(low * scale, high * scale) : 0u;
      }
      transpose_in_quad(pairs, lane);
      const int chunk = d + lane % 4;
      if (row < seq.stored && chunk * 8 < p.head_dim)
        ptx::st_global_v4(head + row * p.dq_strides.token + chunk * 8,
                          uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
  }
}

template <class T, int kHeadDim>
int launch_bwd_postprocess(const BwdParams& p, int num_sequences, cudaStream_t stream) {
  const TileGrid grid{max(1, ceil_div(p.seqlens_q.max_seqlen, kBwdTileM)), p.num_heads_q,
                      num_sequences};
  if (grid.size() == 0) return cudaSuccess;
  bwd_postprocess_kernel<T, kHeadDim>
      <<<static_cast<unsigned>(grid.size()), kWarpgroupSize, 0, stream>>>(p, grid);
  return cudaGetLastError();
}

}  // namespace fa
