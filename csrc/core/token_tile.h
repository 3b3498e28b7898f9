// The share of one CTA in a kernel that passes over tokens: a run of tokens of one sequence.
//
// Fixed length: ceil(seqlen / tile_tokens) tiles a sequence. Varlen: the slots of
// core/tile_scheduler.h, so that the launch needs the total alone and cu_seqlens is read where it
// lies.
#pragma once
#include "core/host_device.h"
#include "core/tile_scheduler.h"

namespace fa {

struct TokenTile {
  int batch;
  int begin, end;     // tokens of the sequence; empty: no work
  int64_t first_row;  // row of the sequence's token 0 (varlen), 0 for fixed length
};

// Tokens of a tile: as many as num_threads move in one step, at least one. Varlen, in a few steps,
// because a CTA first searches its sequence in cu_seqlens.
constexpr int kVarlenSteps = 4;
FA_HD constexpr int tokens_per_tile(int units_per_token, int num_threads, bool varlen) {
  return max(1, (varlen ? kVarlenSteps : 1) * num_threads / max(1, units_per_token));
}

// Tiles of a launch; none without sequences, whatever the tensors hold. seqlen: of each sequence;
// varlen: of all together.
FA_HD constexpr int64_t num_token_tiles(bool varlen, int batch_size, int seqlen, int tile_tokens) {
  if (batch_size == 0) return 0;
  return varlen ? varlen_num_tiles(seqlen, batch_size, tile_tokens, 1)
                : static_cast<int64_t>(ceil_div(seqlen, tile_tokens)) * batch_size;
}

// Tile `tile` of a launch of num_token_tiles CTAs.
FA_HD constexpr TokenTile token_tile(const int* cu_seqlens, int batch_size, int seqlen,
                                     int tile_tokens, int tile) {
  if (cu_seqlens == nullptr) {
    const int tiles = ceil_div(seqlen, tile_tokens);
    const int begin = tile % tiles * tile_tokens;
    return {tile / tiles, begin, min(begin + tile_tokens, seqlen), 0};
  }
  const TileCoord coord = varlen_tile_coord(cu_seqlens, batch_size, tile_tokens, 1, tile);
  if (coord.m_block < 0) return {coord.batch, 0, 0, 0};
  const int first = cu_seqlens[coord.batch], length = cu_seqlens[coord.batch + 1] - first;
  const int begin = coord.m_block * tile_tokens;
  return {coord.batch, begin, min(begin + tile_tokens, length), first};
}

}  // namespace fa
