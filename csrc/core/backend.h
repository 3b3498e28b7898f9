// What a kernel library (_sm80, _sm89, _sm90) gives to the binder: one table of launch functions.
//
// A library exports the one symbol fa_get_backend and links neither torch nor the other libraries.
// Launch functions enqueue on `stream` (a cudaStream_t) of the current device, never synchronise,
// and return a cudaError_t as int. A null entry: this library has no kernel of that family.
#pragma once
#include <cstdint>

#include "core/params.h"
#include "core/value_checks.h"

namespace fa {

struct Backend {
  uint32_t abi_version;  // kKernelAbiVersion of the sources it was built from
  int arch;              // 80, 89, 90
  const char* (*error_string)(int error);
  int (*fwd)(const FwdParams& params, void* stream);
  int (*bwd)(const BwdParams& params, void* stream);
  int (*combine)(const CombineParams& params, void* stream);
  int (*bwd_preprocess)(const BwdPreprocessParams& params, void* stream);
  int (*rotary)(const RotaryParams& params, void* stream);
  int (*append_kv)(const AppendKvParams& params, void* stream);
  int (*decode)(const DecodeParams& params, void* stream);
  int (*norm_fwd)(const NormFwdParams& params, void* stream);
  int (*norm_bwd)(const NormBwdParams& params, void* stream);
  int (*cross_entropy_fwd)(const CrossEntropyParams& params, void* stream);
  int (*cross_entropy_bwd)(const CrossEntropyParams& params, void* stream);
  int (*value_checks)(const ValueCheckParams& params, void* stream);
};

}  // namespace fa

using FaGetBackend = const fa::Backend*();
constexpr char kFaGetBackendSymbol[] = "fa_get_backend";
