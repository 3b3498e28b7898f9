// The op rotary, for the ops that need it as a step.
#pragma once
#include "bindings/stable_torch.h"

namespace fa {

// Arguments as in the schema; defined in ops_rotary.cpp.
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens,
              int64_t max_seqlen, bool interleaved, bool conjugate, bool same_position);

// The same behind a launch that neither writes what this one reads nor is complete before it has to
// be: see RotaryParams::overlaps.
Tensor rotary_overlapping(const Tensor& x, const Tensor& cos, const Tensor& sin,
                          const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens,
                          int64_t max_seqlen, bool interleaved, bool conjugate, bool same_position);

}  // namespace fa
