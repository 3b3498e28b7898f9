// Copies for tensors that the attention kernels can not read or write as they are: the kernels move
// 16 bytes at a time, so rows must be contiguous, begin at multiples of 16 bytes and hold whole
// ones.
#pragma once
#include "bindings/tensor_checks.h"
#include "core/host_device.h"

namespace fa {

constexpr int64_t kRowBytes = 16;

inline bool has_whole_rows(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  const size_t last = size.size() - 1;
  return size[last] * static_cast<int64_t>(t.element_size()) % kRowBytes == 0 &&
         (stride[last] == 1 || size[last] == 1) && rows_aligned(t, kRowBytes);
}

// The shape of `t` with the last dimension rounded up to whole 16 bytes.
inline Shape whole_rows(const Tensor& t) {
  Shape shape(t);
  shape.last() =
      round_up<int64_t>(shape.last(), kRowBytes / static_cast<int64_t>(t.element_size()));
  return shape;
}

// `t`, or a copy whose rows are whole, zeros behind their elements.
inline Tensor readable_rows(const Tensor& t) {
  if (has_whole_rows(t)) return t;
  Tensor copy = zero_tensor(t, whole_rows(t));
  const int64_t last = t.dim() - 1;
  Tensor rows = torch::stable::narrow(copy, last, 0, t.size(last));
  torch::stable::copy_(rows, t);
  return copy;
}

// `t`, or a buffer with whole rows that a kernel fills instead; then store_rows.
inline Tensor writable_rows(const Tensor& t) {
  return has_whole_rows(t) ? t : new_tensor(t, whole_rows(t));
}

// Copies what was written into writable_rows(t) to `t`, if that is another tensor.
inline void store_rows(Tensor& written, const Tensor& t) {
  if (written.get() == t.get()) return;
  const int64_t last = t.dim() - 1;
  Tensor target = t;
  torch::stable::copy_(target, torch::stable::narrow(written, last, 0, t.size(last)));
}

}  // namespace fa
