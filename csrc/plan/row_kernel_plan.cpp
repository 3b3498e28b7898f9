// Plans of the kernels that work row by row: core/row_kernels.h as limits and launches.
#include "core/row_kernels.h"

#include <limits>

#include "core/token_tile.h"
#include "plan/family_plan.h"

namespace fa {
namespace {

constexpr int64_t kMaxCombineRows = std::numeric_limits<int>::max();  // its row index is int

// Whether every row is read and written 16 bytes at a time.
bool is_vectorized(const Problem& p) {
  const int vec = p.family == Family::kCombine ? kCombineVec : elements_per_vector(p.dtype);
  if (p.alignment_bytes < kVectorBytes) return false;
  switch (p.family) {
    case Family::kCombine:
    case Family::kBwdPreprocess: return p.head_dim_v % vec == 0;
    case Family::kRotary: return p.head_dim % vec == 0 && p.rotary_dim % (2 * vec) == 0;
    case Family::kAppendKv:
      return p.head_dim % vec == 0 && p.head_dim_v % vec == 0 && p.rotary_dim % (2 * vec) == 0;
    default: return false;
  }
}

}  // namespace

bool row_kernel_refuses(const Problem& p, Reason reason) {
  const auto at_most = [&](const char* what, int64_t got, int64_t limit) {
    return got > limit &&
           reason(what, "=", got, ": ", family_name(p.family), " takes at most ", limit);
  };
  const bool has_head_dim = p.family == Family::kRotary || p.family == Family::kAppendKv;
  if (has_head_dim && at_most("head_dim", p.head_dim, kMaxRowHeadDim)) return true;
  if (p.family != Family::kRotary && at_most("head_dim_v", p.head_dim_v, kMaxRowHeadDim))
    return true;
  if (p.family == Family::kCombine) {
    const int64_t rows = int64_t{p.batch_size} * p.seqlen_q * p.num_heads_q;
    return at_most("rows", rows, kMaxCombineRows) ||
           at_most("num_splits", p.num_splits, kMaxCombineSplits);
  }
  if (has_head_dim && p.rotary_dim % 2 != 0)
    return reason("rotary_dim=", p.rotary_dim, ": ", family_name(p.family),
                  " needs an even number");
  if (has_head_dim && p.rotary_dim > p.head_dim)
    return reason("rotary_dim=", p.rotary_dim, ": ", family_name(p.family),
                  " takes at most head_dim=", p.head_dim);
  return false;
}

Plan row_kernel_plan(const Problem& p) {
  Plan plan;
  plan.vectorized = is_vectorized(p);
  const int wide = p.family == Family::kCombine ? kCombineVec : elements_per_vector(p.dtype);
  const int vec = plan.vectorized ? wide : 1;
  const int64_t heads = p.num_heads_q;
  switch (p.family) {
    case Family::kCombine:
      plan.num_threads = kCombineThreads;
      plan.tile_m = combine_rows_per_cta(p.head_dim_v, vec);
      plan.tile_n = p.head_dim_v;
      plan.num_splits = p.num_splits;
      plan.num_ctas = ceil_div<int64_t>(heads * p.batch_size * p.seqlen_q, plan.tile_m);
      break;
    case Family::kBwdPreprocess:
      plan.num_threads = kBwdPreprocessThreads;
      plan.tile_m = bwd_preprocess_rows_per_cta(p.head_dim_v, vec);
      plan.tile_n = p.head_dim_v;
      plan.num_ctas = heads * p.batch_size * ceil_div(p.seqlen_q, plan.tile_m);
      break;
    default: {
      const bool append = p.family == Family::kAppendKv;
      const int units =
          row_units(p.head_dim, p.rotary_dim, vec) + (append ? row_units(p.head_dim_v, 0, vec) : 0);
      const int num_heads = append ? p.num_heads_kv : p.num_heads_q;
      const int seqlen = append ? p.seqlen_k : p.seqlen_q;
      plan.num_threads = append ? kAppendKvThreads : kRotaryThreads;
      plan.tile_m = tokens_per_tile(units_per_token(num_heads, units), plan.num_threads, p.varlen);
      plan.tile_n = p.head_dim + (append ? p.head_dim_v : 0);
      plan.num_ctas = num_token_tiles(p.varlen, p.batch_size, seqlen, plan.tile_m);
      break;
    }
  }
  return plan;
}

}  // namespace fa
