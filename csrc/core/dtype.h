// Element types of the tensors, their sizes and their names.
//
// The order of DType is part of the binary interface between the binder and the kernel libraries.
#pragma once
#include "core/host_device.h"

namespace fa {

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };

constexpr int kNumDTypes = 4;

FA_HD constexpr int dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kFloat32: return 4;
    case DType::kFloat64: return 8;
  }
  return 0;
}

// The name in kernel names, messages and Python.
FA_HD constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return "fp16";
    case DType::kBFloat16: return "bf16";
    case DType::kFloat32: return "fp32";
    case DType::kFloat64: return "fp64";
  }
  return "unknown";
}

static_assert(dtype_bytes(DType::kBFloat16) == 2 && dtype_bytes(DType::kFloat64) == 8);

}  // namespace fa
