// Writes new keys and values into the KV cache, behind the tokens that are there; keys are rotated
// on the way if a rotary table is given.
//
// New token j of sequence b goes to slot cache_seqlens[b] + j of cache row cache_batch_idx[b] (or
// b): contiguous, or page page_table[row, slot / page_size], offset slot % page_size. A slot outside
// the cache, a page id outside the pages, a row outside the table: nothing is written for it (debug
// mode of the Python package reports it). CTAs and units as in rotary.cuh: of each (token, head) first
// the key's units, then the value's.
#pragma once
#include <cuda_runtime.h>

#include "attention/rotary.h"
#include "core/params.h"
#include "kernels/common/token_tile.h"
#include "tile/vec.h"

namespace fa {

constexpr int kAppendKvThreads = 256;

// First-dimension index and token index of a slot in the caches; index < 0: outside.
struct CacheSlot {
  int index, token;
};
FA_DEVICE CacheSlot cache_slot(const AppendKvParams& p, int batch, int slot) {
  const int row = p.cache_batch_idx == nullptr ? batch : p.cache_batch_idx[batch];
  if (slot < 0 || slot >= p.cache_len || row < 0) return {-1, 0};
  if (p.page_table == nullptr) return {row < p.num_caches ? row : -1, slot};
  if (row >= p.page_table_rows) return {-1, 0};
  const int page = p.page_table[row * p.page_table_batch_stride + slot / p.page_size];
  return {page < p.num_caches ? page : -1, slot % p.page_size};
}

template <int kVec>
FA_HD constexpr int append_kv_key_units(const AppendKvParams& p) {
  return rotary_units<kVec>(p.table) + (p.head_dim - p.table.rotary_dim) / kVec;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kAppendKvThreads)
    append_kv_kernel(const __grid_constant__ AppendKvParams p, int tile_tokens) {
  const TokenTile tile =
      token_tile(p.cu_seqlens_new, p.batch_size, p.seqlen_new, tile_tokens, blockIdx.x);
  const int cache_seqlen = p.cache_seqlens[tile.batch];
  const int rotary_offset = p.rotary_seqlens == nullptr ? cache_seqlen : p.rotary_seqlens[tile.batch];
  const int rotated_units = rotary_units<kVec>(p.table), key_units = append_kv_key_units<kVec>(p);
  const int row_units = key_units + p.head_dim_v / kVec;
  const int units = (tile.end - tile.begin) * p.num_heads_kv * row_units;

  for (int i = threadIdx.x; i < units; i += kAppendKvThreads) {
    const int unit = i % row_units, head = i / row_units % p.num_heads_kv;
    const int token = tile.begin + i / row_units / p.num_heads_kv;
    const CacheSlot slot = cache_slot(p, tile.batch, cache_seqlen + token);
    if (slot.index < 0) continue;
    const auto at_row = [&](const Strides& s, int64_t batch, int64_t row) {
      return batch * s.batch + row * s.token + head * s.head;
    };
    if (unit < key_units) {
      const T* src = static_cast<const T*>(p.k) +
                     at_row(p.k_strides, tile.batch, tile.first_row + token);
      T* dst = static_cast<T*>(p.k_cache) + at_row(p.k_cache_strides, slot.index, slot.token);
      if (unit < rotated_units) {
        rotate_unit<kVec>(p.table, rotary_offset + token, unit, src, dst);
      } else {
        const int column = p.table.rotary_dim + (unit - rotated_units) * kVec;
        store_vec(dst + column, load_vec<kVec>(src + column));
      }
    } else {
      const int column = (unit - key_units) * kVec;
      const T* src = static_cast<const T*>(p.v) +
                     at_row(p.v_strides, tile.batch, tile.first_row + token);
      T* dst = static_cast<T*>(p.v_cache) + at_row(p.v_cache_strides, slot.index, slot.token);
      store_vec(dst + column, load_vec<kVec>(src + column));
    }
  }
}

template <class T>
int launch_append_kv(const AppendKvParams& p, cudaStream_t stream) {
  const int key_units =
      p.vectorized ? append_kv_key_units<kVecSize<T>>(p) : append_kv_key_units<1>(p);
  const int row_units = key_units + p.head_dim_v / (p.vectorized ? kVecSize<T> : 1);
  const int tile_tokens = tokens_per_tile(p.num_heads_kv * row_units, kAppendKvThreads);
  const int64_t tiles =
      num_token_tiles(p.cu_seqlens_new != nullptr, p.batch_size, p.seqlen_new, tile_tokens);
  if (tiles == 0) return cudaSuccess;
  const auto kernel = p.vectorized ? append_kv_kernel<T, kVecSize<T>> : append_kv_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(tiles), kAppendKvThreads, 0, stream>>>(p, tile_tokens);
  return cudaGetLastError();
}

}  // namespace fa
