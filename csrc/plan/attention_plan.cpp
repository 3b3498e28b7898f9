// Plans of fwd and bwd: which rows of core/tile_config.h, and how many CTAs.
#include <limits>

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

// What a row of tile_config.h says of the launch. kSm80 and the backward: one tile for all masks.
Plan tile_of(Arch arch, const Problem& p, const DeviceFacts& device) {
  const Arch tiles = tiles_for(arch, p, device);
  const bool sm80 = arch == Arch::kSm80;
  const int built = built_size(p);
  Plan plan;
  plan.tiles = tiles;
  if (p.family == Family::kFwd) {
    const FwdTileConfig tile =
        sm80 ? sm80_fwd_tile_config(tiles, built)
             : fwd_tile_config(tiles, built, mask_kind(p.window_left, p.window_right));
    plan.tile_m = tile.tile_m;
    plan.tile_n = tile.tile_n;
    plan.num_stages = tile.num_stages;
    plan.num_threads = fwd_num_threads(arch, tile);
    plan.smem_bytes =
        fwd_smem_bytes(tile, built, built) + (arch == Arch::kSm90 ? kFwdBarrierBytes : 0);
  } else {
    const BwdTileConfig tile =
        sm80 ? sm80_bwd_tile_config(tiles, built) : bwd_tile_config(tiles, built, MaskKind::kFull);
    plan.tile_m = tile.tile_m;
    plan.tile_n = tile.tile_n;
    plan.num_stages = tile.num_q_stages;
    plan.num_threads = bwd_num_threads(arch, tile);
    plan.smem_bytes =
        sm80 ? bwd_smem_bytes(tile, built) : sm90_bwd_smem_bytes(tile, built);
  }
  return plan;
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

// SM90's forward is persistent: at most one CTA to an SM, which count the tiles they take.
constexpr int64_t kTileCounterBytes = sizeof(int);

// What SM90's forward does not compute.
bool sm90_fwd_refuses(const Problem& p, Reason reason) {
  const auto not_yet = [&](bool wanted, const char* what) {
    return wanted && reason(what, ": its fwd computes plain scores only");
  };
  return not_yet(p.softcap, "softcap") || not_yet(p.alibi, "alibi") ||
         not_yet(p.dropout, "dropout") || not_yet(p.dmask, "dmask") ||
         not_yet(!p.positive_scale, "softmax_scale <= 0");
}

// dQ in fp32, and the turns of its additions.
int64_t bwd_workspace_bytes(const Problem& p, int tile_m) {
  const int64_t rows = bwd_dq_accum_rows(p.varlen, p.batch_size, p.seqlen_q, p.total_q, tile_m);
  const int64_t elements = bwd_dq_accum_elements(rows, p.num_heads_q, built_size(p));
  const int64_t semaphores = p.deterministic ? bwd_dq_semaphores(rows, p.num_heads_q, tile_m) : 0;
  return elements * int64_t{sizeof(float)} + semaphores * int64_t{sizeof(int)};
}

}  // namespace

bool attention_refuses(Arch arch, const Problem& p, const DeviceFacts& device, Reason reason) {
  const char* family = family_name(p.family);
  if (p.page_size > 0)
    return reason("page_size=", p.page_size, ": ", family, " takes keys without pages");
  if (p.family == Family::kFwd && p.num_splits > 1)
    return reason("num_splits=", p.num_splits, ": fwd does not split the keys");

  if (p.family == Family::kFwd && arch == Arch::kSm90 && sm90_fwd_refuses(p, reason)) return true;

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
    if (arch == Arch::kSm90) {
      plan.num_ctas = min<int64_t>(plan.num_ctas, device.num_sms);
      plan.workspace_bytes = kTileCounterBytes;
    }
  } else {
    plan.num_ctas = num_tiles_k(p, plan.tile_n) * p.num_heads_kv;
    plan.workspace_bytes = bwd_workspace_bytes(p, plan.tile_m);
  }
  return plan;
}

}  // namespace fa
