// Copies of whole tiles by TMA.
#pragma once
#include "ptx/tma.h"
#include "tile/smem_tile_sm90.h"

namespace fa {

// Starts copying rows [at.row, at.row + Tile::kRows) of a head into a tile, one box a slab; counts
// Tile::kBytes on `barrier`. Columns past the tensor's become 0.
template <class Tile>
FA_DEVICE void load_tile_tma(Tile tile, const void* map, ptx::BoxOrigin at, uint32_t barrier,
                             uint64_t l2_policy) {
  FA_UNROLL
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    ptx::cp_async_bulk_tensor_4d(tile.base + slab * Tile::kSlabBytes, map, at, barrier, l2_policy);
    at.column += Tile::kSlabCols;
  }
}

// Starts copying a tile to rows [at.row, at.row + Tile::kRows) of a head, as a group of this
// thread.
template <class Tile>
FA_DEVICE void store_tile_tma(Tile tile, const void* map, ptx::BoxOrigin at) {
  FA_UNROLL
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    at.column = slab * Tile::kSlabCols;
    ptx::cp_async_bulk_tensor_4d_store(map, at, tile.base + slab * Tile::kSlabBytes);
  }
  ptx::cp_async_bulk_commit_group();
}

}  // namespace fa
