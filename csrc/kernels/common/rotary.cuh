// Rotary position embedding of whole tensors, fixed length or varlen, in place or not.
//
// A CTA takes a run of tokens of one sequence (token_tile.h); one thread moves one unit
// (attention/rotary.h) at a time. The units of a row, then its heads, then its tokens run fastest,
// so that neighbouring threads touch neighbouring bytes and a row of the tables is used by all heads
// while it is in L1. Bytes bound: x is read once, out written once.
#pragma once
#include <cuda_runtime.h>

#include "attention/rotary.h"
#include "core/params.h"
#include "kernels/common/token_tile.h"
#include "tile/vec.h"

namespace fa {

constexpr int kRotaryThreads = 256;

// Units of one row: the rotated ones, then plain copies of kVec elements (out of place only).
template <int kVec>
FA_HD constexpr int rotary_row_units(const RotaryParams& p) {
  const bool in_place = p.x == p.out;
  return rotary_units<kVec>(p.table) +
         (in_place ? 0 : (p.head_dim - p.table.rotary_dim) / kVec);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kRotaryThreads)
    rotary_kernel(const __grid_constant__ RotaryParams p, int tile_tokens) {
  const TokenTile tile =
      token_tile(p.cu_seqlens, p.batch_size, p.seqlen, tile_tokens, blockIdx.x);
  const int offset = p.seqlen_offsets == nullptr ? 0 : p.seqlen_offsets[tile.batch];
  const int rotated_units = rotary_units<kVec>(p.table), row_units = rotary_row_units<kVec>(p);
  const int units = (tile.end - tile.begin) * p.num_heads * row_units;

  for (int i = threadIdx.x; i < units; i += kRotaryThreads) {
    const int unit = i % row_units, head = i / row_units % p.num_heads;
    const int token = tile.begin + i / row_units / p.num_heads;
    const int64_t row = tile.first_row + token;
    const T* src = static_cast<const T*>(p.x) + tile.batch * p.x_strides.batch +
                   row * p.x_strides.token + head * p.x_strides.head;
    T* dst = static_cast<T*>(p.out) + tile.batch * p.out_strides.batch +
             row * p.out_strides.token + head * p.out_strides.head;
    if (unit < rotated_units) {
      rotate_unit<kVec>(p.table, p.same_position ? offset : offset + token, unit, src, dst);
    } else {
      const int column = p.table.rotary_dim + (unit - rotated_units) * kVec;
      store_vec(dst + column, load_vec<kVec>(src + column));
    }
  }
}

template <class T>
int launch_rotary(const RotaryParams& p, cudaStream_t stream) {
  const int row_units = p.vectorized ? rotary_row_units<kVecSize<T>>(p) : rotary_row_units<1>(p);
  const int tile_tokens = tokens_per_tile(p.num_heads * row_units, kRotaryThreads);
  const int64_t tiles =
      num_token_tiles(p.cu_seqlens != nullptr, p.batch_size, p.seqlen, tile_tokens);
  if (tiles == 0 || row_units == 0) return cudaSuccess;
  const auto kernel = p.vectorized ? rotary_kernel<T, kVecSize<T>> : rotary_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(tiles), kRotaryThreads, 0, stream>>>(p, tile_tokens);
  return cudaGetLastError();
}

}  // namespace fa
