// Tiles of Hopper's decode kernel (decode.cuh) that many CTAs share: a second launch, whose
// start-up overlaps the end of the first, merges their results. CTA i takes its share of the rows
// of the tiles of which CTA i had a part. The last CTA of a tile to arrive, alone, would take
// longer for many rows.
#pragma once
#include <cuda_runtime.h>

#include "core/split.h"
#include "kernels/launch.h"
#include "kernels/sm80/decode_output.h"
#include "kernels/sm80/decode_work.h"
#include "ptx/grid_dependency.h"

namespace fa {

// The two tiles of each CTA that may be cut, behind the results in the workspace.
template <int kHeadDim>
struct CutTiles {
  static_assert(sizeof(DecodeItem) <= 4 * kDecodeItemWords && sizeof(DecodeItem) % 4 == 0);
  int* words;

  FA_DEVICE explicit CutTiles(const DecodeParams& p)
      : words(reinterpret_cast<int*>(p.partial) +
              decode_partial_words(gridDim.x, kDecodeWgmmaRows, kHeadDim)) {}

  // Tile 0 begins in a CTA before this one, tile 1 in this one; first_cta < 0: is not cut.
  FA_DEVICE DecodeItem& item(int which) const {
    return *reinterpret_cast<DecodeItem*>(words + (2 * blockIdx.x + which) * kDecodeItemWords);
  }
  FA_DEVICE void clear() const { item(0).first_cta = item(1).first_cta = -1; }
  // By one warp.
  FA_DEVICE void put(const DecodeItem& cut, int lane) const {
    const int* from = reinterpret_cast<const int*>(&cut);
    int* to = reinterpret_cast<int*>(&item(static_cast<int>(blockIdx.x) == cut.first_cta));
    for (int i = lane; i < static_cast<int>(sizeof(DecodeItem) / 4); i += kWarpSize)
      to[i] = from[i];
  }
};

constexpr int kMergeThreads = 256;
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads)
    merge_decode_kernel(const __grid_constant__ DecodeLaunch launch,
                        const __grid_constant__ DecodeParams p) {
  constexpr int kWarps = kMergeThreads / kWarpSize;
  const DecodeOutput<T, kHeadDim, kDecodeWgmmaRows, kWarps> output{p, launch};
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  ptx::griddepcontrol_wait();
  const CutTiles<kHeadDim> cut(p);
  const bool first_is_cut = cut.item(0).first_cta >= 0, second_is_cut = cut.item(1).first_cta >= 0;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    if (!(which == 0 ? first_is_cut : second_is_cut)) continue;
    const DecodeItem& item = cut.item(which);
    const Range rows{0, output.stored_rows(item)};
    const int num_parts = item.last_cta - item.first_cta + 1;
    output.merge_parts(item, split_range(rows, blockIdx.x - item.first_cta, num_parts), warp, lane);
  }
}

template <class T, int kHeadDim>
cudaError_t launch_merge(const DecodeParams& p, const DecodeLaunch& launch, cudaStream_t stream) {
  LaunchConfig config(p.num_ctas, kMergeThreads, 0, stream);
  config.overlap();
  return cudaLaunchKernelEx(config.get(), merge_decode_kernel<T, kHeadDim>, launch, p);
}

}  // namespace fa
