// Products of a warpgroup with wgmma: 64 rows, accumulators in registers. They are issued, not
// finished: the caller fences before, commits the group and waits for it.
#pragma once
#include "ptx/wgmma.h"
#include "tile/mma_sm80.h"
#include "tile/smem_tile_sm90.h"

namespace fa {

// acc = A B^T, or acc += A B^T; a: [64, k], b: [8 kN, k].
template <class T, int kN, class TileA, class TileB>
FA_DEVICE void warpgroup_gemm_abt(AccumTile<1, kN>& acc, TileA a, TileB b,
                                  bool accumulate = false) {
  static_assert(TileA::kRows == 64 && TileB::kRows == 8 * kN && TileA::kCols == TileB::kCols);
  const uint64_t a_desc = a.k_major(), b_desc = b.k_major();
  FA_UNROLL
  for (int k = 0; k < TileA::kCols / 16; ++k) {
    ptx::wgmma_m64k16_ss<T>(acc.x[0], a_desc + TileA::k_major_step(k),
                            b_desc + TileB::k_major_step(k), accumulate || k > 0);
  }
}

// acc += A B; a: [64, 16 kK] in registers, b: [16 kK, 8 kN].
template <class T, int kK, int kN, class TileB>
FA_DEVICE void warpgroup_gemm_ab(AccumTile<1, kN>& acc, const AFragments<1, kK>& a, TileB b) {
  static_assert(TileB::kRows == 16 * kK && TileB::kCols == 8 * kN);
  const uint64_t b_desc = b.mn_major();
  FA_UNROLL
  for (int k = 0; k < kK; ++k)
    ptx::wgmma_m64k16_rs<T>(acc.x[0], a.x[0][k], b_desc + k * TileB::kMnMajorStep);
}

// acc += A B; a: [64, k], b: [k, 8 kN].
template <class T, int kN, class TileA, class TileB>
FA_DEVICE void warpgroup_gemm_ab(AccumTile<1, kN>& acc, TileA a, TileB b) {
  static_assert(TileA::kRows == 64 && TileB::kCols == 8 * kN && TileA::kCols == TileB::kRows);
  const uint64_t a_desc = a.k_major(), b_desc = b.mn_major();
  FA_UNROLL
  for (int k = 0; k < TileA::kCols / 16; ++k)
    ptx::wgmma_m64k16_ss_ab<T>(acc.x[0], a_desc + TileA::k_major_step(k),
                               b_desc + k * TileB::kMnMajorStep);
}

// acc = A B^T, or acc += A B^T; a: [64, 16 kK] in registers, b: [8 kN, 16 kK].
template <class T, int kK, int kN, class TileB>
FA_DEVICE void warpgroup_gemm_abt(AccumTile<1, kN>& acc, const AFragments<1, kK>& a, TileB b,
                                  bool accumulate = false) {
  static_assert(TileB::kRows == 8 * kN && TileB::kCols == 16 * kK);
  const uint64_t b_desc = b.k_major();
  FA_UNROLL
  for (int k = 0; k < kK; ++k)
    ptx::wgmma_m64k16_rs_k<T>(acc.x[0], a.x[0][k], b_desc + TileB::k_major_step(k),
                              accumulate || k > 0);
}

// acc = A^T B, or acc += A^T B; a: [k, 64], b: [k, 8 kN].
template <class T, int kN, class TileA, class TileB>
FA_DEVICE void warpgroup_gemm_atb(AccumTile<1, kN>& acc, TileA a, TileB b, bool accumulate) {
  static_assert(TileA::kCols == 64 && TileB::kCols == 8 * kN && TileA::kRows == TileB::kRows);
  const uint64_t a_desc = a.mn_major(), b_desc = b.mn_major();
  FA_UNROLL
  for (int k = 0; k < TileA::kRows / 16; ++k) {
    ptx::wgmma_m64k16_ss_mn<T>(acc.x[0], a_desc + k * TileA::kMnMajorStep,
                               b_desc + k * TileB::kMnMajorStep, accumulate || k > 0);
  }
}

// Lane c of each quad gets word c of its four lanes, in their order: x[i] becomes x[c] of lane i.
FA_DEVICE void transpose_in_quad(uint32_t (&x)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1);
  const uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
  (odd ? x[0] : x[1]) = a;
  (odd ? x[2] : x[3]) = b;
  const uint32_t c = __shfl_xor_sync(0xffffffffu, upper ? x[0] : x[2], 2);
  const uint32_t d = __shfl_xor_sync(0xffffffffu, upper ? x[1] : x[3], 2);
  (upper ? x[0] : x[2]) = c;
  (upper ? x[1] : x[3]) = d;
}

}  // namespace fa
