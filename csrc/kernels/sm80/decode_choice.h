// SM80's kernels of decode.
#pragma once
#include "core/tile_config.h"
#include "kernels/instantiate.h"

namespace fa {

template <class T, int kHeadDim>
int launch_sm80_decode(const DecodeParams& p, cudaStream_t stream) {
  return p.tile_m == kDecodeFewRows
             ? launch_decode_few_rows<T, kHeadDim, DecodeCtas::kDeep>(p, stream)
             : launch_decode_many_rows<T, kHeadDim>(p, stream);
}

}  // namespace fa
