// Size and order of the backward's workspace: dQ in fp32, and the turns in which it is added up; dK
// and dV likewise where several CTAs share the query heads of a KV head.
//
// dQ is added up by CTAs of different keys, so it lives in whole tiles of tile_m rows that no two
// sequences share. Fixed length: sequence b begins at tile b * ceil(seqlen_q / tile_m). Varlen: at
// tile varlen_first_slot(cu_seqlens_q[b], tile_m, b), so that no host copy of the lengths is
// needed; some tiles then belong to nobody.
#pragma once
#include "core/tile_scheduler.h"

namespace fa {

// Rows of dq_accum, a multiple of tile_m.
FA_HD constexpr int64_t bwd_dq_accum_rows(bool varlen, int batch_size, int seqlen_q, int total_q,
                                          int tile_m) {
  const int64_t tiles = varlen ? varlen_first_slot(total_q, tile_m, batch_size)
                               : static_cast<int64_t>(batch_size) * ceil_div(seqlen_q, tile_m);
  return tiles * tile_m;
}

// First row of a sequence; its first query has the row cu_seqlen in q (varlen).
FA_HD constexpr int64_t bwd_dq_accum_first_row(bool varlen, int batch, int seqlen_q, int cu_seqlen,
                                               int tile_m) {
  const int64_t tile = varlen ? varlen_first_slot(cu_seqlen, tile_m, batch)
                              : static_cast<int64_t>(batch) * ceil_div(seqlen_q, tile_m);
  return tile * tile_m;
}

// fp32 elements of dq_accum. head_dim: the built size.
FA_HD constexpr int64_t bwd_dq_accum_elements(int64_t rows, int num_heads_q, int head_dim) {
  return rows * num_heads_q * head_dim;
}

// One counter for each (tile, head): how many of its additions are done (deterministic, or where
// the last one to add writes dQ). And one that deals out tiles of keys.
FA_HD constexpr int64_t bwd_dq_semaphores(int64_t rows, int num_heads_q, int tile_m) {
  return rows / tile_m * num_heads_q + 1;
}

// The same for (tile of keys, KV head), tiles as in dq_accum: how many splits have added to it.
FA_HD constexpr int64_t bwd_dkv_semaphores(bool varlen, int batch_size, int seqlen_k, int total_k,
                                           int num_heads_kv, int tile_n) {
  return bwd_dq_accum_rows(varlen, batch_size, seqlen_k, total_k, tile_n) / tile_n * num_heads_kv;
}

// CTAs that share the query heads of a KV head: as few as make `enough` of them, or all. A divisor
// of group_size.
FA_HD constexpr int bwd_head_splits(int64_t tiles, int64_t enough, int group_size) {
  for (int splits = 1; splits < group_size; ++splits)
    if (group_size % splits == 0 && tiles * splits >= enough) return splits;
  return max(group_size, 1);
}

static_assert(bwd_head_splits(1024, 528, 4) == 1 && bwd_head_splits(256, 528, 4) == 4 &&
              bwd_head_splits(64, 528, 16) == 16 && bwd_head_splits(300, 528, 6) == 2);
static_assert(bwd_dq_accum_rows(false, 3, 65, 195, 64) == 3 * 128);
static_assert(bwd_dq_accum_rows(true, 3, 65, 195, 64) == (195 / 64 + 3) * 64);
static_assert(bwd_dq_accum_first_row(false, 3, 65, 0, 64) ==
              bwd_dq_accum_rows(false, 3, 65, 195, 64));
static_assert(bwd_dq_accum_first_row(true, 3, 65, 195, 64) ==
              bwd_dq_accum_rows(true, 3, 65, 195, 64));

}  // namespace fa
