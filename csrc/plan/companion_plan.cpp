// Plans of the kernels beside attention: LayerNorm, RMSNorm and cross-entropy.
#include "core/cross_entropy.h"
#include "core/norm.h"
#include "plan/family_plan.h"

namespace fa {
namespace {

bool is_norm(Family family) {
  return family == Family::kNormFwd || family == Family::kNormBwd;
}

}  // namespace

bool companion_refuses(const Problem& p, const DeviceFacts& device, Reason reason) {
  if (!is_norm(p.family)) return false;
  const int limit = p.family == Family::kNormFwd ? kMaxNormFwdSize : kMaxNormBwdSize;
  if (p.head_dim > limit)
    return reason("head_dim=", p.head_dim, ": ", family_name(p.family), " takes at most ", limit);
  const int smem_bytes = p.family == Family::kNormBwd ? norm_bwd_smem_bytes(p.head_dim, p.bias) : 0;
  return smem_bytes > device.max_smem_bytes &&
         reason("smem_bytes=", smem_bytes, ": a CTA of the device has at most ",
                device.max_smem_bytes);
}

Plan companion_plan(const Problem& p, const DeviceFacts& device) {
  Plan plan;
  plan.tile_n = p.head_dim;
  if (!is_norm(p.family)) {
    plan.tile_m = 1;
    plan.vectorized = true;  // whatever the alignment: core/cross_entropy.h
    plan.num_threads = kCrossEntropyThreads;
    plan.num_ctas = p.seqlen_q;
    return plan;
  }
  plan.vectorized = p.alignment_bytes >= kNormRowAlignment && p.head_dim % kNormVec == 0;
  const bool backward = p.family == Family::kNormBwd;
  const NormShare share = norm_share(p.head_dim, backward ? kNormBwdColumns : kNormFwdColumns);
  plan.tile_m = share.rows;
  plan.num_threads = share.num_threads();
  if (!backward) {
    plan.num_ctas = ceil_div(p.seqlen_q, share.rows);
    return plan;
  }
  plan.num_ctas = norm_bwd_ctas(p.head_dim, p.seqlen_q, device.num_sms);
  plan.smem_bytes = norm_bwd_smem_bytes(p.head_dim, p.bias);
  plan.workspace_bytes = (p.bias ? 2 : 1) * plan.num_ctas * norm_partial_stride(p.head_dim) *
                         static_cast<int64_t>(sizeof(float));
  return plan;
}

}  // namespace fa
