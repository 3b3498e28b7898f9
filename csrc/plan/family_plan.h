// What each group of families adds to make_plan: what its kernels do not take, and how they are
// launched. The problem is free of contradictions and an instance exists.
#pragma once
#include "plan/plan.h"
#include "plan/reason.h"

namespace fa {

// fwd and bwd.
FA_HD constexpr bool is_attention(Family family) {
  return family == Family::kFwd || family == Family::kBwd;
}
bool attention_refuses(Arch arch, const Problem& problem, const DeviceFacts& device, Reason reason);
Plan attention_plan(Arch arch, const Problem& problem, const DeviceFacts& device);

// decode; the same for every architecture.
bool decode_refuses(Arch arch, const Problem& problem, const DeviceFacts& device, Reason reason);
Plan decode_plan(Arch arch, const Problem& problem, const DeviceFacts& device);

// combine, bwd_preprocess, rotary, append_kv; the same for every architecture.
bool row_kernel_refuses(const Problem& problem, Reason reason);
Plan row_kernel_plan(const Problem& problem);

// norm_fwd, norm_bwd, cross_entropy_fwd, cross_entropy_bwd; the same for every architecture.
FA_HD constexpr bool is_companion(Family family) {
  return family == Family::kNormFwd || family == Family::kNormBwd ||
         family == Family::kCrossEntropyFwd || family == Family::kCrossEntropyBwd;
}
bool companion_refuses(const Problem& problem, const DeviceFacts& device, Reason reason);
Plan companion_plan(const Problem& problem, const DeviceFacts& device);

}  // namespace fa
