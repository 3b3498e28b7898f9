// Plans of decode: which tile, and how many CTAs share out the keys.
#include <limits>
#include <utility>

#include "core/decode_schedule.h"
#include "core/tile_config.h"
#include "plan/family_plan.h"

namespace fa {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr int kLongCache = 4096;    // keys
constexpr int kVectorElements = 8;  // 16 bytes of 16-bit elements, which the kernel copies at once

int group_size(const Problem& p) {
  return p.num_heads_q / max(p.num_heads_kv, 1);
}

int built_size(const Problem& p) {
  return built_head_dim(max(p.head_dim, p.head_dim_v));
}

int64_t rows_of_kv_head(const Problem& p) {
  return int64_t{p.seqlen_q} * group_size(p);
}

// Which kernel computes a problem.
struct Tile {
  int m;
  DecodeCtas ctas = DecodeCtas::kDeep;
  FwdTileConfig wgmma{};  // if m is kDecodeWgmmaRows

  bool is_wgmma() const { return m == kDecodeWgmmaRows; }
  int n(const Problem& p) const {
    return is_wgmma() ? wgmma.tile_n : decode_config(built_size(p), ctas).tile_n;
  }
};

// Tiles of kDecodeWgmmaRows rows.
int64_t num_wgmma_tiles(const Problem& p) {
  return p.batch_size * ceil_div<int64_t>(rows_of_kv_head(p), kDecodeWgmmaRows) * p.num_heads_kv;
}

// Whether wgmma's kernel is faster for few rows, head_dim 128: with 16 rows in very few tiles of
// long caches, which are cut so often that its second kernel merges them better (up to 28 % on an
// H200).
bool few_rows_take_wgmma(const Problem& p, const DeviceFacts& device) {
  constexpr int kManyCuts = 20;  // SMs to a tile: 6 tiles on 132 SMs were faster, 8 slower
  return built_size(p) == 128 && 2 * rows_of_kv_head(p) > kDecodeFewRows &&
         p.seqlen_k >= kLongCache && kManyCuts * num_wgmma_tiles(p) <= device.num_sms;
}

// Which CTAs few rows have. Where there is at most a tile for each SM, one CTA to an SM starts and
// merges once, and many small ones cover each other's ends. So it matters how alike the lengths
// are, which is not known here: with a tile or nearly for every SM, full caches are faster with
// wide ones (1,024 keys 12 %, 8,192 keys 2 to 4 %) and caches of all lengths with small ones (10 to
// 28 %). Numbers: docs/performance/decode.md, "Wide and small CTAs".
DecodeCtas few_rows_ctas(Arch arch, const Problem& p, const DeviceFacts& device) {
  if (arch != Arch::kSm90) return DecodeCtas::kDeep;
  const int built = built_size(p);
  const int64_t tiles = int64_t{p.batch_size} * p.num_heads_kv;
  const bool few_tiles =
      2 * tiles <= device.num_sms || (tiles <= device.num_sms && p.seqlen_k < kLongCache);
  const DecodeCtas ctas = sm90_decode_ctas(built, DecodeTiles::kFew);
  const bool fits = decode_smem_bytes(built, kDecodeFewRows, ctas) <= device.max_smem_bytes;
  return few_tiles && fits ? ctas : sm90_decode_ctas(built, DecodeTiles::kMany);
}

// One split means one order of additions whatever the call, so one tile too.
Tile tile_of(Arch arch, const Problem& p, const DeviceFacts& device) {
  const bool few = p.num_splits != 1 && rows_of_kv_head(p) <= kDecodeFewRows;
  const Tile mma =
      few ? Tile{kDecodeFewRows, few_rows_ctas(arch, p, device)} : Tile{kDecodeManyRows};
  if (arch != Arch::kSm90 || p.num_splits == 1 || (few && !few_rows_take_wgmma(p, device)))
    return mma;
  const bool few_tiles =
      2 * num_wgmma_tiles(p) <= device.num_sms && rows_of_kv_head(p) <= kDecodeWgmmaRows;
  const FwdTileConfig wgmma =
      sm90_decode_tile_config(built_size(p), few_tiles ? DecodeTiles::kFew : DecodeTiles::kMany);
  // Copies of whole blocks by TMA, and the plain softmax: the forward's in attention_plan.cpp.
  const bool takes = wgmma.tile_m > 0 && !p.broadcast && !p.softcap && !p.alibi &&
                     p.positive_scale && !(p.leftpad && p.page_size > 0) &&
                     sm90_decode_takes_pages(p.page_size, wgmma.tile_n);
  return takes ? Tile{wgmma.tile_m, DecodeCtas::kDeep, wgmma} : mma;
}

int64_t tiles_of_sequence(const Problem& p, const Tile& tile) {
  return ceil_div<int64_t>(rows_of_kv_head(p), tile.m) * p.num_heads_kv;
}
// Tiles of all sequences, and what the kernel counts blocks of keys in: at most one more for each
// tile.
int64_t num_tiles(const Problem& p, const Tile& tile) {
  const int64_t batch_size = p.batch_size + int64_t{p.varlen};  // one for rows of no sequence
  return batch_size * tiles_of_sequence(p, tile);
}
int64_t num_positions(const Problem& p, const Tile& tile) {
  return num_tiles(p, tile) * max(1, ceil_div(p.seqlen_k, tile.n(p)));
}

int smem_bytes_of(const Problem& p, const Tile& tile) {
  const int built = built_size(p);
  return tile.is_wgmma() ? sm90_fwd_smem_bytes(tile.wgmma, {built, built})
                         : decode_smem_bytes(built, tile.m, tile.ctas);
}

// CTAs that share out the keys; those that an SM cannot hold beside each other would only count the
// lengths again.
int64_t num_ctas_of(const Problem& p, const Tile& tile, const DeviceFacts& device) {
  const int smem_bytes = smem_bytes_of(p, tile);
  const int most = decode_config(built_size(p), tile.ctas).ctas_per_sm;
  const int per_sm = clamp(device.max_smem_bytes / smem_bytes, 1, most);
  const int64_t blocks = num_positions(p, tile);
  if (p.num_splits == 1) return min(num_tiles(p, tile), int64_t{per_sm} * device.num_sms);
  if (tile.is_wgmma()) return min<int64_t>(blocks, device.num_sms);
  const int64_t tiles = max<int64_t>(1, p.batch_size * tiles_of_sequence(p, tile));
  return min(blocks, decode_num_ctas({tile.ctas, tile.m, built_size(p), tiles, blocks},
                                     device.num_sms, per_sm));
}

}  // namespace

