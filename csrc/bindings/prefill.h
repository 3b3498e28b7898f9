// Many queries against contiguous caches, for the ops of the cache: a forward.
#pragma once
#include "bindings/decode_args.h"

namespace fa {

// Whether SM90's forward does better than `decode`, the kernel planned for it: it splits no keys,
// shares them among no query heads and knows no pages.
bool is_prefill(const DecodeArgs& args, const DecodeKernel& decode, const AppendedKeys& appended);

// (out, lse) of such a call, over keys that are in the caches already. Both are in ops_fwd.cpp.
std::tuple<Tensor, Tensor> prefill(const DecodeArgs& args, const AppendedKeys& appended);

}  // namespace fa
