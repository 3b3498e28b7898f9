// The op rotary, for the ops that need it as a step or in a launch of theirs.
#pragma once
#include "bindings/stable_torch.h"
#include "core/params.h"

namespace fa {

// Arguments as in the schema; defined in ops_rotary.cpp.
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens,
              int64_t max_seqlen, bool interleaved, bool conjugate, bool same_position);

// The op but for its launch; nullopt if no kernel takes it. Its arguments are in ops_rotary.cpp's
// order, too.
struct PlannedRotation {
  RotaryParams params;
  Tensor out;
};
std::optional<PlannedRotation> plan_rotation(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                             const OptionalTensor& seqlen_offsets,
                                             const OptionalTensor& cu_seqlens, int64_t max_seqlen,
                                             bool interleaved, bool conjugate, bool same_position);

}  // namespace fa
