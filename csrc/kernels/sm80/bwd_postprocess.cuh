// dQ: from fp32 sums in the order of the backward's registers to rounded rows, times softmax_scale.
//
// A CTA takes a tile of queries of one head with the warps of bwd_kernel: each thread reads the
// registers that its like there added, 32 consecutive floats to a warp. Rows that exist and do not
// attend become 0.
#pragma once
#include <cuda_runtime.h>

#include "core/bwd_workspace.h"
#include "core/params.h"
#include "core/tile_scheduler.h"
#include "kernels/common/bwd_rows.h"
#include "kernels/sm80/bwd_shape.h"
#include "ptx/shared_memory.h"
#include "tile/vec.h"

namespace fa {

template <class T, int kHeadDim, Arch kTiles>
__global__ void __launch_bounds__(BwdShape<kHeadDim, kTiles>::kThreads)
    bwd_postprocess_kernel(const __grid_constant__ BwdParams p, TileGrid grid) {
  using Shape = BwdShape<kHeadDim, kTiles>;
  using Tile = typename Shape::StreamTile;
  __shared__ __align__(128) unsigned char smem_bytes[Tile::kBytes];

  const TileCoord at = tile_coord(grid, blockIdx.x, false);
  const SeqlenInfo seq = seqlen_info_or_rest(p.seqlens_q, at.batch, p.batch_size, p.total_q);
  T* head =
      static_cast<T*>(p.dq) + element_offset(p.dq_strides.batch, p.dq_strides.token,
                                             p.dq_strides.head, at.batch, seq.first_row, at.head);
  const int first = at.m_block * Shape::kTileM;
  if (first >= seq.seqlen) {
    // The rest behind the last sequence may have more tiles than the grid.
    for (int row = first; row < seq.stored; row += grid.num_m_blocks * Shape::kTileM)
      clear_rows<Shape::kThreads>(head, p.dq_strides.token,
                                  {row, min(row + Shape::kTileM, seq.stored)}, p.head_dim,
                                  threadIdx.x);
    return;
  }

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t index =
      bwd_dq_tile_index(p, Shape::kTileM, at.batch, seq.first_row, at.m_block, at.head);
  const float* sums =
      p.dq_accum + index * Shape::kDqTileElements + warp * Shape::kDqRegs * kWarpSize + lane;
  float x[Shape::kDqRegs];
  FA_UNROLL
  for (int reg = 0; reg < Shape::kDqRegs; ++reg) x[reg] = sums[reg * kWarpSize];

  const uint32_t smem = ptx::cvta_to_shared(smem_bytes);
  const RowCol part = Shape::dq_part(warp);
  FA_UNROLL
  for (int reg = 0; reg < Shape::kDqRegs; reg += 2) {
    // Registers of DqAccum: bands of 16 rows, of kDqCols / 2 registers each.
    constexpr int kBandRegs = Shape::kDqCols / 2;
    const RowCol in_band = accum_coord(lane, reg % kBandRegs);
    ptx::st_shared_u32(
        smem + swizzle_row<Tile::kRowBytes>(part.row + reg / kBandRegs * 16 + in_band.row,
                                            2 * (part.col + in_band.col)),
        pack<T>(x[reg] * p.score.softmax_scale, x[reg + 1] * p.score.softmax_scale));
  }
  __syncthreads();
  FA_UNROLL
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunksPerRow; i += Shape::kThreads) {
    const int row = i / Tile::kChunksPerRow, chunk = i % Tile::kChunksPerRow;
    if (first + row >= seq.stored || chunk * 8 >= p.head_dim) continue;
    const uint4 v = ptx::ld_shared_v4(smem + swizzle_row<Tile::kRowBytes>(row, chunk * 16));
    ptx::st_global_v4(head + (first + row) * p.dq_strides.token + chunk * 8,
                      first + row < seq.seqlen ? v : uint4{});
  }
}

template <class T, int kHeadDim, Arch kTiles>
int launch_bwd_postprocess(const BwdParams& p, int num_sequences, cudaStream_t stream) {
  using Shape = BwdShape<kHeadDim, kTiles>;
  const TileGrid grid{max(1, ceil_div(p.seqlens_q.max_seqlen, Shape::kTileM)), p.num_heads_q,
                      num_sequences};
  if (grid.size() == 0) return cudaSuccess;
  bwd_postprocess_kernel<T, kHeadDim, kTiles>
      <<<static_cast<unsigned>(grid.size()), Shape::kThreads, 0, stream>>>(p, grid);
  return cudaGetLastError();
}

}  // namespace fa
