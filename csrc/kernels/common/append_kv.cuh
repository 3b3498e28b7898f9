// Writes new keys and values into the KV cache, behind the tokens that are there; keys are rotated
// on the way if a rotary table is given.
//
// New token j of sequence b goes to slot cache_seqlens[b] + j of cache row cache_batch_idx[b] (or
// b): contiguous, or page page_table[row, slot / page_size], offset slot % page_size. A slot
// outside the cache, a page id outside the pages, a row outside the table: nothing is written for
// it (debug mode of the Python package reports it). CTAs, threads and units as in rotary.cuh, a row
// being a key with its value. CTAs behind those rotate queries, if there are any.
#pragma once
#include <cuda_runtime.h>

#include "attention/rotary.h"
#include "core/fast_div.h"
#include "core/params.h"
#include "core/row_kernels.h"
#include "core/token_tile.h"
#include "kernels/common/rotary.cuh"
#include "ptx/grid_dependency.h"

namespace fa {

// First-dimension index and token index of a slot in the caches; index < 0: outside.
struct CacheSlot {
  int index, token;
};
FA_DEVICE CacheSlot cache_slot(const AppendKvParams& p, FastDiv by_page, int batch, int slot) {
  const int row = p.cache_batch_idx == nullptr ? batch : p.cache_batch_idx[batch];
  if (slot < 0 || slot >= p.cache_len || row < 0) return {-1, 0};
  if (p.page_table == nullptr) return {row < p.num_caches ? row : -1, slot};
  if (row >= p.page_table_rows) return {-1, 0};
  const auto [page_index, token] = divide(slot, by_page);
  const int page = p.page_table[row * p.page_table_batch_stride + page_index];
  return {page < p.num_caches ? page : -1, token};
}

// Threads for one token: the units of its keys, then those of its values.
template <int kVec>
FA_HD constexpr int append_kv_units_per_row(const AppendKvParams& p) {
  return row_units(p.head_dim, p.table.rotary_dim, kVec) + row_units(p.head_dim_v, 0, kVec);
}

// How the new tokens are cut into tiles, one for a CTA.
struct AppendKvTiles {
  FastDiv by_token, by_row, by_page;  // units of a token, units of a row, tokens of a page
  int tile_tokens, num_tiles;
};
template <int kVec>
inline AppendKvTiles append_kv_tiles(const AppendKvParams& p, int num_threads) {
  const bool varlen = p.cu_seqlens_new != nullptr;
  const int per_row = append_kv_units_per_row<kVec>(p);
  const int per_token = units_per_token(p.num_heads_kv, per_row);
  const int tile_tokens = tokens_per_tile(per_token, num_threads, varlen);
  const int64_t tiles =
      per_row == 0 ? 0 : num_token_tiles(varlen, p.batch_size, p.seqlen_new, tile_tokens);
  return {FastDiv(max(per_token, 1)), FastDiv(max(per_row, 1)), FastDiv(max(p.page_size, 1)),
          tile_tokens, static_cast<int>(tiles)};
}

// Appends the tokens of tile `tile_index`, by kThreads threads.
template <class T, int kVec, int kHeads, int kThreads>
FA_DEVICE void append_kv_tile(const AppendKvParams& p, const AppendKvTiles& tiles, int tile_index) {
  const TokenTile tile =
      token_tile(p.cu_seqlens_new, p.batch_size, p.seqlen_new, tiles.tile_tokens, tile_index);
  const int cache_seqlen = p.cache_seqlens[tile.batch];
  const int rotary_offset =
      p.rotary_seqlens == nullptr ? cache_seqlen : p.rotary_seqlens[tile.batch];
  const int key_units = row_units(p.head_dim, p.table.rotary_dim, kVec);
  const int units = (tile.end - tile.begin) * tiles.by_token.divisor();

  for (int i = threadIdx.x; i < units; i += kThreads) {
    const auto [tile_token, token_unit] = divide(i, tiles.by_token);
    const auto [head_group, unit] = divide(token_unit, tiles.by_row);
    const HeadGroup heads(head_group, p.num_heads_kv);
    const int token = tile.begin + tile_token;
    const bool is_key = unit < key_units;
    const UnitColumns columns =
        is_key ? unit_columns(p.head_dim, p.table.rotary_dim, p.table.interleaved, kVec, unit)
               : unit_columns(p.head_dim_v, 0, false, kVec, unit - key_units);
    const Strides& from = is_key ? p.k_strides : p.v_strides;
    HeadUnits<T, kVec, kHeads> units_of_heads;
    units_of_heads.load(static_cast<const T*>(is_key ? p.k : p.v) + tile.batch * from.batch +
                            (tile.first_row + token) * from.token,
                        from.head, heads, columns);

    const CacheSlot slot = cache_slot(p, tiles.by_page, tile.batch, cache_seqlen + token);
    if (slot.index < 0) continue;
    units_of_heads.turn(p.table, rotary_offset + token, columns);
    const Strides& to = is_key ? p.k_cache_strides : p.v_cache_strides;
    units_of_heads.store(static_cast<T*>(is_key ? p.k_cache : p.v_cache) + slot.index * to.batch +
                             slot.token * to.token,
                         to.head, heads, columns);
  }
}

template <class T, int kVec, int kHeads>
__global__ void __launch_bounds__(kAppendKvThreads, kAppendKvCtasPerSm)
    append_kv_kernel(const __grid_constant__ AppendKvParams p, AppendKvTiles tiles,
                     RotaryTiles query_tiles) {
  ptx::griddepcontrol_launch_dependents();
  const int query_tile = static_cast<int>(blockIdx.x) - tiles.num_tiles;
  if (query_tile < 0) {
    append_kv_tile<T, kVec, kHeads, kAppendKvThreads>(p, tiles, blockIdx.x);
  } else {
    rotary_tile<T, kVec, kHeadsPerThread, kAppendKvThreads>(p.queries, query_tiles, query_tile);
  }
}

template <class T, int kVec>
int launch_append_kv_kernel(const AppendKvParams& p, cudaStream_t stream) {
  const AppendKvTiles tiles = append_kv_tiles<kVec>(p, kAppendKvThreads);
  const RotaryTiles query_tiles =
      p.queries.x == nullptr ? RotaryTiles{} : rotary_tiles<kVec>(p.queries, kAppendKvThreads);
  const int num_ctas = tiles.num_tiles + query_tiles.num_tiles;
  if (num_ctas == 0) return cudaSuccess;
  auto kernel = append_kv_kernel<T, kVec, kHeadsPerThread>;
  if constexpr (kVec > 1) {
    if (p.num_heads_kv == 1) kernel = append_kv_kernel<T, kVec, 1>;
  }
  kernel<<<num_ctas, kAppendKvThreads, 0, stream>>>(p, tiles, query_tiles);
  return cudaGetLastError();
}

template <class T>
int launch_append_kv(const AppendKvParams& p, cudaStream_t stream) {
  return p.vectorized ? launch_append_kv_kernel<T, kVecSize<T>>(p, stream)
                      : launch_append_kv_kernel<T, 1>(p, stream);
}

}  // namespace fa
