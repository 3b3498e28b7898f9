// Checks of tensors on their way into a params struct, and how their layout is read.
//
// The Python API has checked already and words its errors for users; these guard the ops themselves
// (torch.ops.flash_attn_ext.*), so that no call can read or write outside a tensor.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "bindings/stable_torch.h"
#include "core/dtype.h"
#include "core/params.h"

namespace fa {

// `what: got ..., expected ...` as one exception.
#define FA_CHECK(cond, ...) STD_TORCH_CHECK(cond, "flash_attn_ext: ", __VA_ARGS__)

// The element type as core/ names it; nullopt: no kernel computes with it.
inline std::optional<DType> dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    default: return std::nullopt;
  }
}

// Rank and device, that of `like`.
inline void check_place(const char* name, const Tensor& t, const Tensor& like, int64_t rank) {
  FA_CHECK(t.dim() == rank, name, ": got ", t.dim(), " dimensions, expected ", rank);
  const int device = like.get_device_index();
  FA_CHECK(t.is_cuda() && t.get_device_index() == device, name,
           ": got another device, expected cuda:", device);
}

// The same, and a contiguous last dimension.
inline void check_tensor(const char* name, const Tensor& t, const Tensor& like, int64_t rank) {
  check_place(name, t, like, rank);
  FA_CHECK(rank == 0 || t.size(rank - 1) <= 1 || t.stride(rank - 1) == 1, name,
           ": got a last dimension of stride ", t.stride(rank - 1), ", expected 1 (contiguous)");
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  FA_CHECK(t.scalar_type() == expected, name, ": got element type ",
           static_cast<int>(t.scalar_type()), ", expected ", static_cast<int>(expected));
}

// The element type of `like`.
inline void check_dtype(const char* name, const Tensor& t, const Tensor& like) {
  if (dtype_number(t) != dtype_number(like)) check_dtype(name, t, like.scalar_type());
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t expected) {
  FA_CHECK(t.size(dim) == expected, name, ": got size ", t.size(dim), " in dimension ", dim,
           ", expected ", expected);
}

// A size that kernels keep in 32 bits (positions and counts; offsets are 64-bit).
inline int to_int(const char* name, int64_t value) {
  FA_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), name, ": got ", value,
           ", expected 0 .. 2^31 - 1");
  return static_cast<int>(value);
}

// A vector of int32 per sequence: cu_seqlens (batch_size + 1), cache_seqlens, offsets (batch_size).
inline const int* int32_vector(const char* name, const Tensor& t, const Tensor& like,
                               int64_t size) {
  check_tensor(name, t, like, 1);
  check_dtype(name, t, ScalarType::Int);
  check_size(name, t, 0, size);
  return static_cast<const int*>(t.data_ptr());
}
inline const int* int32_vector(const char* name, const OptionalTensor& t, const Tensor& like,
                               int64_t size) {
  return t ? int32_vector(name, *t, like, size) : nullptr;
}

// Strides of [batch, token, head, dim], or of varlen [token, head, dim].
inline Strides strides_of(const Tensor& t) {
  const auto stride = t.strides();
  if (stride.size() == 3) return {0, stride[0], stride[1]};
  return {stride[0], stride[1], stride[2]};
}

// Whether every row along the last dimension starts at a multiple of `bytes`. Strides of dimensions
// of size 1 are never multiplied by anything but 0, whatever torch reports for them.
inline bool rows_aligned(const Tensor& t, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) % bytes != 0) return false;
  const int64_t element_bytes = static_cast<int64_t>(t.element_size());
  const auto size = t.sizes(), stride = t.strides();
  for (size_t i = 0; i + 1 < size.size(); ++i)
    if (size[i] > 1 && stride[i] * element_bytes % bytes != 0) return false;
  return true;
}

// Whether entries of a dimension are the same memory.
inline bool is_broadcast(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  for (size_t i = 0; i < size.size(); ++i)
    if (size[i] > 1 && stride[i] == 0) return true;
  return false;
}

}  // namespace fa
