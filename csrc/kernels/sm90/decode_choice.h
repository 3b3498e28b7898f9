// SM90's kernels of decode: wgmma for tiles of kDecodeWgmmaRows rows where it is built, else
// mma.sync, with wide CTAs or others.
#pragma once
#include "core/tile_config.h"
#include "kernels/instantiate.h"

namespace fa {

template <class T, int kHeadDim>
int launch_sm90_decode(const DecodeParams& p, cudaStream_t stream) {
  if constexpr (sm90_decode_tile_config(kHeadDim, DecodeTiles::kMany).tile_m > 0) {
    if (p.tile_m == kDecodeWgmmaRows) return launch_decode_wgmma<T, kHeadDim>(p, stream);
  }
  if constexpr (sm90_has_wide_decode(kHeadDim)) {
    if (p.tile_n == kDecodeWideTileN) return launch_decode_wide<T, kHeadDim>(p, stream);
  }
  return launch_decode<T, kHeadDim>(p, stream);
}

}  // namespace fa
