// Copies of whole tiles between global and shared memory by the threads of a CTA, 16 bytes at a
// time.
//
// A group of 8 threads (4 if a row is an odd number of 64 bytes) moves 128 (64) bytes of a row at a
// time, so that global accesses are whole sectors and shared ones meet no bank conflict. A thread
// keeps its place in the group of 8 rows, hence its swizzle: all its shared addresses are one
// register and immediates.
#pragma once
#include "core/seqlen.h"
#include "ptx/opaque.h"
#include "tile/smem_tile.h"

namespace fa {

// Rows of a tensor in global memory that one tile covers.
template <class T>
struct GmemRows {
  T* first;            // element 0 of row 0
  int64_t row_stride;  // elements
  int num_rows;        // that exist; may exceed the tile
  int num_cols;        // that exist, a multiple of 8
};

template <class Tile, int kThreads>
struct TileCopy {
  static constexpr int kLanes =
      Tile::kRowBytes % 128 == 0 ? 8 : 4;  // threads side by side in a row
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static constexpr int kPasses = ceil_div(Tile::kRows, kRowsPerPass);
  static constexpr int kChunks = Tile::kChunksPerRow / kLanes;  // of a thread in one row
  static_assert(kThreads % kLanes == 0 && Tile::kChunksPerRow % kLanes == 0);
  static_assert(kRowsPerPass % 8 == 0);
  static_assert(Tile::kRows % kRowsPerPass == 0 || kPasses == 1);
};

// Starts copying; rows and columns that do not exist become 0. The caller commits the group.
template <int kThreads, class T, class Tile>
FA_DEVICE void load_tile_async(Tile smem, GmemRows<const T> gmem, int thread) {
  using Copy = TileCopy<Tile, kThreads>;
  // The addresses shall not be kept in registers through the caller's loop.
  thread = ptx::opaque(thread);
  const int first_row = thread / Copy::kLanes, first_chunk = thread % Copy::kLanes;
  if (first_row >= Tile::kRows) return;
  const uint32_t to = smem.chunk_address(first_row, first_chunk);
  const T* from = gmem.first + first_row * gmem.row_stride + first_chunk * 8;
  FA_UNROLL
  for (int pass = 0; pass < Copy::kPasses; ++pass) {
    const bool row_exists = first_row + pass * Copy::kRowsPerPass < gmem.num_rows;
    FA_UNROLL
    for (int i = 0; i < Copy::kChunks; ++i) {
      const bool exists = row_exists && (first_chunk + i * Copy::kLanes) * 8 < gmem.num_cols;
      ptx::cp_async_cg_16(
          to + pass * Copy::kRowsPerPass * Tile::kRowBytes + i * Copy::kLanes * kSwizzleChunkBytes,
          from + i * Copy::kLanes * 8, exists ? 16 : 0);
    }
    from += Copy::kRowsPerPass * gmem.row_stride;
  }
}

}  // namespace fa
