// Plans of fwd and bwd: which rows of core/tile_config.h, and how many CTAs.
#include <limits>

#include "core/bwd_order.h"
#include "core/bwd_workspace.h"
#include "core/tile_config.h"
#include "plan/family_plan.h"

namespace fa {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr int kVectorElements = 8;  // 16 bytes of 16-bit elements, which the kernels copy at once

int built_size(const Problem& p) {
  return built_head_dim(max(p.head_dim, p.head_dim_v));
}

// Whose rows of tile_config.h suit the device: kSm80's kernels run with the tiles of the newest
// architecture whose shared memory the device has. kSm90 has tiles of its own for some sizes only.
Arch tiles_for(Arch arch, const Problem& p, const DeviceFacts& device) {
  if (arch != Arch::kSm80) return arch;
  const int smem = device.max_smem_bytes;
  const bool has_sm90_tiles = p.family == Family::kFwd ? built_size(p) == 256 : built_size(p) <= 96;
  if (has_sm90_tiles && smem >= max_smem_bytes(Arch::kSm90)) return Arch::kSm90;
  return smem >= max_smem_bytes(Arch::kSm80) ? Arch::kSm80 : Arch::kSm89;
}

// Tiles over all sequences of one side. Varlen: one slot more, whose CTAs write the rows that
// belong to no sequence.
int64_t num_tiles_q(const Problem& p, int tile_m) {
  return p.varlen ? varlen_num_tiles(p.total_q, p.batch_size, tile_m, 1) + 1
                  : int64_t{p.batch_size} * ceil_div(p.seqlen_q, tile_m);
}
int64_t num_tiles_k(const Problem& p, int tile_n) {
  return p.varlen ? varlen_num_tiles(p.total_k, p.batch_size, tile_n, 1) + 1
                  : int64_t{p.batch_size} * ceil_div(p.seqlen_k, tile_n);
}

// Whether a kernel has to compute more than masked scores: has_score_mod() of attention/.
bool has_score_mod(const Problem& p) {
  return p.softcap || p.alibi || p.dropout || !p.positive_scale;
}

// Rounds of tiles on all SMs, in rows, times `percent`.
int64_t cost_of_tiles(const Problem& p, const DeviceFacts& device, int tile_m, int percent) {
  const int64_t tiles = num_tiles_q(p, tile_m) * p.num_heads_q;
  return ceil_div<int64_t>(tiles, max(device.num_sms, 1)) * tile_m * percent;
}

// From how many keys on SM90's long tile is faster, and by how many percent if all SMs have work to
// the end. H200 (96: H100), docs/performance/sm90_forward.md.
struct LongTileGain {
  int more_keys_than, percent;
};
LongTileGain long_tile_gain(int built_head_dim, bool causal) {
  switch (built_head_dim) {
    case 64: return {causal ? 4096 : 1024, 8};
    case 96: return {1024, 12};
    default: return {causal ? 2048 : 1024, 6};
  }
}

// The tile of SM90's forward.
Sm90FwdTile sm90_fwd_tile(const Problem& p, const DeviceFacts& device, BuiltHeadDims built) {
  if (has_score_mod(p)) return Sm90FwdTile::kScoreMod;
  const FwdTileConfig long_tile = sm90_fwd_tile_config(built, Sm90FwdTile::kLong);
  const FwdTileConfig fine = sm90_fwd_tile_config(built, Sm90FwdTile::kFine);
  const bool bordered = mask_kind(p.window_left, p.window_right) == MaskKind::kBordered;
  const bool causal = p.window_left < 0 && p.window_right >= 0;
  const LongTileGain gain = long_tile_gain(built.head_dim, causal);
  if (same_tile(long_tile, fine) || p.seqlen_k <= gain.more_keys_than || (bordered && !causal))
    return Sm90FwdTile::kFine;
  return cost_of_tiles(p, device, long_tile.tile_m, 100) <=
                 cost_of_tiles(p, device, fine.tile_m, 100 + gain.percent)
             ? Sm90FwdTile::kLong
             : Sm90FwdTile::kFine;
}

// What a row of tile_config.h says of the launch. The backward: one tile for all masks.
Plan fwd_tile_of(Arch arch, const Problem& p, const DeviceFacts& device) {
  Plan plan;
  plan.tiles = tiles_for(arch, p, device);
  FwdTileConfig tile;
  if (arch == Arch::kSm90) {
    const BuiltHeadDims built = sm90_fwd_built_head_dims(p.head_dim, p.head_dim_v);
    plan.sm90_tile = sm90_fwd_tile(p, device, built);
    tile = sm90_fwd_tile_config(built, plan.sm90_tile);
    plan.smem_bytes = sm90_fwd_smem_bytes(tile, built);
  } else {
    tile = sm80_fwd_tile_config(plan.tiles, built_size(p));
    plan.smem_bytes = fwd_smem_bytes(tile, built_size(p), built_size(p));
  }
  plan.tile_m = tile.tile_m;
  plan.tile_n = tile.tile_n;
  plan.num_stages = tile.num_stages;
  plan.num_threads = fwd_num_threads(arch, tile);
  return plan;
}

Plan bwd_tile_of(Arch arch, const Problem& p, const DeviceFacts& device) {
  Plan plan;
  plan.tiles = tiles_for(arch, p, device);
  const BwdTileConfig tile = arch == Arch::kSm80 ? sm80_bwd_tile_config(plan.tiles, built_size(p))
                                                 : bwd_tile_config(plan.tiles, built_size(p));
  plan.tile_m = tile.tile_m;
  plan.tile_n = tile.tile_n;
  plan.num_stages = tile.num_q_stages;
  plan.num_threads = bwd_num_threads(arch, tile);
  plan.smem_bytes = arch == Arch::kSm90 ? sm90_bwd_smem_bytes(tile, built_size(p))
                                        : bwd_smem_bytes(tile, built_size(p));
  return plan;
}

Plan tile_of(Arch arch, const Problem& p, const DeviceFacts& device) {
  return p.family == Family::kFwd ? fwd_tile_of(arch, p, device) : bwd_tile_of(arch, p, device);
}

// dQ in fp32, and the turns of its additions; dK and dV likewise if CTAs share heads.
int64_t bwd_workspace_bytes(const Problem& p, const Plan& plan) {
  int64_t elements = 0, semaphores = 0;
  if (plan.adds_dq) {
    const int64_t rows =
        bwd_dq_accum_rows(p.varlen, p.batch_size, p.seqlen_q, p.total_q, plan.tile_m);
    elements = bwd_dq_accum_elements(rows, p.num_heads_q, built_size(p));
    if (p.deterministic || plan.complete_dq)
      semaphores = bwd_dq_semaphores(rows, p.num_heads_q, plan.tile_m);
  }
  if (plan.head_splits > 1) {
    const int64_t total_k = p.varlen ? p.total_k : int64_t{p.batch_size} * p.seqlen_k;
    const int head_dims =
        round_up(p.head_dim, kVectorElements) + round_up(p.head_dim_v, kVectorElements);
    elements += total_k * p.num_heads_kv * head_dims;
    if (p.deterministic)
      semaphores += bwd_dkv_semaphores(p.varlen, p.batch_size, p.seqlen_k, p.total_k,
                                       p.num_heads_kv, plan.tile_n);
  }
  return elements * int64_t{sizeof(float)} + semaphores * int64_t{sizeof(int)};
}

// Keys up to which SM90's backward is faster where the last tile of keys to add writes dQ: neither
// zeroing nor rounding, for the time of waiting for turns, and under a mask short tiles before long
// ones. H200, 16,384 tokens: 9 to 19 % faster at 512 keys, 2 to 10 % slower at 8k.
int sm90_most_keys_of_complete_dq(const Problem& p, bool is_full) {
  if (p.deterministic) return 4096;  // waits for turns either way
  switch (built_size(p)) {
    case 64: return is_full ? 1024 : 1536;
    case 96: return is_full ? 2048 : 3072;
    default: return 2048;
  }
}
// Under a mask the longest tiles are dealt out last, and too few of them leave SMs idle at the end:
// with 8 tiles to an SM 13 % of the time, with 4 of them 25 %.
constexpr int kManyTilesOfSm = 12;

bool sm90_completes_dq(const Problem& p, const Plan& plan, const DeviceFacts& device) {
  if (p.seqlen_k <= plan.tile_n) return true;
  const bool is_full = p.window_left < 0 && p.window_right < 0;
  if (is_full && !bwd_heads_fit(ceil_div(p.seqlen_k, plan.tile_n), 1, device.num_sms, true))
    return false;
  const int batch_size = max(p.batch_size, 1);
  const int queries = p.varlen ? p.total_q / batch_size : p.seqlen_q;
  const int keys = p.varlen ? p.total_k / batch_size : p.seqlen_k;
  // Sequences of different lengths: those of the mean length have less than half of the pairs.
  const int most = sm90_most_keys_of_complete_dq(p, is_full);
  if (keys > (p.varlen ? most + most / 2 : most)) return false;
  if (p.deterministic) return true;
  const int64_t tiles = num_tiles_k(p, plan.tile_n) * p.num_heads_kv;
  if (!is_full && tiles < int64_t{kManyTilesOfSm} * device.num_sms) return false;
  // With fewer queries than keys, tiles of keys meet a tile of queries at the same time.
  return queries >= keys;
}

bool completes_dq(Arch arch, const Problem& p, const Plan& plan, const DeviceFacts& device) {
  if (has_score_mod(p)) return false;
  return arch == Arch::kSm80
             ? p.seqlen_k <= plan.tile_n && sm80_bwd_completes_dq(plan.tiles, built_size(p))
             : sm90_bwd_completes_dq(built_size(p)) && sm90_completes_dq(p, plan, device);
}

int sm90_bwd_ctas_of_tile(const Problem& p) {
  return bwd_tile_config(Arch::kSm90, built_size(p)).num_ctas;
}

// CTAs that share the query heads of a KV head on SM90: where tiles of keys leave SMs idle, and
// under a mask where the heads that run at a time are more than L2 holds. dK and dV are then added
// up in fp32, which costs 2 to 9 %. On an H100 16/1 heads, 2 x 4,096 causal, 177 to 519 TFLOP/s;
// docs/performance/sm90_backward.md, "Shared query heads".
int sm90_bwd_head_splits(const Problem& p, int64_t tiles, const DeviceFacts& device) {
  // Of all heads: fewer are done in the time of zeroing and rounding sums. Not measured.
  constexpr int kManyQueries = 1024;
  constexpr int kRowBytes = 6144;  // of Q, dO and dQ, a query: 4 heads of 128 are well, 8 are not
  const int group = p.num_heads_q / max(p.num_heads_kv, 1);
  if (int64_t{p.seqlen_q} * group < kManyQueries) return 1;
  const bool is_full = p.window_left < 0 && p.window_right < 0;
  const int64_t ctas = tiles * sm90_bwd_ctas_of_tile(p), sms = device.num_sms;
  const auto is_enough = [&](int splits) {
    const int64_t all = ctas * splits;
    if (is_full) return 5 * all >= 4 * ceil_div(all, sms) * sms;  // waves that are full to 80 %
    const int row_bytes = 2 * (p.head_dim + p.head_dim_v) + 4 * built_size(p);
    return 2 * all >= (splits == 1 ? 3 : 4) * sms && group / splits * row_bytes <= kRowBytes;
  };
  for (int splits = 1; splits < group; ++splits)
    if (group % splits == 0 && is_enough(splits)) return splits;
  return max(group, 1);
}

}  // namespace

