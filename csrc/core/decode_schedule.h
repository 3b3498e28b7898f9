// How the CTAs of a decode kernel share out keys: every CTA streams the same number of key blocks,
// whatever the lengths of the sequences.
//
// The blocks of all output tiles stand in one row, tile after tile, and every CTA takes a
// contiguous part of it. So a tile may be cut, into parts that belong to consecutive CTAs.
#pragma once
#include "core/host_device.h"
#include "core/mask.h"
#include "core/tile_config.h"

namespace fa {

// Positions [0, total) in parts of per_part; the last one may be smaller.
struct WorkSplit {
  int total, per_part;

  FA_HD constexpr int num_parts() const { return ceil_div(total, per_part); }
  FA_HD constexpr int begin(int part) const { return min(total, part * per_part); }
  // The part that has position `at`.
  FA_HD constexpr int part_of(int at) const { return at / per_part; }
};

// CTAs of a launch of mma.sync's kernels for `tiles` tiles, at most `most`: a whole number for each
// tile, or whole tiles for each, where that leaves few of them out. The kernel gives all the same
// number of blocks, so caches that are all full are cut at the ends of tiles, or into equal parts.
FA_HD constexpr int64_t decode_ctas_at_most(int64_t tiles, int64_t most) {
  if (tiles <= most) return most / tiles * tiles;
  const int64_t aligned = ceil_div(tiles, ceil_div(tiles, most));
  return 10 * aligned >= 9 * most ? aligned : most;
}

// The same on a device of num_sms SMs that hold per_sm of them each. One to an SM merges less and
// starts sooner: for few blocks, and, with 16 rows, for few tiles, which are those of one sequence.
// Else all, as nothing is copied while a CTA merges and stores; also where units of the ring are
// small or few (64, 256), and of small CTAs. Numbers: docs/performance/decode.md, "How many CTAs".
struct DecodeTileCount {
  DecodeCtas ctas;
  int tile_m, head_dim;   // built_head_dim()
  int64_t tiles, blocks;  // blocks of keys of all tiles, at most
};
FA_HD constexpr int64_t decode_num_ctas(DecodeTileCount of, int num_sms, int per_sm) {
  const bool few_rows = of.tile_m == kDecodeFewRows;
  const int64_t most = int64_t{per_sm} * num_sms;
  const bool few_blocks = of.blocks < (few_rows ? 16 : 4) * most;  // to each of the two
  const bool few_tiles = 8 * of.tiles <= num_sms;                  // each is cut for 8 CTAs or more
  const bool takes_one =
      few_rows ? 64 < of.head_dim && of.head_dim < 256 && (few_blocks || few_tiles) : few_blocks;
  if (of.ctas == DecodeCtas::kDeep && takes_one && of.tiles <= num_sms) {
    const int64_t one = decode_ctas_at_most(of.tiles, num_sms);
    if (10 * one >= 9 * num_sms) return one;
  }
  return decode_ctas_at_most(of.tiles, most);
}

// Whether all CTAs get as many blocks, wherever that cuts tiles. mma.sync's kernels are launched
// with a number of CTAs that suits their tiles. With wgmma's one CTA to an SM it does matter that
// none is idle, if there is much to read and few rows to merge: 2 % on an H200. rows: of a KV head.
FA_HD constexpr bool splits_evenly(int total, int num_ctas, int tile_m, int rows) {
  return tile_m != kDecodeWgmmaRows || (rows <= tile_m / 2 && total / 128 >= num_ctas);
}

// What each CTA takes where all tiles are alike: whole ones first, tile i of a round being CTA i's,
// then its part of the positions of the last tiles. CTAs that run side by side so read the heads of
// the same tokens, which is 1 % faster on an H200.
struct DecodeRounds {
  int num_rounds, num_ctas, tile_length;
  WorkSplit rest;  // of the positions behind the rounds

  FA_HD constexpr int rest_begin() const { return num_rounds * num_ctas * tile_length; }
  // Positions of a CTA in one round, the rest being round num_rounds.
  FA_HD constexpr Range share(int round, int cta) const {
    if (round > num_rounds) return {0, 0};
    if (round == num_rounds)
      return {rest_begin() + rest.begin(cta), rest_begin() + rest.begin(cta + 1)};
    const int tile = round * num_ctas + cta;
    return {tile * tile_length, (tile + 1) * tile_length};
  }
  // The CTA that has position `at` of the rest.
  FA_HD constexpr int rest_cta(int at) const { return rest.part_of(at - rest_begin()); }
};

// The CTAs are those that have a part of `split`. No round and `split` itself unless all of
// num_tiles tiles are as long as the longest. If `split` cuts no tile, nor does this. If it does,
// the rest has half a tile or more for each CTA, or nothing: the more parts a tile is cut into, the
// more there is to merge.
FA_HD constexpr DecodeRounds decode_rounds(WorkSplit split, int num_tiles, int longest_tile) {
  if (int64_t{num_tiles} * longest_tile != split.total || split.per_part <= longest_tile)
    return {0, 1, longest_tile, split};
  const int num_ctas = split.num_parts(), left = num_tiles % num_ctas;
  const bool cuts = split.per_part % longest_tile != 0;
  const bool cuts_more = cuts && 0 < left && 2 * left < num_ctas;
  DecodeRounds rounds{num_tiles / num_ctas - (cuts_more ? 1 : 0), num_ctas, longest_tile, split};
  const int rest = split.total - rounds.rest_begin();
  rounds.rest = {rest, cuts ? max(1, ceil_div(rest, num_ctas)) : longest_tile};
  return rounds;
}

// Whether the launch itself merges the parts of tiles, which are few for each then; else a second
// launch does, for which the first has to end: 3 to 11 us of its own, but all CTAs merge (H200).
FA_HD constexpr bool decode_merges(int64_t num_tiles, int num_ctas) {
  return 3 * num_tiles >= num_ctas && 2 * num_ctas <= kDecodeMaxCtas;  // two counters for each
}

// Where results of the parts of a tile stand that are merged in pairs, then in pairs of pairs, ...
struct MergeNode {
  int index, num_nodes;  // of this level
  int stride;            // parts of a node; the last one may have fewer

