// Plans of decode: which tile, and how many CTAs share out the keys.
#include <limits>
#include <utility>

#include "core/decode_schedule.h"
#include "core/tile_config.h"
#include "plan/family_plan.h"

namespace fa {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr int kVectorElements = 8;  // 16 bytes of 16-bit elements, which the kernel copies at once

int group_size(const Problem& p) {
  return p.num_heads_q / max(p.num_heads_kv, 1);
}

int built_size(const Problem& p) {
  return built_head_dim(max(p.head_dim, p.head_dim_v));
}

// Rows of a tile. One split means one order of additions whatever the call, so one tile too.
int tile_m(const Problem& p) {
  return p.num_splits != 1 && int64_t{p.seqlen_q} * group_size(p) <= kDecodeFewRows
             ? kDecodeFewRows
             : kDecodeManyRows;
}

// Tiles of all sequences, and what the kernel counts blocks of keys in: at most one more for each
// tile.
int64_t num_tiles(const Problem& p) {
  const int64_t batch_size = p.batch_size + int64_t{p.varlen};  // one for rows of no sequence
  return batch_size * ceil_div<int64_t>(int64_t{p.seqlen_q} * group_size(p), tile_m(p)) *
         p.num_heads_kv;
}
int64_t num_positions(const Problem& p) {
  return num_tiles(p) * max(1, ceil_div(p.seqlen_k, kDecodeTileN));
}

}  // namespace

bool decode_refuses(const Problem& p, const DeviceFacts& device, Reason reason) {
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
  const int smem_bytes = decode_smem_bytes(built_size(p), tile_m(p));
  return at_most("rows of a KV head", int64_t{p.seqlen_q} * group_size(p), kMaxInt / 2) ||
         at_most("tiles", num_tiles(p), kMaxInt) ||
         at_most("blocks of keys", num_positions(p), kMaxInt) ||
         (smem_bytes > device.max_smem_bytes &&
          reason("smem_bytes=", smem_bytes, ": a CTA of the device has at most ",
                 device.max_smem_bytes));
}

Plan decode_plan(const Problem& p, const DeviceFacts& device) {
  Plan plan;
  plan.tile_m = tile_m(p);
  plan.tile_n = kDecodeTileN;
  plan.num_stages = decode_num_units(built_size(p));
  plan.num_threads = kDecodeThreads;
  plan.vectorized = true;
  plan.smem_bytes = decode_smem_bytes(built_size(p), plan.tile_m);
  const int64_t resident = int64_t{kDecodeCtasPerSm} * device.num_sms;
  const int64_t useful = p.num_splits == 1 ? num_tiles(p) : num_positions(p);
  plan.num_ctas = min(useful, min<int64_t>(resident, kDecodeMaxCtas));
  plan.num_splits = p.num_splits;
  if (p.num_splits != 1)
    plan.workspace_bytes =
        4 * decode_workspace_words(static_cast<int>(plan.num_ctas), plan.tile_m, built_size(p));
  return plan;
}

}  // namespace fa
