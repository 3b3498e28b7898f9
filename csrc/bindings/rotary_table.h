// cos and sin tensors as the RotaryTable that kernels read.
#pragma once
#include "bindings/tensor_checks.h"

namespace fa {

// cos, sin: [num_positions, rotary_dim / 2], dtype of x.
inline RotaryTable rotary_table(const Tensor& cos, const Tensor& sin, const Tensor& x,
                                bool interleaved, bool conjugate) {
  check_tensor("cos", cos, x, 2);
  check_tensor("sin", sin, x, 2);
  check_dtype("cos", cos, x.scalar_type());
  check_dtype("sin", sin, x.scalar_type());
  for (int64_t i = 0; i < 2; ++i) check_size("sin", sin, i, cos.size(i));
  FA_CHECK(cos.stride(0) == sin.stride(0) || cos.size(0) <= 1, "sin: got row stride ",
           sin.stride(0), ", expected that of cos, ", cos.stride(0));
  const int rotary_dim = 2 * to_int("rotary_dim", cos.size(1));
  FA_CHECK(rotary_dim <= x.size(x.dim() - 1), "cos: got ", rotary_dim,
           " rotary dimensions, expected at most head_dim = ", x.size(x.dim() - 1));
  return {cos.data_ptr(), sin.data_ptr(), cos.stride(0), to_int("num_positions", cos.size(0)),
          rotary_dim,     interleaved,    conjugate};
}

}  // namespace fa
