// SM90's kernels of decode: wgmma for tiles of kDecodeWgmmaRows rows where it is built, else
// mma.sync, for few rows with CTAs that suit the number of tiles.
#pragma once
#include "core/tile_config.h"
#include "kernels/instantiate.h"

namespace fa {

template <class T, int kHeadDim>
int launch_sm90_decode(const DecodeParams& p, cudaStream_t stream) {
  if constexpr (sm90_decode_tile_config(kHeadDim, DecodeTiles::kMany).tile_m > 0) {
    if (p.tile_m == kDecodeWgmmaRows) return launch_decode_wgmma<T, kHeadDim>(p, stream);
  }
  if (p.tile_m == kDecodeManyRows) return launch_decode_many_rows<T, kHeadDim>(p, stream);
  constexpr DecodeCtas kFew = sm90_decode_ctas(kHeadDim, DecodeTiles::kFew);
  constexpr DecodeCtas kMany = sm90_decode_ctas(kHeadDim, DecodeTiles::kMany);
  if (p.num_threads == decode_config(kHeadDim, kFew).num_threads())
    return launch_decode_few_rows<T, kHeadDim, kFew>(p, stream);
  return launch_decode_few_rows<T, kHeadDim, kMany>(p, stream);
}

}  // namespace fa
