// Rotary position embedding of whole tensors, fixed length or varlen, in place or not.
//
// A CTA takes a run of tokens of one sequence (core/token_tile.h); one thread moves one unit of a
// few heads at a time (core/row_kernels.h). Units run fastest over the threads, then heads, then
// tokens, so that neighbouring threads touch neighbouring bytes.
// Bytes bound: x is read once, out written once.
#pragma once
#include <cuda_runtime.h>

#include "attention/rotary.h"
#include "core/fast_div.h"
#include "core/params.h"
#include "core/row_kernels.h"
#include "core/token_tile.h"
#include "ptx/grid_dependency.h"

namespace fa {

// Elements of a row that are moved: in place, those behind rotary_dim stay where they are.
FA_HD constexpr int rotary_moved_dim(const RotaryParams& p) {
  return p.x == p.out ? p.table.rotary_dim : p.head_dim;
}

// How the tokens are cut into tiles, one for a CTA.
struct RotaryTiles {
  FastDiv by_token, by_row;  // units of a token, units of a row
  int tile_tokens, num_tiles;
};
template <int kVec>
inline RotaryTiles rotary_tiles(const RotaryParams& p, int num_threads) {
  const bool varlen = p.cu_seqlens != nullptr;
  const int per_row = row_units(rotary_moved_dim(p), p.table.rotary_dim, kVec);
  const int per_token = units_per_token(p.num_heads, per_row);
  const int tile_tokens = tokens_per_tile(per_token, num_threads, varlen);
  const int64_t tiles =
      per_row == 0 ? 0 : num_token_tiles(varlen, p.batch_size, p.seqlen, tile_tokens);
  return {FastDiv(max(per_token, 1)), FastDiv(max(per_row, 1)), tile_tokens,
          static_cast<int>(tiles)};
}

// Rotates the tokens of tile `tile_index`, by kThreads threads.
template <class T, int kVec, int kHeads, int kThreads>
FA_DEVICE void rotary_tile(const RotaryParams& p, const RotaryTiles& tiles, int tile_index) {
  const TokenTile tile =
      token_tile(p.cu_seqlens, p.batch_size, p.seqlen, tiles.tile_tokens, tile_index);
  const int offset = p.seqlen_offsets == nullptr ? 0 : p.seqlen_offsets[tile.batch];
  const int units = (tile.end - tile.begin) * tiles.by_token.divisor();

  for (int i = threadIdx.x; i < units; i += kThreads) {
    const auto [tile_token, token_unit] = divide(i, tiles.by_token);
    const auto [head_group, unit] = divide(token_unit, tiles.by_row);
    const HeadGroup heads(head_group, p.num_heads);
    const int token = tile.begin + tile_token;
    const int64_t row = tile.first_row + token;
    const UnitColumns columns =
        unit_columns(rotary_moved_dim(p), p.table.rotary_dim, p.table.interleaved, kVec, unit);
    HeadUnits<T, kVec, kHeads> units_of_heads;
    units_of_heads.load(
        static_cast<const T*>(p.x) + tile.batch * p.x_strides.batch + row * p.x_strides.token,
        p.x_strides.head, heads, columns);
    units_of_heads.turn(p.table, p.same_position ? offset : offset + token, columns);
    units_of_heads.store(
        static_cast<T*>(p.out) + tile.batch * p.out_strides.batch + row * p.out_strides.token,
        p.out_strides.head, heads, columns);
  }
}

template <class T, int kVec, int kHeads>
__global__ void __launch_bounds__(kRotaryThreads, kRotaryCtasPerSm)
    rotary_kernel(const __grid_constant__ RotaryParams p, RotaryTiles tiles) {
  ptx::griddepcontrol_launch_dependents();
  rotary_tile<T, kVec, kHeads, kRotaryThreads>(p, tiles, blockIdx.x);
}

template <class T>
int launch_rotary(const RotaryParams& p, cudaStream_t stream) {
  const RotaryTiles tiles = p.vectorized ? rotary_tiles<kVecSize<T>>(p, kRotaryThreads)
                                         : rotary_tiles<1>(p, kRotaryThreads);
  if (tiles.num_tiles == 0) return cudaSuccess;
  const auto kernel = !p.vectorized      ? rotary_kernel<T, 1, kHeadsPerThread>
                      : p.num_heads == 1 ? rotary_kernel<T, kVecSize<T>, 1>
                                         : rotary_kernel<T, kVecSize<T>, kHeadsPerThread>;
  kernel<<<tiles.num_tiles, kRotaryThreads, 0, stream>>>(p, tiles);
  return cudaGetLastError();
}

}  // namespace fa
