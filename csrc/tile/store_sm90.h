// A warp's accumulators as rounded rows in global or shared memory.
#pragma once
#include "ptx/global_memory.h"
#include "ptx/stmatrix.h"
#include "tile/mma_sm90.h"
#include "tile/smem_tile_sm90.h"

namespace fa {

// Writes one row of a lane's quad, rounded, as 16-byte chunks that the four lanes share out.
// acc: accumulators of 8 kN columns; half: 0 for row lane / 4, 1 for lane / 4 + 8.
// is_zero: zeros instead; is_stored: else nothing is written.
template <class T, int kN>
FA_DEVICE void store_row_by_quad(T* row, const float (&acc)[kN][4], int half, float scale,
                                 bool is_zero, bool is_stored, int num_cols, int lane) {
  static_assert(kN % 4 == 0);
  FA_UNROLL
  for (int n = 0; n < kN; n += 4) {
    uint32_t pairs[4];
    FA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* x = &acc[n + i][half * 2];
      pairs[i] = is_zero ? 0u : pack<T>(x[0] * scale, x[1] * scale);
    }
    transpose_in_quad(pairs, lane);
    const int chunk = n + lane % 4;
    if (is_stored && chunk * 8 < num_cols)
      ptx::st_global_v4(row + chunk * 8, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
  }
}

// Writes 16 rows of a warp from first_row on, rounded, into a tile. acc: accumulators of 8 kN
// columns; scale: for rows lane / 4 and lane / 4 + 8.
template <class T, class Tile, int kN>
FA_DEVICE void write_tile_swizzled(Tile tile, int first_row, const float (&acc)[kN][4],
                                   const float (&scale)[2], int lane) {
  static_assert(kN % 2 == 0);
  FA_UNROLL
  for (int n = 0; n < kN; n += 2) {
    uint32_t pairs[4];
    FA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* x = &acc[n + i / 2][i % 2 * 2];
      pairs[i] = pack<T>(x[0] * scale[i % 2], x[1] * scale[i % 2]);
    }
    ptx::stmatrix_x4(tile.chunk_address(first_row + lane % 16, n + lane / 16), pairs);
  }
}

}  // namespace fa