  FA_HD constexpr bool is_root() const { return num_nodes == 1; }
  FA_HD constexpr bool has_sibling() const { return (index ^ 1) < num_nodes; }
  FA_HD constexpr int first_part() const { return index * stride; }
  FA_HD constexpr int first_part_of_sibling() const { return (index ^ 1) * stride; }
  // Not 0, and of no other two siblings of the tile.
  FA_HD constexpr int part_to_meet_at() const { return (index | 1) * stride; }
  FA_HD constexpr MergeNode parent() const {
    return {index / 2, ceil_div(num_nodes, 2), 2 * stride};
  }
};

// What a tile of wgmma's costs beside its blocks, in blocks: loading Q, and two products that
// nothing overlaps. It counts if there are many short tiles, as in the prefill of a prompt.
constexpr int kDecodeTileStart = 3;
FA_HD constexpr int decode_tile_start(int64_t num_tiles, int num_ctas, int tile_m) {
  return tile_m == kDecodeWgmmaRows && num_tiles >= int64_t{2} * num_ctas ? kDecodeTileStart : 0;
}

// Parts for at most num_ctas CTAs: equal ones, or, where it matters little whether all CTAs have
// work, but much whether a tile is cut or a CTA has parts of two, whole tiles of the longest kind,
// or a whole number of parts to such a tile. max_splits > 1: no tile is in more than max_splits
// parts. 1 <= longest_tile <= total, num_ctas >= 1.
FA_HD constexpr WorkSplit split_work(int total, int num_ctas, int max_splits, int longest_tile,
                                     bool evenly) {
  const int target = total < num_ctas ? ceil_div(num_ctas, 2) : num_ctas;
  const int tiles = ceil_div(total, longest_tile);
  int per_part = ceil_div(total, num_ctas);
  if (!evenly) {
    per_part = tiles >= target ? ceil_div(tiles, target) * longest_tile
                               : ceil_div(longest_tile, target / tiles);
  }
  return {total, max_splits > 1 ? max(per_part, ceil_div(longest_tile, max_splits - 1)) : per_part};
}

// Query heads of one KV head share its keys, so a tile of a decode kernel packs them: row r is
// query r / group_size, head r % group_size of the KV head. Number of tiles for `queries`, which
// the plan keeps below 2^30 rows:
FA_HD constexpr int packed_m_blocks(int queries, int group_size, int tile_m) {
  return ceil_div(queries * group_size, tile_m);
}

// Of deep CTAs, two to each of 132 SMs.
constexpr int64_t deep_ctas(int tile_m, int head_dim, int64_t tiles, int64_t blocks) {
  return decode_num_ctas({DecodeCtas::kDeep, tile_m, head_dim, tiles, blocks}, 132, 2);
}
static_assert(deep_ctas(16, 128, 8, 1 << 20) == 128);     // 16 to a tile, one to an SM
static_assert(deep_ctas(16, 128, 128, 2048) == 128);      // one to a tile
static_assert(deep_ctas(16, 128, 128, 1 << 20) == 256);   // two
static_assert(deep_ctas(16, 128, 100, 2048) == 200);      // 100 leave 32 SMs out
static_assert(deep_ctas(16, 128, 1024, 1 << 20) == 256);  // four tiles to each
static_assert(deep_ctas(16, 128, 320, 1 << 20) == 264);   // two to each: 160
static_assert(deep_ctas(16, 64, 128, 2048) == 256);
static_assert(deep_ctas(64, 128, 128, 1 << 20) == 256 && deep_ctas(64, 128, 8, 512) == 128);
static_assert(decode_num_ctas({DecodeCtas::kSmall, 16, 128, 128, 2048}, 132, 4) == 512);
static_assert(split_work(128 * 128, 256, 0, 128, true).per_part == 64);
static_assert(split_work(8 * 64, 132, 0, 64, false).per_part == 4);  // 16 for each
static_assert(split_work(100, 8, 2, 50, true).num_parts() == 2);     // no tile is in three parts
static_assert(decode_rounds({512 * 67, 260}, 512, 67).num_rounds == 3);  // 116 tiles are cut
static_assert(decode_rounds({136 * 67, 70}, 136, 67).num_rounds == 0);
static_assert(decode_rounds({512 * 67, 4 * 67}, 512, 67).num_rounds == 4);  // of 128 CTAs
static_assert(packed_m_blocks(3, 8, 16) == 2);

}  // namespace fa
