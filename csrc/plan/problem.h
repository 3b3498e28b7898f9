// What is to be computed (Problem) and on what (DeviceFacts): the whole input of a plan.
//
// Sizes, flags and facts only; no pointers, no floating point. A field that a family has no use for
// keeps its default.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/arch.h"
#include "core/dtype.h"
#include "core/mask.h"

namespace fa {

// The order is part of the binary interface between the binder and the kernel libraries.
enum class Family {
  kFwd,
  kBwd,
  kDecode,
  kCombine,
  kBwdPreprocess,
  kRotary,
  kAppendKv,
  kNormFwd,
  kNormBwd,
  kCrossEntropyFwd,
  kCrossEntropyBwd
};

constexpr int kNumFamilies = 11;

const char* family_name(Family family);

struct Problem {
  Family family = Family::kFwd;
  DType dtype = DType::kBFloat16;  // of q, k, v; of x; of the output of combine

  int head_dim = 128;    // of q and k, or of x; hidden_size of a norm, vocabulary of cross_entropy
  int head_dim_v = 128;  // of v and out
  int batch_size = 1;
  // Of each sequence; varlen, cache: the maximum. The row kernels (combine, bwd_preprocess, rotary:
  // seqlen_q; append_kv: seqlen_k, the new keys) take all tokens together when varlen. norm and
  // cross_entropy: seqlen_q rows.
  int seqlen_q = 1;
  int seqlen_k = 1;
  int total_q = 0;  // varlen attention: rows of all sequences together, and behind the last one
  int total_k = 0;
  int num_heads_q = 1;
  int num_heads_kv = 1;  // divides num_heads_q

  int window_left = kUnbounded;   // keys beside the diagonal; negative: unbounded
  int window_right = kUnbounded;  // 0: causal
  bool varlen = false;            // cu_seqlens or seqused are given
  int page_size = 0;              // tokens to a page; 0: not paged
  bool leftpad = false;           // caches: keys begin at different rows
  bool appends = false;           // caches: the call brings new keys
  bool broadcast = false;         // caches: a stride of 0, so that some keys are the same memory

  bool softcap = false;
  bool alibi = false;
  bool dropout = false;
  bool dmask = false;          // fwd: the probabilities are asked for
  bool positive_scale = true;  // softmax_scale > 0
  bool deterministic = false;

  int num_splits = 0;  // fwd, decode: wanted, 0 = the plan decides; combine: partial results
  int rotary_dim = 0;  // elements that turn; 0: no rotary embedding
  bool rotary_interleaved = false;
  bool bias = false;         // norm_bwd: of LayerNorm, has a gradient
  int alignment_bytes = 16;  // largest power of two up to 16 that divides the address of every row
};

// What a plan may know of a GPU.
struct DeviceFacts {
  int sm_major, sm_minor;  // compute capability
  int num_sms;
  int max_smem_bytes;  // one CTA's, after opting in
  int64_t l2_bytes;
};

struct NamedDevice {
  const char* name;
  DeviceFacts facts;
};

// GPUs that a plan can be asked for without having one, then architecture names standing for a
// typical GPU of theirs.
const std::vector<NamedDevice>& named_devices();

// The facts of `name` (case as listed), or nullptr.
const DeviceFacts* find_device(const std::string& name);

}  // namespace fa
