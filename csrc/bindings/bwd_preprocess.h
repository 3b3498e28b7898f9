// The first step of the attention backward, which is an op of its own too.
#pragma once
#include "bindings/stable_torch.h"

namespace fa {

// delta = rowsum(dout * out) - dlse. out, dout: [batch, seqlen, heads, head_dim_v] or varlen
// [total, heads, head_dim_v]; dlse and the returned delta: [batch, heads, seqlen] or [heads,
// total].
Tensor bwd_preprocess(const Tensor& out, const Tensor& dout, const OptionalTensor& dlse);

}  // namespace fa