bool attention_refuses(Arch arch, const Problem& p, const DeviceFacts& device, Reason reason) {
  const char* family = family_name(p.family);
  if (p.page_size > 0)
    return reason("page_size=", p.page_size, ": ", family, " takes keys without pages");
  if (p.family == Family::kFwd && p.num_splits > 1)
    return reason("num_splits=", p.num_splits, ": fwd does not split the keys");

  if (p.family == Family::kFwd && arch == Arch::kSm90 && p.dmask)
    return reason("dmask: its fwd writes no dropout mask");

  // Rows of a side and tiles of q are counted in int.
  const auto at_most = [&](const char* what, int64_t got, int64_t limit) {
    return got > limit && reason(what, "=", got, ": ", family, " takes at most ", limit);
  };
  const Plan tile = tile_of(arch, p, device);
  const int64_t batch_size = p.batch_size;
  if (!p.varlen && (at_most("total_q", batch_size * p.seqlen_q, kMaxInt) ||
                    at_most("total_k", batch_size * p.seqlen_k, kMaxInt)))
    return true;
  if (at_most("tiles_q", num_tiles_q(p, tile.tile_m) * p.num_heads_q, kMaxInt)) return true;
  return tile.smem_bytes > device.max_smem_bytes &&
         reason("smem_bytes=", tile.smem_bytes, ": a CTA of the device has at most ",
                device.max_smem_bytes);
}

