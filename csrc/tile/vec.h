// Vec<T, N>: N elements of T that one thread moves together, and their conversion to float.
//
// N * sizeof(T) is 16 or 8 bytes (one instruction), or N is small and the elements move one by one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/host_device.h"
#include "ptx/global_memory.h"

namespace fa {

FA_DEVICE float to_float(float x) {
  return x;
}
FA_DEVICE float to_float(__half x) {
  return __half2float(x);
}
FA_DEVICE float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
FA_DEVICE T from_float(float x);
template <>
FA_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FA_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
FA_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T, int N>
struct alignas(N * sizeof(T) <= 16 ? N * sizeof(T) : 16) Vec {
  T x[N];
};

// Elements of T in one 16-byte access.
template <class T>
constexpr int kVecSize = 16 / static_cast<int>(sizeof(T));

// Precondition: p is a multiple of 16 bytes if the vector is 16 bytes long, else of sizeof(T).
template <int N, class T>
FA_DEVICE Vec<T, N> load_vec(const T* p) {
  Vec<T, N> v;
  if constexpr (N * sizeof(T) == 16) {
    *reinterpret_cast<uint4*>(v.x) = ptx::ld_global_no_allocate_v4(p);
  } else {
    FA_UNROLL
    for (int i = 0; i < N; ++i) v.x[i] = p[i];
  }
  return v;
}

// Precondition: p is a multiple of the vector's size if that is 16 or 8 bytes, else of sizeof(T).
template <int N, class T>
FA_DEVICE void store_vec(T* p, Vec<T, N> v) {
  if constexpr (N * sizeof(T) == 16) {
    ptx::st_global_v4(p, *reinterpret_cast<const uint4*>(v.x));
  } else if constexpr (N * sizeof(T) == 8) {
    ptx::st_global_v2(p, *reinterpret_cast<const uint2*>(v.x));
  } else {
    FA_UNROLL
    for (int i = 0; i < N; ++i) p[i] = v.x[i];
  }
}

}  // namespace fa