bool decode_refuses(Arch arch, const Problem& p, const DeviceFacts& device, Reason reason) {
  if (p.dropout) return reason("dropout: decode has none");
  for (const auto& [what, size] : {std::pair{"head_dim", p.head_dim}, {"head_dim_v", p.head_dim_v}})
    if (size % kVectorElements != 0)
      return reason(what, "=", size, ": decode takes multiples of ", kVectorElements,
                    ", as it never copies a cache");
  if (p.alignment_bytes < 2 * kVectorElements)
    return reason("alignment_bytes=", p.alignment_bytes,
                  ": decode reads 16 bytes at a time and never copies a cache");
  const auto at_most = [&](const char* what, int64_t got, int64_t limit) {
    return got > limit && reason(what, "=", got, ": decode takes at most ", limit);
  };
  // Rows, tiles and blocks of keys are counted in int.
  const Tile tile = tile_of(arch, p, device);
  const int smem_bytes = smem_bytes_of(p, tile), start = tile.is_wgmma() ? kDecodeTileStart : 0;
  return at_most("rows of a KV head", rows_of_kv_head(p), kMaxInt / 2) ||
         at_most("tiles", num_tiles(p, tile), kMaxInt) ||
         at_most("blocks of keys", num_positions(p, tile) + num_tiles(p, tile) * start, kMaxInt) ||
         (smem_bytes > device.max_smem_bytes &&
          reason("smem_bytes=", smem_bytes, ": a CTA of the device has at most ",
                 device.max_smem_bytes));
}

Plan decode_plan(Arch arch, const Problem& p, const DeviceFacts& device) {
  const Tile tile = tile_of(arch, p, device);
  Plan plan;
  plan.tile_m = tile.m;
  const DecodeConfig config = decode_config(built_size(p), tile.ctas);
  plan.tile_n = tile.n(p);
  plan.num_stages = tile.is_wgmma() ? tile.wgmma.num_stages : config.num_units;
  plan.num_threads =
      tile.is_wgmma() ? fwd_num_threads(Arch::kSm90, tile.wgmma) : config.num_threads();
  plan.vectorized = true;
  plan.smem_bytes = smem_bytes_of(p, tile);
  plan.num_ctas = min<int64_t>(num_ctas_of(p, tile, device), kDecodeMaxCtas);
  plan.num_splits = p.num_splits;
  if (p.num_splits != 1)
    plan.workspace_bytes =
        4 * decode_workspace_words(static_cast<int>(plan.num_ctas), tile.m, built_size(p));
  return plan;
}

}  // namespace fa