Plan attention_plan(Arch arch, const Problem& p, const DeviceFacts& device) {
  Plan plan = tile_of(arch, p, device);
  plan.vectorized = p.alignment_bytes >= 16 && p.head_dim % kVectorElements == 0 &&
                    p.head_dim_v % kVectorElements == 0;
  if (p.family == Family::kFwd) {
    plan.num_ctas = num_tiles_q(p, plan.tile_m) * p.num_heads_q;
    // SM90's is persistent: at most one CTA to an SM, which share out the tiles.
    if (arch == Arch::kSm90) plan.num_ctas = min<int64_t>(plan.num_ctas, device.num_sms);
  } else {
    const int64_t tiles = num_tiles_k(p, plan.tile_n) * p.num_heads_kv;
    if (arch == Arch::kSm80) {
      const int ctas_per_sm = plan.num_threads <= 128 ? 2 : 1;  // at a time; each four times
      plan.head_splits = bwd_head_splits(tiles, int64_t{4} * ctas_per_sm * device.num_sms,
                                         p.num_heads_q / max(p.num_heads_kv, 1));
    } else {
      plan.head_splits = sm90_bwd_head_splits(p, tiles, device);
    }
    plan.num_ctas = tiles * plan.head_splits * (arch == Arch::kSm90 ? sm90_bwd_ctas_of_tile(p) : 1);
    plan.complete_dq = completes_dq(arch, p, plan, device);
    plan.adds_dq = !plan.complete_dq || p.seqlen_k > plan.tile_n;
    plan.workspace_bytes = bwd_workspace_bytes(p, plan);
  }
  return plan;
}

}  // namespace fa
