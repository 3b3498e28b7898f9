// How an instance file (instances/*.cu) turns templates into the entries of a library's table.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "core/backend.h"
#include "core/tile_config.h"

namespace fa {

// Launch the kernels of one built head_dim and element type; defined in kernels/smNN/*.cuh, each
// instantiated in an instance file of its own.
template <class T, int kHeadDim>
int launch_fwd(const FwdParams& params, cudaStream_t stream);
template <class T, int kHeadDim>
int launch_bwd(const BwdParams& params, cudaStream_t stream);
template <class T, int kHeadDim, DecodeCtas kCtas>
int launch_decode_few_rows(const DecodeParams& params, cudaStream_t stream);
template <class T, int kHeadDim>
int launch_decode_many_rows(const DecodeParams& params, cudaStream_t stream);
template <class T, int kHeadDim>
int launch_decode_wgmma(const DecodeParams& params, cudaStream_t stream);

// One definition each a library, in the instance file of the family.
int fwd(const FwdParams& params, void* stream);
int bwd(const BwdParams& params, void* stream);
int combine(const CombineParams& params, void* stream);
int bwd_preprocess(const BwdPreprocessParams& params, void* stream);
int rotary(const RotaryParams& params, void* stream);
int append_kv(const AppendKvParams& params, void* stream);
int decode(const DecodeParams& params, void* stream);
int norm_fwd(const NormFwdParams& params, void* stream);
int norm_bwd(const NormBwdParams& params, void* stream);
int cross_entropy_fwd(const CrossEntropyParams& params, void* stream);
int cross_entropy_bwd(const CrossEntropyParams& params, void* stream);
int value_checks(const ValueCheckParams& params, void* stream);

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

// Defines fa::family(params, stream) as launcher<T, kHeadDim> for the element type and the built
// size of the larger head_dim.
#define FA_HEAD_DIM(launcher, size) \
  case size: return fa::launcher<T, size>(params, stream);
#define FA_INSTANTIATE_LAUNCHER(family, Params, launcher)                            \
  template <class T>                                                                 \
  static int family##_of(const fa::Params& params, cudaStream_t stream) {            \
    switch (fa::built_head_dim(fa::max(params.head_dim, params.head_dim_v))) {       \
      FA_HEAD_DIM(launcher, 64)                                                      \
      FA_HEAD_DIM(launcher, 96)                                                      \
      FA_HEAD_DIM(launcher, 128)                                                     \
      FA_HEAD_DIM(launcher, 192)                                                     \
      FA_HEAD_DIM(launcher, 256)                                                     \
      default: return cudaErrorInvalidValue;                                         \
    }                                                                                \
  }                                                                                  \
  int fa::family(const Params& params, void* stream) {                               \
    const auto cuda_stream = static_cast<cudaStream_t>(stream);                      \
    switch (params.dtype) {                                                          \
      case DType::kFloat16: return family##_of<__half>(params, cuda_stream);         \
      case DType::kBFloat16: return family##_of<__nv_bfloat16>(params, cuda_stream); \
      default: return cudaErrorInvalidValue;                                         \
    }                                                                                \
  }
#define FA_INSTANTIATE_BY_HEAD_DIM(family, Params) \
  FA_INSTANTIATE_LAUNCHER(family, Params, launch_##family)

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
        fa::append_kv,                                                                    \
        fa::decode,                                                                       \
        fa::norm_fwd,                                                                     \
        fa::norm_bwd,                                                                     \
        fa::cross_entropy_fwd,                                                            \
        fa::cross_entropy_bwd,                                                            \
        fa::value_checks};                                                                \
    return &backend;                                                                      \
  }
