// Plans of the kernels beside attention: LayerNorm, RMSNorm and cross-entropy.
#include "core/cross_entropy.h"
#include "core/norm.h"
#include "plan/family_plan.h"

namespace fa {
namespace {

bool is_norm(Family family) {
  return family == Family::kNormFwd || family == Family::kNormBwd;
}

bool is_vectorized(const Problem& p) {
  return p.alignment_bytes >= kNormRowAlignment && p.head_dim % kNormVec == 0;
}

}  // namespace

bool companion_refuses(const Problem& p, const DeviceFacts& device, Reason reason) {
  if (!is_norm(p.family)) return false;
  const char* family = family_name(p.family);
  if (p.head_dim > kMaxNormSize)
    return reason("head_dim=", p.head_dim, ": ", family, " takes at most ", kMaxNormSize);
  if (p.family == Family::kNormFwd) return false;
  if (p.head_dim > kMaxNormBwdRegisterSize && !is_vectorized(p))
    return reason("head_dim=", p.head_dim, ": ", family, " takes more than ",
                  kMaxNormBwdRegisterSize, " only as a multiple of ", kNormVec,
                  " in rows that begin at multiples of ", kNormRowAlignment, " bytes");
  const int smem_bytes = norm_bwd_smem_bytes(p.head_dim, p.bias);
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
  plan.vectorized = is_vectorized(p);
  const bool backward = p.family == Family::kNormBwd;
  // A ring if the other tensors are of this type too. Where they are not, the launch takes the
  // kernel without, in as many CTAs as that has at once; the backward has partial gradients for
  // either.
  const bool ring = plan.vectorized && p.dtype != DType::kFloat32 &&
                    (!backward || p.head_dim <= kMaxNormBwdRegisterSize);
  const NormShare share = backward
                              ? ring ? norm_bwd_ring_share(p.head_dim) : norm_bwd_share(p.head_dim)
                          : ring ? norm_fwd_ring_share(p.head_dim)
                                 : norm_fwd_share(p.head_dim);
  plan.tile_m = share.rows;
  plan.num_threads = share.num_threads();
  const int64_t ring_ctas = norm_ctas(share, p.seqlen_q, device.num_sms, kMaxNormRingThreads);
  if (!backward) {
    plan.num_ctas = ring ? ring_ctas : ceil_div(p.seqlen_q, share.rows);
    return plan;
  }
  plan.num_ctas = norm_bwd_ctas(p.head_dim, p.seqlen_q, device.num_sms);
  if (ring) plan.num_ctas = max<int64_t>(plan.num_ctas, ring_ctas);
  plan.smem_bytes = norm_bwd_smem_bytes(p.head_dim, p.bias);
  plan.workspace_bytes = (p.bias ? 2 : 1) * plan.num_ctas * norm_partial_stride(p.head_dim) *
                         static_cast<int64_t>(sizeof(float));
  return plan;
}

}  // namespace fa
