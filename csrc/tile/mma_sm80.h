// Products of a warp with mma.sync: accumulators in registers, operands from shared memory or
// registers.
//
// A product runs k-step by k-step (16 elements); in each, the A operands of all 16-row bands are
// fetched once and every pair of B operands (16 columns) is fetched once and used for all bands.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/ldmatrix.h"
#include "ptx/mma_sm80.h"
#include "tile/smem_tile.h"

namespace fa {

// 16 kM x 8 kN sums of one warp; x[m][n][reg] is the element accum_coord(lane, 4 n + reg) of band
// m.
template <int kM, int kN>
struct AccumTile {
  float x[kM][kN][4];

  FA_DEVICE void clear() {
    FA_UNROLL
    for (auto& band : x) {
      FA_UNROLL
      for (auto& column : band) {
        FA_UNROLL
        for (float& value : column) value = 0.f;
      }
    }
  }
};

// A operands of kM bands and kK k-steps.
template <int kM, int kK>
struct AFragments {
  uint32_t x[kM][kK][4];
};

// Two elements in one register, the first in the lower half.
template <class T>
FA_DEVICE uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Accumulators of 16 kM x 16 kK as A operands: a renaming of registers, see a_operand_coord().
template <class T, int kM, int kN>
FA_DEVICE AFragments<kM, kN / 2> as_a_operand(const AccumTile<kM, kN>& acc) {
  AFragments<kM, kN / 2> a;
  FA_UNROLL
  for (int m = 0; m < kM; ++m) {
    FA_UNROLL
    for (int n = 0; n < kN; ++n) {
      a.x[m][n / 2][n % 2 * 2] = pack<T>(acc.x[m][n][0], acc.x[m][n][1]);
      a.x[m][n / 2][n % 2 * 2 + 1] = pack<T>(acc.x[m][n][2], acc.x[m][n][3]);
    }
  }
  return a;
}

// acc += A B over kK k-steps. load_a(m, k, a): A operand of band m and k-step k. load_b(n, k, b):
// the B operands of columns [16 n, 16 n + 16).
template <class T, int kK, int kM, int kN, class LoadA, class LoadB>
FA_DEVICE void warp_gemm(AccumTile<kM, kN>& acc, LoadA load_a, LoadB load_b) {
  FA_UNROLL
  for (int k = 0; k < kK; ++k) {
    uint32_t a[kM][4];
    FA_UNROLL
    for (int m = 0; m < kM; ++m) load_a(m, k, a[m]);
    FA_UNROLL
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t b[4];
      load_b(n, k, b);
      FA_UNROLL
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(acc.x[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<T>(acc.x[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace fa
