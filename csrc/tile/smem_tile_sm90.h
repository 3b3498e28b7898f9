// SwizzledTile: kRows x kCols 16-bit elements in shared memory as TMA writes and wgmma reads them.
//
// Columns are cut into slabs of 64: [kSlabs][kRows][64], the 128 bytes of a row swizzled
// (core/swizzle.h), one slab behind the other, the last one maybe with columns beyond kCols. wgmma
// finds a tile by a descriptor: address and two distances in units of 16 bytes, and the swizzle.
// PTX ISA, "Matrix Descriptor Format" and "Shared Memory Matrix Layout".
#pragma once
#include <cstdint>

#include "core/swizzle.h"

namespace fa {

template <int kNumRows, int kNumCols>
struct SwizzledTile {
  static constexpr int kRows = kNumRows, kCols = kNumCols;
  static constexpr int kSlabCols = 64, kSlabRowBytes = 2 * kSlabCols;
  static constexpr int kSlabs = (kCols + kSlabCols - 1) / kSlabCols;
  static constexpr int kSlabBytes = kRows * kSlabRowBytes, kBytes = kSlabs * kSlabBytes;
  static constexpr int kGroupBytes = 8 * kSlabRowBytes;  // period of the swizzle
  static_assert(kRows % 8 == 0 && kCols % 16 == 0);

  uint32_t base;  // shared address, a multiple of kGroupBytes

  // Address of chunk `chunk` (8 elements) of a row.
  FA_DEVICE uint32_t chunk_address(int row, int chunk) const {
    return base + chunk / 8 * kSlabBytes + swizzle_128b(row, chunk % 8 * kSwizzleChunkBytes);
  }

  // As an operand whose k runs along the columns.
  FA_DEVICE uint64_t k_major() const { return descriptor(kSwizzleChunkBytes); }
  // Where its k-step (16 columns) begins, added to k_major().
  static FA_DEVICE constexpr int k_major_step(int k) {
    return k / 4 * (kSlabBytes / 16) + k % 4 * 2;
  }

  // As an operand whose k runs along the rows; 16 rows are kMnMajorStep.
  FA_DEVICE uint64_t mn_major() const { return descriptor(kSlabBytes); }
  static constexpr int kMnMajorStep = 16 * kSlabRowBytes / 16;

 private:
  // leading_bytes: between slabs, of no meaning to an operand whose k runs along the columns.
  FA_DEVICE uint64_t descriptor(int leading_bytes) const {
    constexpr uint64_t kSwizzle128b = uint64_t{1} << 62;
    return kSwizzle128b | uint64_t{kGroupBytes / 16} << 32 |
           static_cast<uint64_t>(leading_bytes / 16) << 16 | (base & 0x3FFFF) >> 4;
  }
};

}  // namespace fa
