// Rows of the backward's results and of its workspace.
#pragma once
#include "core/bwd_workspace.h"
#include "core/mask.h"
#include "core/params.h"
#include "ptx/global_memory.h"

namespace fa {

// Kernels apart, as another branch in the loop of SM80's costs it 2 to 4 % at head_dim 128.
// kCompleteDq: no score modifications, and writes dQ itself.
enum class BwdKind { kPlain, kScoreMod, kCompleteDq };

// Number of the tile (m_block, head) of a sequence in dq_accum and among the semaphores.
FA_DEVICE int64_t bwd_dq_tile_index(const BwdParams& p, int tile_m, int batch, int64_t first_row,
                                    int m_block, int head) {
  const int64_t accum_row =
      bwd_dq_accum_first_row(p.seqlens_q.cu_seqlens != nullptr, batch, p.seqlens_q.max_seqlen,
                             static_cast<int>(first_row), tile_m);
  return (accum_row / tile_m + m_block) * p.num_heads_q + head;
}

// Zeros for rows of a head that nothing else writes. A warp takes a row; `thread` of kThreads.
// num_cols <= 256.
template <int kThreads, class T>
FA_DEVICE void clear_rows(T* head, int64_t token_stride, Range rows, int num_cols,
                          unsigned thread) {
  const int column = static_cast<int>(thread % kWarpSize) * 8;
  for (int row = rows.begin + thread / kWarpSize; row < rows.end; row += kThreads / kWarpSize)
    if (column < num_cols) ptx::st_global_v4(head + row * token_stride + column, uint4{});
}

}  // namespace fa
