// SmemTile: kRows x kCols 16-bit elements in shared memory, rows swizzled as core/swizzle.h says,
// and how a warp addresses its 16 x 16 blocks for ldmatrix.
#pragma once
#include <cstdint>

#include "core/accum_layout.h"
#include "core/swizzle.h"
#include "ptx/cp_async.h"

namespace fa {

template <int kNumRows, int kNumCols>
struct SmemTile {
  static constexpr int kRows = kNumRows, kCols = kNumCols;
  static constexpr int kRowBytes = 2 * kCols, kBytes = kRows * kRowBytes;
  static constexpr int kChunksPerRow = kRowBytes / kSwizzleChunkBytes;
  static_assert(kRows % 16 == 0 && kRowBytes % 64 == 0);

  uint32_t base;  // shared address, a multiple of 128

  // Address of chunk `chunk` (8 elements) of a row.
  FA_DEVICE uint32_t chunk_address(int row, int chunk) const {
    return base + swizzle_row<kRowBytes>(row, chunk * kSwizzleChunkBytes);
  }
};

// The address that one lane gives to ldmatrix for the 16 x 16 blocks of tiles of one row length.
//
// Swizzling XORs the chunk index, of which a block's column selects bits 1 and up and the lane bit
// 0. Within kPeriod blocks that is one XOR on the address; the blocks behind are a plain distance
// away. So a whole tile needs kPeriod registers, and immediates for the rest.
template <int kRowBytes>
struct BlockAddress {
  static constexpr int kPeriod = kRowBytes % 128 == 0 ? 4 : 2;
  uint32_t lane;  // offset of this lane's row and chunk in block (0, 0)

  static FA_DEVICE BlockAddress by_rows(int lane) {
    const RowCol at = ldmatrix_lane_by_rows(lane);
    return {static_cast<uint32_t>(swizzle_row<kRowBytes>(at.row, 2 * at.col))};
  }
  static FA_DEVICE BlockAddress by_columns(int lane) {
    const RowCol at = ldmatrix_lane_by_columns(lane);
    return {static_cast<uint32_t>(swizzle_row<kRowBytes>(at.row, 2 * at.col))};
  }

  // Of the block at row `row` (a multiple of 8) and column 16 * col_block.
  FA_DEVICE uint32_t offset(int row, int col_block) const {
    return (lane ^ (col_block % kPeriod * 32)) + row * kRowBytes +
           col_block / kPeriod * kPeriod * 32;
  }
};

}  // namespace fa
