// How an instance file (instances/*.cu) turns templates into the entries of a library's table.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "core/backend.h"

namespace fa {

// One definition each a library, in the instance file of the family.
int combine(const CombineParams& params, void* stream);
int bwd_preprocess(const BwdPreprocessParams& params, void* stream);
int rotary(const RotaryParams& params, void* stream);
int append_kv(const AppendKvParams& params, void* stream);

}  // namespace fa

// Defines fa::family(params, stream) as launch_<family><T> for the element type of params.member.
#define FA_INSTANTIATE_BY_DTYPE(family, Params, member)                                  \
  int fa::family(const Params& params, void* stream) {                                   \
    const auto cuda_stream = static_cast<cudaStream_t>(stream);                          \
    switch (params.member) {                                                             \
      case DType::kFloat16: return launch_##family<__half>(params, cuda_stream);         \
      case DType::kBFloat16: return launch_##family<__nv_bfloat16>(params, cuda_stream); \
      case DType::kFloat32: return launch_##family<float>(params, cuda_stream);          \
      default: return cudaErrorInvalidValue;                                             \
    }                                                                                    \
  }

// Defines the library's one exported symbol. fwd, bwd: the library's functions, or nullptr.
#define FA_INSTANTIATE_BACKEND(arch, fwd, bwd)                                            \
  extern "C" __attribute__((visibility("default"))) const fa::Backend* fa_get_backend() { \
    static const fa::Backend backend{                                                     \
        fa::kKernelAbiVersion,                                                            \
        arch,                                                                             \
        [](int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); },    \
        fwd,                                                                              \
        bwd,                                                                              \
        fa::combine,                                                                      \
        fa::bwd_preprocess,                                                               \
        fa::rotary,                                                                       \
        fa::append_kv};                                                                   \
    return &backend;                                                                      \
  }
