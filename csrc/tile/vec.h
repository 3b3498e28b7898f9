// Vec<T, N>: N elements of T that one thread moves together, and their conversion to float.
//
// N * sizeof(T) is 8 bytes or a multiple of 16 (16 bytes to an instruction), or N is small and the
// elements move one by one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/host_device.h"
#include "ptx/global_memory.h"

namespace fa {

template <class T, int N>
struct alignas(N * sizeof(T) <= 16 ? N * sizeof(T) : 16) Vec {
  T x[N];
};

// Elements of T in one 16-byte access.
template <class T>
constexpr int kVecSize = 16 / static_cast<int>(sizeof(T));

// Past L1, for data that this thread alone reads, in whole cache lines together with its
// neighbours. Precondition: p is a multiple of 16 bytes if the vector is 16 bytes long or more,
// else of sizeof(T).
template <int N, class T>
FA_DEVICE Vec<T, N> load_vec(const T* p) {
  Vec<T, N> v;
  if constexpr (N * sizeof(T) % 16 == 0) {
    FA_UNROLL
    for (int i = 0; i < N; i += kVecSize<T>)
      *reinterpret_cast<uint4*>(&v.x[i]) = ptx::ld_global_no_allocate_v4(p + i);
  } else {
    FA_UNROLL
    for (int i = 0; i < N; ++i) v.x[i] = p[i];
  }
  return v;
}

// Through L1, for tables that many threads read and rows that are read half a line at a time.
// Precondition: p is a multiple of 16 bytes if the vector is 16 bytes long or more, of 8 if it has
// 8, else of sizeof(T).
template <int N, class T>
FA_DEVICE Vec<T, N> load_vec_l1(const T* p) {
  Vec<T, N> v;
  if constexpr (N * sizeof(T) % 16 == 0) {
    FA_UNROLL
    for (int i = 0; i < N; i += kVecSize<T>)
      *reinterpret_cast<uint4*>(&v.x[i]) = ptx::ld_global_v4(p + i);
  } else if constexpr (N * sizeof(T) == 8) {
    *reinterpret_cast<uint2*>(v.x) = ptx::ld_global_v2(p);
  } else {
    FA_UNROLL
    for (int i = 0; i < N; ++i) v.x[i] = p[i];
  }
  return v;
}

// Precondition: p is a multiple of 16 bytes if the vector is 16 bytes long or more, of 8 if it has
// 8, else of sizeof(T).
template <int N, class T>
FA_DEVICE void store_vec(T* p, Vec<T, N> v) {
  if constexpr (N * sizeof(T) % 16 == 0) {
    FA_UNROLL
    for (int i = 0; i < N; i += kVecSize<T>)
      ptx::st_global_v4(p + i, *reinterpret_cast<const uint4*>(&v.x[i]));
  } else if constexpr (N * sizeof(T) == 8) {
    ptx::st_global_v2(p, *reinterpret_cast<const uint2*>(v.x));
  } else {
    FA_UNROLL
    for (int i = 0; i < N; ++i) p[i] = v.x[i];
  }
}

// The elements as floats. 16-bit ones two at a time in integer or packed instructions: the scalar
// conversions of sm_90 (cvt.f32.bf16, cvt.rn.bf16.f32) run at a quarter of the rate and halved the
// bandwidth of bwd_preprocess.
template <int N>
FA_DEVICE void to_float(const Vec<float, N>& v, float (&out)[N]) {
  FA_UNROLL
  for (int i = 0; i < N; ++i) out[i] = v.x[i];
}
template <int N>
FA_DEVICE void to_float(const Vec<__half, N>& v, float (&out)[N]) {
  FA_UNROLL
  for (int i = 0; i < N; ++i) out[i] = __half2float(v.x[i]);
}
template <int N>
FA_DEVICE void to_float(const Vec<__nv_bfloat16, N>& v, float (&out)[N]) {
  // A bf16 is the upper half of the float of the same value. Taken from whole words: elements read
  // one by one stay in a register each from the load on, twice as many as were loaded.
  if constexpr (N == 1) {
    out[0] = __uint_as_float(static_cast<uint32_t>(__bfloat16_as_ushort(v.x[0])) << 16);
  } else {
    FA_UNROLL
    for (int i = 0; i < N; i += 2) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(&v.x[i]);
      out[i] = __uint_as_float(pair << 16);
      out[i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
  }
}

// Floats rounded to nearest even.
template <int N>
FA_DEVICE void from_float(const float (&x)[N], Vec<float, N>& out) {
  FA_UNROLL
  for (int i = 0; i < N; ++i) out.x[i] = x[i];
}
template <int N>
FA_DEVICE void from_float(const float (&x)[N], Vec<__half, N>& out) {
  if constexpr (N == 1) {
    out.x[0] = __float2half_rn(x[0]);
  } else {
    FA_UNROLL
    for (int i = 0; i < N; i += 2)
      *reinterpret_cast<__half2*>(&out.x[i]) = __floats2half2_rn(x[i], x[i + 1]);
  }
}
template <int N>
FA_DEVICE void from_float(const float (&x)[N], Vec<__nv_bfloat16, N>& out) {
  if constexpr (N == 1) {
    out.x[0] = __float2bfloat16_rn(x[0]);
  } else {
    FA_UNROLL
    for (int i = 0; i < N; i += 2)
      *reinterpret_cast<__nv_bfloat162*>(&out.x[i]) = __floats2bfloat162_rn(x[i], x[i + 1]);
  }
}

}  // namespace fa
